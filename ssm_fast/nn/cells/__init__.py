"""The recurrences of a layer, a module each, and their names."""

from __future__ import annotations

from ssm_fast.nn.cells.cell import Cell
from ssm_fast.nn.cells.dense import DenseCell
from ssm_fast.nn.cells.norm import NormCell

CELLS: dict[str, Cell] = {"dense": DenseCell()}
WITH_STATE_NORM: dict[str, Cell] = {"dense": NormCell()}  # norm="state"


def cell_of(name: str, norm: str | None) -> Cell:
    """The cell of a layer.

    Raises:
        ValueError: The name is unknown, ``norm`` is, or the cell has no norm of its state.
    """
    if norm not in (None, "output", "state"):
        raise ValueError(f"norm must be None, 'output' or 'state', got {norm!r}")
    if name not in CELLS:
        raise ValueError(f"cell must be one of {sorted(CELLS)}, got {name!r}")
    if norm != "state":
        return CELLS[name]
    if name not in WITH_STATE_NORM:
        raise ValueError(f"norm must be None or 'output' with cell={name!r}, got 'state'")
    return WITH_STATE_NORM[name]
