"""policy_step: a whole actor-critic step without gradients. Maths in docs/ops/policy_step.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_fast.ops.backend import native_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence


class PolicyWeights(NamedTuple):
    """The tensors of an actor-critic with ``L`` state-space layers, matrices as ``[outputs, inputs]``.

    Each may have a leading dimension ``G``: the weights of as many groups.

    Attributes:
        heads: Weight and bias of the encoder, the actor and the critic, in turn.
        log_std: ``[K]``, or ``None`` for a discrete policy.
        layers: ``A``, ``B``, ``bias``, ``C``, ``D`` and weight and bias of the norm (or ``None``) of
            every layer in turn.
        network: ``V_x``, ``V_h``, ``b``, ``V``, ``c`` of the network that the critic reads the
            features through, ``tanh(V tanh(V_x x + V_h h + b) + c)``; empty if it reads them directly.
    """

    heads: Sequence[Tensor | None]
    log_std: Tensor | None
    layers: Sequence[Tensor | None]
    network: Sequence[Tensor | None] = ()


class Observations(NamedTuple):
    """Statistics that normalise observations, ``[I]`` float64, and the bound of the result."""

    mean: Tensor
    var: Tensor
    eps: float
    clip: float


def reference(
    x: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    noise: Tensor | None,
    weights: PolicyWeights,
    observations: Observations | None,
    norm_state: bool,
    residual: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The step as torch calls; the arguments of a `PolicyStep` and its call."""
    if observations is not None:
        mean, var, obs_eps, clip = observations
        x = ((x - mean) * (var + obs_eps).rsqrt()).clamp(-clip, clip).to(x.dtype)
    if state is not None and reset is not None:
        state = state.masked_fill(reset[:, None], 0)
    encoder, encoder_bias, actor, actor_bias, critic, critic_bias = weights.heads
    assert encoder is not None
    assert actor is not None
    assert critic is not None
    h = torch.tanh(F.linear(x, encoder, encoder_bias))  # [B, H]
    states = []
    for i in range(len(weights.layers) // 7):
        A, B, bias, C, D, norm_weight, norm_bias = weights.layers[7 * i : 7 * i + 7]
        assert A is not None
        assert B is not None
        assert C is not None
        assert D is not None
        z = F.linear(h, B, bias)  # [B, N]
        if state is not None:
            z = z + state[i] @ A.T
        if norm_state and norm_weight is not None:
            z = F.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, eps)
        y = z @ C.T + h @ D.T  # [B, H]
        if not norm_state and norm_weight is not None:
            y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
        h = h + torch.tanh(y) if residual else torch.tanh(y)
        states.append(z)
    action = F.linear(h, actor, actor_bias)  # [B, K]
    if weights.network:
        V_x, V_h, V_bias, V, V_hidden_bias = weights.network
        assert V_x is not None
        assert V_h is not None
        assert V is not None
        h = torch.tanh(F.linear(x, V_x, V_bias) + h @ V_h.T)  # [B, W]
        h = torch.tanh(F.linear(h, V, V_hidden_bias))  # [B, W]
    value = F.linear(h, critic, critic_bias).squeeze(-1)  # [B]
    log_prob = None
    if weights.log_std is not None:
        z = torch.zeros_like(action) if noise is None else noise  # [B, K]
        action = action + z * weights.log_std.exp()
        log_prob = -(z.square() / 2 + weights.log_std + math.log(2 * math.pi) / 2).sum(-1)  # [B]
    return action, log_prob, value, torch.stack(states)


class PolicyStep:
    """One step of a recurrent actor-critic in one native call.

    Internal to the models: shapes are not validated. Where the weights lie is looked up once, here,
    and they are read there at every call: their values may change between two steps, tensors that
    take their place are not seen.

    Args:
        weights: Of the network, in the dtype of ``x``, contiguous, on the CPU.
        observations: Normalise ``x`` with these first, unless None.
        norm_state: Whether the layers' norm stands on the state rather than on the output.
        residual: Whether a layer adds to its input.
        eps: Of the layer norm.
        groups: ``G``, where every weight has that leading dimension: the rows are then those of the
            groups, ``B / G`` of each, one group after the other.
    """

    def __init__(
        self,
        weights: PolicyWeights,
        observations: Observations | None,
        norm_state: bool,
        residual: bool,
        eps: float,
        groups: int = 1,
    ) -> None:
        heads, log_std, layers, network = weights
        encoder, actor, A = heads[0], heads[2], layers[0]
        assert encoder is not None
        assert actor is not None
        assert A is not None
        H, I = encoder.shape[-2:]
        N, K, L = A.shape[-1], actor.shape[-2], len(layers) // 7
        hidden = network[3] if network else None
        W = 0 if hidden is None else hidden.shape[-1]
        mean, var, obs_eps, clip = observations or (None, None, 0.0, 0.0)
        self._tensors = weights, observations  # what lies at the addresses stays there
        self._kernel = native_kernel("policy_step", encoder.dtype)
        self._statistics = _address(mean), _address(var), obs_eps, clip
        tensors = (*heads, log_std, *(network or (None,) * 5), *layers)
        self._addresses = [_address(tensor) for tensor in tensors]
        self._groups, self._sizes = groups, (I, H, N, L, K, W)
        self._options = norm_state, residual, eps
        self._gaussian = log_std is not None

    def __call__(
        self, x: Tensor, state: Tensor | None, reset: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Run the step.

        Args:
            x: Observations ``[B, I]``, float32 or float64.
            state: ``[L, B, N]``; zeros if None.
            reset: Boolean ``[B]``, or None: where set, the incoming state is zeroed.
            noise: Standard normal draws ``[B, K]``, contiguous; None for the mode, and for a
                discrete policy.

        Returns:
            The action ``[B, K]`` (the logits without a ``log_std``), its log-probability ``[B]``
            (None without a ``log_std``), the value ``[B]`` and the next state ``[L, B, N]``.
        """
        _, _, N, L, K, _ = self._sizes
        x = x.contiguous()
        state = None if state is None else state.contiguous()
        reset = None if reset is None else reset.contiguous()
        B = len(x)
        action, value = x.new_empty(B, K), x.new_empty(B)
        log_prob = x.new_empty(B) if self._gaussian else None
        next_state = x.new_empty(L, B, N)
        self.run(
            B,
            x.data_ptr(),
            _address(state),
            _address(reset),
            _address(noise),
            action.data_ptr(),
            _address(log_prob),
            value.data_ptr(),
            next_state.data_ptr(),
        )
        return action, log_prob, value, next_state

    def run(
        self,
        rows: int,
        x: int,
        state: int,
        reset: int,
        noise: int,
        action: int,
        log_prob: int,
        value: int,
        next_state: int,
    ) -> bool:
        """Run the step of so many rows on the addresses of contiguous tensors, 0 for None.

        Returns:
            Whether the values, and the log-probabilities where there are some, are finite.
        """
        finite: bool = self._kernel(
            x,
            *self._statistics,
            state,
            reset,
            noise,
            self._addresses,
            action,
            log_prob,
            value,
            next_state,
            (self._groups, rows // self._groups, *self._sizes),
            *self._options,
        )
        return finite


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
