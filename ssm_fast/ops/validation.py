"""What ops check before a kernel runs, and the errors they raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_fast.ops.dispatch import COMPLEX, HALF, REAL, is_interpreting


def in_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the dtypes of operations on a tensor."""
    kind = x.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise TypeError unless ``x`` has the dtype of the parameters, or autocast chooses the dtypes."""
    if x.dtype != weight.dtype and not (x.dtype in HALF and in_autocast(x)):
        raise TypeError(
            f"{name} must have the parameters' dtype {weight.dtype}, got {x.dtype}: convert it, or use "
            "torch.autocast"
        )


def check_shape(name: str, tensor: Tensor, symbols: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``tensor`` has ``shape``, spelled ``symbols`` in the message."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{name} must have shape {symbols} = {list(shape)}, got {list(tensor.shape)}"
        )


def check_dtypes(
    op: str, tensors: Mapping[str, Tensor | None], *, complex_too: bool = False
) -> None:
    """Raise TypeError unless all tensors share one floating dtype and ValueError unless one device.

    The first tensor, which must be there, sets what the others must be.
    """
    first_name = next(iter(tensors))
    first = tensors[first_name]
    assert first is not None
    allowed = REAL | COMPLEX if complex_too else REAL
    if first.is_cuda or is_interpreting():
        allowed = allowed | HALF
    if first.dtype not in allowed:
        remedy = (
            ": on the CPU, keep float32 (torch.autocast does so for the recurrences)"
            if first.dtype in HALF
            else ""
        )
        raise TypeError(
            f"{first_name} of {op} must be {' or '.join(allowed.values())}, got {first.dtype}{remedy}"
        )
    for name, tensor in tensors.items():
        if tensor is None or tensor is first:
            continue
        if tensor.dtype is not first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}"
            )


def check_tensors(**values: object) -> None:
    """Raise TypeError unless every value is a tensor, or None for an argument that may be."""
    for name, value in values.items():
        if value is None and name in ("s0", "h0"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def promoted(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors; under `torch.autocast`, which runs recurrences in float32, no halves among them."""
    for x in tensors:
        if x is not None and x.device.type in ("cpu", "cuda"):
            if not torch.is_autocast_enabled(x.device.type):
                return tensors
            break
    return tuple(x if x is None or x.dtype not in HALF else x.float() for x in tensors)


def check_reset(reset: Tensor, batch: Tensor, symbols: str, shape: Sequence[int]) -> Tensor:
    """Validate episode starts and return them as booleans."""
    check_tensors(reset=reset)
    check_shape("reset", reset, symbols, shape)
    if reset.is_complex():
        raise TypeError(f"reset must be boolean, integer or floating, got {reset.dtype}")
    if reset.device != batch.device:
        raise ValueError(f"reset must be on the device of u, {batch.device}, got {reset.device}")
    return reset if reset.dtype == torch.bool else reset != 0
