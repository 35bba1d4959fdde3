"""What every recurrent cell promises: a new cell is one more loop in `LOOPS`.

`test_cells.py` checks the promises for each cell of ``ssm_fast.nn.cells`` with each norm it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from layer_references import Array, layer_loop
from torch import Tensor

from ssm_fast.nn import SSMLayer
from ssm_fast.nn.cells import CELLS, WITH_STATE_NORM

# Outputs [B, T, H] and states [B, T, N] by (weights, x, s0, reset, norm), in NumPy and float64.
LOOPS: dict[str, Callable[..., tuple[Array, Array]]] = {"dense": layer_loop}

RESETS: dict[str, list[int] | slice] = {
    "none": [],
    "first": [0],
    "last": [-1],
    "consecutive": [1, 2],
    "all": slice(None),
}


@dataclass(frozen=True)
class Case:
    """A layer of one cell, with one norm."""

    cell: str
    norm: Any
    bias: bool = True

    def make(
        self,
        I: int = 3,
        H: int = 5,
        N: int = 4,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> SSMLayer:
        """Every parameter is random, also those that start at 0 or 1."""
        torch.manual_seed(seed)
        layer = SSMLayer(I, H, N, self.bias, self.norm, cell=self.cell, dtype=dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        return layer

    def __str__(self) -> str:
        return f"{self.cell}-{self.norm}{'' if self.bias else '-no_bias'}"


def sequence(
    layer: SSMLayer, B: int = 3, T: int = 6, resets: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, a state from before them, and the episode starts of every other row."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, layer.input_size, dtype=torch.float64, generator=generator)
    s0 = torch.randn(B, layer.state_size, dtype=torch.float64, generator=generator)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[::2, RESETS[resets]] = True
    dtype = next(layer.parameters()).dtype
    return x.to(dtype), s0.to(dtype), reset


CASES = [
    *(Case(cell, norm) for cell in CELLS for norm in (None, "output")),
    *(Case(cell, "state") for cell in WITH_STATE_NORM),
]
NO_BIAS = [Case(case.cell, case.norm, bias=False) for case in CASES]

every_cell = pytest.mark.parametrize("case", CASES, ids=str)
with_and_without_bias = pytest.mark.parametrize("case", CASES + NO_BIAS, ids=str)
every_reset = pytest.mark.parametrize("resets", RESETS)
