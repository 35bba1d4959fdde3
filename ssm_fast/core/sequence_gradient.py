"""The gradient of an actor-critic over sequences, written out: no graph and no bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from ssm_fast.core.improved_ssm import (
    NORM_EPS,
    ImprovedSSM,
    gaussian_entropy,
    gaussian_log_prob,
)
from ssm_fast.nn.ssm_layer import SSMLayer
from ssm_fast.ops.dense_scan import matrix_gradient, sweep
from ssm_fast.ops.linear import run_linear, run_linear_grad
from ssm_fast.ops.output_norm import run_output_norm, run_output_norm_grad

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
    """

    vector: Tensor

    def __init__(self, model: ImprovedSSM) -> None:
        parameters = list(model.parameters())
        self.vector = torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])  # [P]
        views = torch.split(self.vector, [p.numel() for p in parameters])
        gradients = {id(p): v.view_as(p) for p, v in zip(parameters, views, strict=True)}

        def pair(weight: Tensor | None) -> _Weight | None:
            return None if weight is None else _Weight(weight.detach(), gradients[id(weight)])

        def linear(module: nn.Linear) -> _Linear:
            return _Linear(_must(pair(module.weight)), _must(pair(module.bias)))

        assert model.log_std is not None
        self._log_std = _must(pair(model.log_std))
        self._encoder, self._actor = linear(model.encoder), linear(model.actor)
        self._critic = linear(model.critic)
        self._network = None
        if (network := model.critic_network) is not None:
            self._network = _Network(
                linear(network.observations),
                _must(pair(network.features.weight)),
                linear(network.hidden),
            )
        self._layers = []
        for layer in cast("list[SSMLayer]", list(model.layers)):
            A, B, bias, C, D = (
                _must(pair(x)) for x in (layer.A, layer.B, layer.bias, layer.C, layer.D)
            )
            norm = layer.norm
            affine = (None, None) if norm is None else (pair(norm.weight), pair(norm.bias))
            self._layers.append(_Layer(A, B, bias, C, D, *affine))
        self._use_residual = model.use_residual

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
            or type(model).evaluate_actions is not ImprovedSSM.evaluate_actions
            or "evaluate_actions" in vars(model)
            or model.discrete
            or (model.use_layer_norm and model.norm == "state")
            or any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())
            or not _are_plain(list(model.named_parameters(remove_duplicate=False)))
            or any(bias is None for bias in _biases(model))
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
        S, T, I = x.shape
        encoder, actor, critic = self._encoder, self._actor, self._critic
        log_std = self._log_std.value
        x, actions = x.reshape(-1, I), actions.reshape(-1, len(log_std))  # [M, I], [M, K]
        M = len(x)
        encoded = h = encoder.tanh(x)  # [M, H]
        kept = []
        for layer, s0 in zip(self._layers, state, strict=True):
            u = layer.B.times(h, layer.bias)  # [M, N]
            s = sweep(u.view(S, T, -1), layer.A.value, s0, reset)  # [S, T, N]
            y = layer.C.times(s.reshape(M, -1), add=layer.D.times(h))  # [M, H]
            weight, bias = layer.affine
            residual = h if self._use_residual else None
            out, *moments = run_output_norm(y, weight, bias, residual, NORM_EPS, True, True)
            kept.append((h, s, y, moments))
            h = out
        mean = actor(h)  # [M, K]
        v = h if self._network is None else self._network(x, h)  # [M, H or W]
        value = critic(v).squeeze(1)  # [M]
        log_prob = gaussian_log_prob(actions, mean, log_std)  # [M]
        entropy = gaussian_entropy(log_std).expand(S, T)
        report, gradients = loss(log_prob.view(S, T), value.view(S, T), entropy)

        g_log_prob, g_value, *g_entropy = (g.reshape(-1) for g in gradients)  # [M] each
        deviation = (actions - mean).div_(log_std.exp())  # [M, K]
        weighted = deviation * g_log_prob.unsqueeze(1)  # [M, K]
        g_log_std = torch.linalg.vecdot(weighted, deviation, dim=0) - g_log_prob.sum()
        self._log_std.gradient.copy_(g_log_std + sum(g.sum() for g in g_entropy))
        g_mean, g_value = weighted.div_(log_std.exp()), g_value.unsqueeze(1)  # [M, K], [M, 1]
        actor.give(g_mean, h)
        critic.give(g_value, v)
        g_h = torch.mm(g_mean, actor.weight.value)  # [M, H]
        if self._network is None:
            g_h.addmm_(g_value, critic.weight.value)
        else:
            self._network.give(torch.mm(g_value, critic.weight.value))
        for layer, s0, (h, s, y, moments) in zip(
            reversed(self._layers), reversed(state.unbind()), reversed(kept), strict=True
        ):
            g_y, *g_affine = run_output_norm_grad(g_h, y, *layer.affine, *moments, True)
            for pair, gradient in zip((layer.norm_weight, layer.norm_bias), g_affine, strict=True):
                if pair is not None:
                    pair.gradient.copy_(gradient)
            g_s = layer.C.give(g_y, s.reshape(M, -1)).view(S, T, -1)  # [S, T, N]
            g_u = sweep(g_s, layer.A.transposed, None, reset, reverse=True)  # [S, T, N]
            layer.A.gradient.copy_(matrix_gradient(g_u, s, s0, reset))
            g_in = layer.D.give(g_y, h)  # [M, H]
            g_in += layer.B.give(g_u.reshape(M, -1), h, layer.bias)
            g_h = g_in.add_(g_h) if self._use_residual else g_in
        encoder.give_tanh(g_h, encoded, x)
        return report


class _Weight:
    """A weight and where its gradient goes."""

    def __init__(self, value: Tensor, gradient: Tensor) -> None:
        self.value = value
        self.gradient = gradient
        self.transposed = value.t()

    def times(self, x: Tensor, bias: _Weight | None = None, add: Tensor | None = None) -> Tensor:
        """``x Wᵀ [+ bias] [+ add]``, ``[M, O]`` from rows ``[M, I]``."""
        offset = None if bias is None else bias.value.unsqueeze(0)
        add = None if add is None else add.unsqueeze(0)
        return run_linear(x.unsqueeze(0), self.value.unsqueeze(0), offset, add, False)[0]

    def give(self, g: Tensor, x: Tensor, bias: _Weight | None = None) -> Tensor:
        """Sets the gradients from that of `times`, and returns that of ``x``."""
        g_x, g_weight, g_bias = run_linear_grad(
            g.unsqueeze(0),
            None,
            x.unsqueeze(0),
            self.value.unsqueeze(0),
            True,
            True,
            bias is not None,
        )
        self.gradient.copy_(g_weight[0])
        if bias is not None:
            bias.gradient.copy_(g_bias[0])
        return g_x[0]


class _Linear:
    """A linear layer."""

    def __init__(self, weight: _Weight, bias: _Weight) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias.value, x, self.weight.transposed)

    def give(self, g: Tensor, x: Tensor) -> None:
        """Sets the gradients, from that of what it gave for ``x``."""
        torch.mm(g.t(), x, out=self.weight.gradient)
        torch.sum(g, 0, out=self.bias.gradient)

    def tanh(self, x: Tensor) -> Tensor:
        """The hyperbolic tangent of the layer."""
        weight, bias = self.weight.value.unsqueeze(0), self.bias.value.unsqueeze(0)
        return run_linear(x.unsqueeze(0), weight, bias, None, True)[0]

    def give_tanh(self, g: Tensor, y: Tensor, x: Tensor) -> None:
        """Sets the gradients, from that of ``y``, which `tanh` gave for ``x``."""
        weight = self.weight.value.unsqueeze(0)
        _, g_weight, g_bias = run_linear_grad(
            g.unsqueeze(0), y.unsqueeze(0), x.unsqueeze(0), weight, False, True, True
        )
        self.weight.gradient.copy_(g_weight[0])
        self.bias.gradient.copy_(g_bias[0])


class _Network:
    """A critic's network; it keeps what it was called with."""

    def __init__(self, observations: _Linear, features: _Weight, hidden: _Linear) -> None:
        self.observations = observations
        self.features = features
        self.hidden = hidden

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        first = self.observations(x).addmm_(h, self.features.transposed).tanh_()  # [M, W]
        second = self.hidden(first).tanh_()  # [M, W]
        self._kept = x, h, first, second
        return second

    def give(self, g: Tensor) -> None:
        """Sets the gradients, from that of what it gave."""
        x, h, first, second = self._kept
        g = torch.ops.aten.tanh_backward(g, second)  # [M, W]
        self.hidden.give(g, first)
        g = torch.mm(g, self.hidden.weight.value)
        g = torch.ops.aten.tanh_backward(g, first)  # [M, W]
        self.observations.give(g, x)
        torch.mm(g.t(), h, out=self.features.gradient)


class _Layer:
    """A state-space layer."""

    def __init__(
        self,
        A: _Weight,
        B: _Weight,
        bias: _Weight,
        C: _Weight,
        D: _Weight,
        norm_weight: _Weight | None,
        norm_bias: _Weight | None,
    ) -> None:
        self.A, self.B, self.bias, self.C, self.D = A, B, bias, C, D
        self.norm_weight, self.norm_bias = norm_weight, norm_bias

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The values of weight and bias of the norm."""
        weight, bias = self.norm_weight, self.norm_bias
        return None if weight is None else weight.value, None if bias is None else bias.value


def _are_plain(parameters: list[tuple[str, nn.Parameter]]) -> bool:
    """Whether all are trained, each stands in one place, and nobody watches their gradients."""
    distinct = {id(p) for _, p in parameters}
    return len(distinct) == len(parameters) and all(
        p.requires_grad and not p._backward_hooks for _, p in parameters
    )


def _biases(model: ImprovedSSM) -> list[Tensor | None]:
    """Those that a model as we made it has."""
    linears: list[nn.Linear] = [model.encoder, model.actor, model.critic]
    if (network := model.critic_network) is not None:
        linears += [network.observations, network.hidden]
    layers = cast("list[SSMLayer]", list(model.layers))
    return [*(linear.bias for linear in linears), *(layer.bias for layer in layers)]


def _must(weight: _Weight | None) -> _Weight:
    assert weight is not None
    return weight
