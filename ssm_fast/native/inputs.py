"""What tensors have to be for a native call to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssm_fast._torch import is_plain

Expected = tuple[Any, Sequence[int], torch.dtype | None]


def misfit(**tensors: Expected) -> Exception | None:
    """The error of the first tensor that is not as expected.

    Args:
        tensors: By name: a tensor, or None for one that is left out; its shape; its dtype, None for any
            that has no imaginary part.

    Returns:
        A ValueError, a TypeError for a dtype or a tensor that is no plain one on the CPU, or None.
    """
    for name, (x, shape, dtype) in tensors.items():
        if x is None:
            continue
        if type(x) not in (Tensor, nn.Parameter) or not is_plain(
            x
        ):  # a subclass may see to its use
            return TypeError(f"{name} must be a plain tensor on the CPU")
        if x.shape != torch.Size(shape):
            return ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
        if x.is_complex() if dtype is None else x.dtype != dtype:
            return TypeError(f"{name} must have dtype {dtype or 'float'}, got {x.dtype}")
    return None


def whole_numbers(name: str, x: Tensor, count: int) -> Tensor:
    """Labels as native code reads them: int64, contiguous.

    Raises:
        TypeError: They are no integers.
        ValueError: One lies outside ``[0, count)``.
    """
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    if x.numel() and (int(x.min()) < 0 or int(x.max()) >= count):
        raise ValueError(f"{name} must lie in [0, {count})")
    return x.long().contiguous()
