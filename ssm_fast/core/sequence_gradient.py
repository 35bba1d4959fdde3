"""The gradient of an actor-critic over sequences, written out: no graph and no bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from ssm_fast.checks import is_replaced
from ssm_fast.core.improved_ssm import (
    NORM_EPS,
    ImprovedSSM,
    gaussian_entropy,
    gaussian_log_prob,
)
from ssm_fast.nn.ssm_layer import SSMLayer
from ssm_fast.ops.backend import native_kernel

# Of log-probabilities, values and entropies, [S, T] each: what to report, and the gradients of a
# loss with respect to them, in this order (entropies may be left out).
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Sequence[Tensor]]]


class SequenceGradient:
    """`ImprovedSSM.evaluate_actions` and the gradient of a loss of it, in one call.

    With the forward pass of `ImprovedSSM`, ``y^l = C s^l + D h^{l-1}`` before norm and tanh, and
    ``g`` for the gradient with respect to the variable that it is written with::

        g h^L = (g mean) W_a + (g value) W_c       without the last one under a network of the critic
        g y^l = output_norm's gradient at g h^l
        g s^l = (g y^l) C,   g u^l the adjoint scan of g s^l
        g h^{l-1} = (g y^l) D + (g u^l) B + g h^l                  the last one if use_residual

    and of each matrix the product of what it gives with what it takes. A minibatch of PPO is so small
    that autograd's graph takes longer than these products.

    Made by `of`. The values of the weights are read at each call; no other tensor may take the place
    of one.

    Attributes:
        vector: The gradient ``[P]``, in the order of ``model.parameters()``; the next call
            overwrites it, and who takes it may.
        native: The compiled object.
        log_std: The model's ``[K]``.
        log_std_gradient: Its part of `vector`.
    """

    vector: Tensor

    def __init__(self, model: ImprovedSSM) -> None:
        parameters = list(model.parameters())
        self.vector = torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])  # [P]
        views = torch.split(self.vector, [p.numel() for p in parameters])
        gradients = {id(p): v for p, v in zip(parameters, views, strict=True)}
        assert model.log_std is not None
        self.log_std = model.log_std.detach()
        self.log_std_gradient = gradients[id(model.log_std)]
        weights = _weights(model)
        self._weights = [None if w is None else w.detach() for w in weights]  # holds the memory
        width = 0 if model.critic_network is None else model.critic.in_features
        sizes = (
            model.input_dim,
            model.hidden_dim,
            model.state_dim,
            model.num_layers,
            model.action_dim,
            width,
        )
        self._sizes = sizes
        self.native = native_kernel("SequenceGradient", self.vector.dtype)(
            [0 if w is None else w.data_ptr() for w in weights],
            [0 if w is None else gradients[id(w)].data_ptr() for w in weights],
            sizes,
            model.use_residual,
            NORM_EPS,
        )

    @classmethod
    def of(cls, model: ImprovedSSM, x: Tensor, state: Tensor) -> SequenceGradient | None:
        """One for inputs like these, or None where a graph is needed.

        It is for modules that nobody has changed, a continuous policy whose weights are all
        trained, in float32 or float64 on the CPU, and not for ``norm="state"``.

        Args:
            model: The policy.
            x: Observations ``[S, T, I]``.
            state: ``[L, S, N]``.
        """
        with torch.no_grad():
            is_plain = model.can_step_natively(x[:, 0], state)
        if (
            not is_plain
            or is_replaced(model, ImprovedSSM, ("evaluate_actions",))
            or model.discrete
            or (model.use_layer_norm and model.norm == "state")
            or any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())
            or not has_plain_parameters(model)
        ):
            return None
        return cls(model)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, actions: Tensor, state: Tensor, reset: Tensor, loss: Loss
    ) -> Tensor:
        """Set `vector`.

        Args:
            x: Observations ``[S, T, I]``, normalised.
            actions: ``[S, T, K]``.
            state: ``[L, S, N]``.
            reset: Boolean ``[S, T]``.
            loss: Of the log-probabilities, values and entropies ``[S, T]``.

        Returns:
            What the loss reports.
        """
        S, T, _ = x.shape
        log_std = self.log_std
        self.check(x, actions, state, reset)
        actions = actions.reshape(-1, len(log_std))  # [M, K]
        x, state, reset = x.contiguous(), state.contiguous(), reset.contiguous()
        mean, value = x.new_empty(actions.shape), x.new_empty(S, T)
        self.native.forward(
            x.data_ptr(),
            state.data_ptr(),
            reset.data_ptr(),
            mean.data_ptr(),
            value.data_ptr(),
            S,
            T,
        )
        log_prob = gaussian_log_prob(actions, mean, log_std)  # [M]
        entropy = gaussian_entropy(log_std).expand(S, T)
        report, gradients = loss(log_prob.view(S, T), value, entropy)

        g_log_prob, g_value, *g_entropy = (g.reshape(-1) for g in gradients)  # [M] each
        std = log_std.exp()  # [K]
        deviation = (actions - mean).div_(std)  # [M, K]
        weighted = deviation * g_log_prob.unsqueeze(1)  # [M, K]
        g_log_std = torch.linalg.vecdot(weighted, deviation, dim=0) - g_log_prob.sum()
        self.log_std_gradient.copy_(g_log_std + sum(g.sum() for g in g_entropy))
        g_mean, g_value = weighted.div_(std), g_value.to(x.dtype).contiguous()  # [M, K], [M]
        self.native.backward(g_mean.data_ptr(), g_value.data_ptr())
        return report

    def check(self, x: Tensor, actions: Tensor, state: Tensor, reset: Tensor) -> None:
        """Raise where the native calls cannot rely on shapes and dtypes; arguments as of a call."""
        S, T, _ = x.shape
        I, _, N, L, K, _ = self._sizes
        expected = {
            "x": (x, (S, T, I), self.vector.dtype),
            "actions": (actions, (S, T, K), self.vector.dtype),
            "state": (state, (L, S, N), self.vector.dtype),
            "reset": (reset, (S, T), torch.bool),
        }
        for name, (tensor, shape, dtype) in expected.items():
            if tensor.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype != dtype:
                raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")


def _weights(model: ImprovedSSM) -> list[Tensor | None]:
    """The weights in the order of the native class."""
    encoder, actor, critic, network = (
        model.encoder,
        model.actor,
        model.critic,
        model.critic_network,
    )
    heads: list[Tensor | None] = [
        encoder.weight,
        encoder.bias,
        actor.weight,
        actor.bias,
        critic.weight,
        critic.bias,
    ]
    if network is None:
        heads += [None] * 5
    else:
        observations, hidden = network.observations, network.hidden
        heads += [observations.weight, network.features.weight, observations.bias]
        heads += [hidden.weight, hidden.bias]
    for layer in cast("list[SSMLayer]", list(model.layers)):
        norm = layer.norm
        affine = (None, None) if norm is None else (norm.weight, norm.bias)
        heads += [layer.A, layer.B, layer.bias, layer.C, layer.D, *affine]
    return heads


def has_plain_parameters(model: ImprovedSSM) -> bool:
    """Whether all that we gave it are there, trained, in one place, and nobody watches their gradients."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    distinct = {id(p) for _, p in parameters}
    return (
        len(distinct) == len(parameters)
        and all(p.requires_grad and not p._backward_hooks for _, p in parameters)
        and all(bias is not None for bias in _biases(model))
    )


def _biases(model: ImprovedSSM) -> list[Tensor | None]:
    """Those that a model as we made it has."""
    linears: list[nn.Linear] = [model.encoder, model.actor, model.critic]
    if (network := model.critic_network) is not None:
        linears += [network.observations, network.hidden]
    layers = cast("list[SSMLayer]", list(model.layers))
    return [*(linear.bias for linear in linears), *(layer.bias for layer in layers)]
