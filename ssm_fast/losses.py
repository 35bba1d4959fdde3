"""The losses of supervised targets, worded once for the whole package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_fast.nn.fused import is_untouched


def default_loss(name: str, targets: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared error, or the cross entropy of integers, as ``(output, target) -> scalar``.

    Args:
        name: Of the targets, for the messages.
        targets: All that the loss will be asked for. Their range is looked at here, once: under
            ``vmap`` a single one cannot be read.

    Returns:
        A loss of an output ``[..., K]`` and a target of its shape, or integers ``[...]`` in
        ``[0, K)``. It raises ValueError where a shape or an integer does not fit, and TypeError
        where a floating dtype does not.

    Raises:
        ValueError: There are no targets.
        TypeError: The targets are no tensor, or hold neither floats nor integers.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"{name} must be a tensor where loss_fn is None, got {type(targets).__name__}"
        )
    if targets.is_floating_point():
        return lambda output, target: _mean_squared_error(name, output, target)
    if targets.dtype == torch.bool or targets.is_complex():
        raise TypeError(f"{name} must hold floats or integers, got {targets.dtype}")
    if targets.numel() == 0:
        raise ValueError(f"{name} is empty, its shape is {list(targets.shape)}")
    low, high = int(targets.min()), int(targets.max())

    def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
        K = output.shape[-1]
        if target.shape != output.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {list(output.shape[:-1])}, as the output without its "
                f"classes, got {list(target.shape)}"
            )
        if low < 0 or high >= K:
            raise ValueError(f"{name} must lie in [0, {K}), got {low} to {high}")
        log_probs = F.log_softmax(output, dim=-1)  # [..., K]
        return -log_probs.gather(-1, target.long().unsqueeze(-1)).mean()

    return cross_entropy


def is_default_loss(loss_fn: Any, targets: Any) -> bool:
    """Whether a loss is the one that `default_loss` gives for such targets.

    That is the case without one, and for torch's mean squared error of targets that hold floats.
    """
    if loss_fn is None:
        return True
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return False
    if type(loss_fn) is nn.MSELoss:
        return loss_fn.reduction == "mean" and is_untouched(loss_fn)
    return loss_fn is F.mse_loss


def _mean_squared_error(name: str, output: Tensor, target: Tensor) -> Tensor:
    if target.shape != output.shape:
        raise ValueError(
            f"{name} must have the output's shape {list(output.shape)}, got {list(target.shape)}"
        )
    if target.dtype != output.dtype:
        raise TypeError(f"{name} must have the output's dtype {output.dtype}, got {target.dtype}")
    return F.mse_loss(output, target)
