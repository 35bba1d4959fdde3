"""The norm cell: the dense recurrence with a LayerNorm of its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssm_fast.nn.cells.dense import DenseCell
from ssm_fast.nn.fused import is_changed, layer_norm
from ssm_fast.nn.stages import Stage, Unplanned, layer_norm_parameters
from ssm_fast.ops import norm_scan

if TYPE_CHECKING:
    from ssm_fast.nn.ssm_layer import SSMLayer


class NormCell(DenseCell):
    """``s_t = LN(A (m_t s_{t-1}) + B x_t + bias)``, ``y_t = C s_t + D x_t``."""

    recurrent_parameters = (*DenseCell.recurrent_parameters, "norm.weight", "norm.bias")
    normalizes_state = True

    def make_parameters(  # noqa: D102
        self, layer: SSMLayer, bias: bool, parameter: Callable[..., nn.Parameter]
    ) -> None:
        super().make_parameters(layer, bias, parameter)
        layer.norm = nn.LayerNorm(layer.state_size, device=layer.A.device, dtype=layer.A.dtype)

    def scan(  # noqa: D102
        self, layer: SSMLayer, u: Tensor, s0: Tensor | None, reset: Tensor | None
    ) -> Tensor:
        norm = layer.norm
        if norm is None:
            return super().scan(layer, u, s0, reset)
        if is_changed(norm):
            return self._scan_by_steps(layer, norm, u, s0, reset)
        return norm_scan(u, layer.A, norm.weight, norm.bias, s0, reset, norm.eps)  # [B, T, N]

    def _scan_by_steps(
        self, layer: SSMLayer, norm: nn.Module, u: Tensor, s: Tensor | None, reset: Tensor | None
    ) -> Tensor:
        """With a norm that has to be called: one with hooks, or of another class."""
        states = []
        for t in range(u.shape[1]):
            if s is not None and reset is not None:
                s = s.masked_fill(reset[:, t].bool().unsqueeze(1), 0.0)  # [B, N]
            s = norm(u[:, t] if s is None else torch.addmm(u[:, t], s, layer.A.t()))  # [B, N]
            states.append(s)
        return torch.stack(states, 1) if states else u

    def next_state(self, layer: SSMLayer, x: Tensor, s: Tensor | None) -> Tensor:  # noqa: D102
        z = super().next_state(layer, x, s)  # [B, N]
        return z if layer.norm is None else layer_norm(layer.norm, z)

    def stage(self, layer: SSMLayer, name: str) -> Stage:  # noqa: D102
        if type(self) is not NormCell:
            raise Unplanned(f"the cell of {name} is a {type(self).__name__}, not a NormCell")
        weight, bias, eps = layer_norm_parameters(f"{name}.norm", layer.norm)
        return self.stage_with(layer, (weight, bias), eps)

    def growth(self, layer: SSMLayer, steps: int) -> float:  # noqa: D102
        return 0.0
