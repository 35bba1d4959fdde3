"""The gradient of an actor-critic over sequences, written out: no graph and no bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ssm_fast.core.improved_ssm import (
    NORM_EPS,
    ImprovedSSM,
    gaussian_entropy,
    gaussian_log_prob,
)
from ssm_fast.nn.ssm_layer import SSMLayer
from ssm_fast.ops.dense_scan import matrix_gradient, sweep
from ssm_fast.ops.output_norm import run_output_norm, run_output_norm_grad

# Of log-probabilities, values and entropies, [S, T] each: what to report, and the gradients of a
# loss with respect to them, in this order (entropies may be left out).
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Sequence[Tensor]]]


class SequenceGradient:
    """`ImprovedSSM.evaluate_actions` and the gradient of a loss of it, in one call.

    With the forward pass of `ImprovedSSM`, ``y^l = C s^l + D h^{l-1}`` before norm and tanh, and
    ``g`` for the gradient with respect to the variable that it is written with::

        g h^L = (g mean) W_a + (g value) W_c
        g y^l = output_norm's gradient at g h^l
        g s^l = (g y^l) C,   g u^l the adjoint scan of g s^l
        g h^{l-1} = (g y^l) D + (g u^l) B + g h^l                  the last one if use_residual

    and of each matrix the product of what it gives with what it takes. A minibatch of PPO is so small
    that autograd's graph takes longer than these products.

    Made by `of`. The values of the weights are read at each call; no other tensor may take the place
    of one.

    Attributes:
        vector: The gradient ``[P]``, in the order of ``model.parameters()``; the next call
            overwrites it.
    """

    vector: Tensor

    def __init__(self, model: ImprovedSSM) -> None:
        parameters = list(model.parameters())
        self.vector = torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])  # [P]
        sizes = [p.numel() for p in parameters]
        views = torch.split(self.vector, sizes)
        self._of = {id(p): v.view_as(p) for p, v in zip(parameters, views, strict=True)}
        self._model = model
        self._layers = cast("list[SSMLayer]", list(model.layers))

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
        layers = cast("list[SSMLayer]", list(model.layers))
        if (
            not is_plain
            or type(model).evaluate_actions is not ImprovedSSM.evaluate_actions
            or "evaluate_actions" in vars(model)
            or model.discrete
            or (model.use_layer_norm and model.norm == "state")
            or any(layer.bias is None for layer in layers)
            or not all(p.requires_grad for p in model.parameters())
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
        model, of = self._model, self._of
        S, T, I = x.shape
        encoder, actor, critic, log_std = model.encoder, model.actor, model.critic, model.log_std
        assert log_std is not None
        x, actions = x.reshape(-1, I), actions.reshape(-1, model.action_dim)  # [M, I], [M, K]
        z = torch.addmm(encoder.bias, x, encoder.weight.t())  # [M, H]
        h, *z_moments = run_output_norm(z, None, None, None, NORM_EPS, True, True)
        kept = []
        for layer, s0 in zip(self._layers, state, strict=True):
            assert layer.bias is not None
            u = torch.addmm(layer.bias, h, layer.B.t()).view(S, T, -1)  # [S, T, N]
            s = sweep(u, layer.A, s0, reset)  # [S, T, N]
            y = torch.mm(h, layer.D.t()).addmm_(s.reshape(len(h), -1), layer.C.t())  # [M, H]
            weight, bias = _affine(layer.norm)
            residual = h if model.use_residual else None
            out, *moments = run_output_norm(y, weight, bias, residual, NORM_EPS, True, True)
            kept.append((h, s, y, moments))
            h = out
        mean = torch.addmm(actor.bias, h, actor.weight.t())  # [M, K]
        value = torch.addmv(critic.bias, h, critic.weight[0])  # [M]
        log_prob = gaussian_log_prob(actions, mean, log_std)  # [M]
        entropy = gaussian_entropy(log_std).expand(S, T)
        report, gradients = loss(log_prob.view(S, T), value.view(S, T), entropy)

        g_log_prob, g_value, *g_entropy = (g.reshape(-1) for g in gradients)  # [M] each
        deviation = (actions - mean) / log_std.exp()  # [M, K]
        weighted = deviation * g_log_prob.unsqueeze(1)  # [M, K]
        g_log_std = (weighted * deviation).sum(0) - g_log_prob.sum()
        of[id(log_std)].copy_(g_log_std + sum(g.sum() for g in g_entropy))
        g_mean = weighted / log_std.exp()  # [M, K]
        self._linear(actor, g_mean, h)
        self._linear(critic, g_value.unsqueeze(1), h)
        g_h = torch.mm(g_mean, actor.weight).addr_(g_value, critic.weight[0])  # [M, H]
        for layer, s0, (h, s, y, moments) in zip(
            reversed(self._layers), reversed(state.unbind()), reversed(kept), strict=True
        ):
            weight, bias = _affine(layer.norm)
            g_y, g_weight, g_bias = run_output_norm_grad(g_h, y, weight, bias, *moments, True)
            if weight is not None and bias is not None:
                of[id(weight)].copy_(g_weight)
                of[id(bias)].copy_(g_bias)
            torch.mm(g_y.t(), s.reshape(len(h), -1), out=of[id(layer.C)])
            torch.mm(g_y.t(), h, out=of[id(layer.D)])
            g_s = torch.mm(g_y, layer.C).view(S, T, -1)  # [S, T, N]
            g_u = sweep(g_s, layer.A.t(), None, reset, reverse=True)  # [S, T, N]
            of[id(layer.A)].copy_(matrix_gradient(g_u, s, s0, reset))
            g_u = g_u.reshape(len(h), -1)  # [M, N]
            torch.mm(g_u.t(), h, out=of[id(layer.B)])
            torch.sum(g_u, 0, out=of[id(layer.bias)])
            g_in = torch.mm(g_y, layer.D).addmm_(g_u, layer.B)  # [M, H]
            g_h = g_in.add_(g_h) if model.use_residual else g_in
        g_z, *_ = run_output_norm_grad(g_h, z, None, None, *z_moments, True)
        self._linear(encoder, g_z, x)
        return report

    def _linear(self, module: torch.nn.Linear, g: Tensor, x: Tensor) -> None:
        """The gradients of weight and bias of a linear layer."""
        torch.mm(g.t(), x, out=self._of[id(module.weight)])
        torch.sum(g, 0, out=self._of[id(module.bias)])


def _affine(norm: torch.nn.LayerNorm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)
