"""The dense cell: a linear recurrence with a full transition matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_fast.nn.cells.cell import Cell
from ssm_fast.nn.fused import product
from ssm_fast.nn.parameters import matrix_growth, orthogonal_, unit_variance_
from ssm_fast.nn.stages import Stage, Unplanned
from ssm_fast.ops import dense_scan

if TYPE_CHECKING:
    from ssm_fast.nn.ssm_layer import SSMLayer


class DenseCell(Cell):
    """``s_t = A (m_t s_{t-1}) + B x_t + bias``, ``y_t = C s_t + D x_t``.

    A ``[N, N]`` starts as an orthogonal matrix times ``spectral_radius``; B ``[N, I]``, C ``[H, N]`` and D
    ``[H, I]`` start (semi-)orthogonal, scaled so that white input of unit variance gives a drive ``B x``,
    and without a norm an output, of unit variance.
    """

    transition_parameters: ClassVar[Sequence[str]] = ("A",)
    recurrent_parameters: ClassVar[Sequence[str]] = ("A", "B", "bias", "C")

    def make_parameters(  # noqa: D102
        self, layer: SSMLayer, bias: bool, parameter: Callable[..., nn.Parameter]
    ) -> None:
        I, H, N = layer.input_size, layer.hidden_size, layer.state_size
        layer.A = parameter(N, N)
        layer.B = parameter(N, I)
        layer.C = parameter(H, N)
        layer.D = parameter(H, I)
        layer.register_parameter("bias", parameter(N) if bias else None)

    def reset_parameters(self, layer: SSMLayer) -> None:  # noqa: D102
        # A unit-variance drive gives a state of variance 1 / (1 - radius^2); the two summands of y
        # share its unit variance equally.
        radius = layer.spectral_radius
        state_std = 1.0 if self.normalizes_state else 1.0 / math.sqrt(1.0 - radius**2)
        orthogonal_(layer.A, radius)
        unit_variance_(layer.B, 1.0)
        unit_variance_(layer.C, math.sqrt(0.5) / state_std)
        unit_variance_(layer.D, math.sqrt(0.5))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def states(  # noqa: D102
        self,
        layer: SSMLayer,
        x: Tensor,
        s0: Tensor | None,
        reset: Tensor | None,
        batch_first: bool,
        restart: Tensor | None,
    ) -> Tensor:
        u = product(x, layer.B, layer.bias)  # [B, T, N] or [T, B, N]
        if reset is not None and restart is not None:
            # The scan zeroes the state there, so that A r comes in with the drive.
            r = restart.masked_fill((reset == 0).unsqueeze(-1), 0.0)  # [B, T, N] or [T, B, N]
            u = product(r, layer.A, add=u)
        if batch_first:
            return self.scan(layer, u, s0, reset)
        reset = None if reset is None else reset.transpose(0, 1)  # [B, T]
        return self.scan(layer, u.transpose(0, 1), s0, reset).transpose(0, 1)  # [T, B, N]

    def scan(self, layer: SSMLayer, u: Tensor, s0: Tensor | None, reset: Tensor | None) -> Tensor:
        """States ``[B, T, N]`` from drives ``[B, T, N]``."""
        return dense_scan(u, layer.A, s0, reset)

    def outputs(self, layer: SSMLayer, s: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        return product(s, layer.C, add=product(x, layer.D))  # [..., H]

    def step(self, layer: SSMLayer, x: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        s = self.next_state(layer, x, s)  # [B, N]
        return torch.addmm(F.linear(x, layer.D), s, layer.C.t()), s  # [B, H], [B, N]

    def next_state(self, layer: SSMLayer, x: Tensor, s: Tensor | None) -> Tensor:
        """The state ``[B, N]`` after ``s``."""
        u = F.linear(x, layer.B, layer.bias)  # [B, N]
        return u if s is None else torch.addmm(u, s, layer.A.t())

    def stage(self, layer: SSMLayer, name: str) -> Stage:  # noqa: D102
        if type(self) is not DenseCell:
            raise Unplanned(f"the cell of {name} is a {type(self).__name__}, not a DenseCell")
        return self.stage_with(layer, (None, None), 0.0)

    def stage_with(
        self, layer: SSMLayer, norm: tuple[Tensor | None, Tensor | None], eps: float
    ) -> Stage:
        """The stage with the weight and bias of a norm of the state, if there is one."""
        I, H, N = layer.input_size, layer.hidden_size, layer.state_size
        parameters = [
            (layer.A, (N, N)),
            (layer.B, (N, I)),
            (layer.bias, (N,)),
            (layer.C, (H, N)),
            (layer.D, (H, I)),
            *((p, (N,)) for p in norm),
        ]
        return Stage("dense", I, H, parameters, state=N, eps=eps)

    def growth(self, layer: SSMLayer, steps: int) -> float:  # noqa: D102
        return matrix_growth(layer.A, steps)
