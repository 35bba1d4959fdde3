"""How parameters begin, and the learning rates that modules declare for them."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor, nn

SPECTRAL_RADIUS = 0.9  # of transition matrices at first
RECURRENT_LR_SCALE = 0.1


def learning_rate_scales(
    model: nn.Module, scale: float = RECURRENT_LR_SCALE, *, around: bool = False
) -> dict[str, float]:
    """The part of the learning rate at which each parameter of a model learns.

    A step that is small for other weights takes an eigenvalue of a transition matrix beyond 1, where
    the state grows until it overflows. A module declares such weights by name in
    ``transition_parameters``, and all that lead into its state, through it and out of it in
    ``recurrent_parameters``.

    Args:
        model: Any module.
        scale: Of the parameters that are declared; all others have 1.
        around: Scale all ``recurrent_parameters``, not only the transitions.

    Returns:
        The scale of every parameter, by its name in ``named_parameters()``.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        attribute = "recurrent_parameters" if around else "transition_parameters"
        for own in getattr(module, attribute, ()):
            name = f"{prefix}.{own}" if prefix else own
            if name in scales:
                scales[name] = scale
    return scales


def orthogonal_(weight: Tensor, gain: float) -> None:
    """Fill a matrix with a (semi-)orthogonal one times ``gain``, whatever its dtype."""
    # QR exists for float32 and float64 only.
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    q = torch.empty(weight.shape, device=weight.device, dtype=dtype)
    nn.init.orthogonal_(q, gain)
    with torch.no_grad():
        weight.copy_(q)


def unit_variance_(weight: Tensor, std: float) -> None:
    """Fill ``[out, in]`` so that inputs of unit variance give outputs of variance ``std^2``."""
    n_out, n_in = weight.shape
    orthogonal_(weight, std * math.sqrt(max(1.0, n_out / n_in)))


def matrix_growth(A: Tensor, steps: int) -> float:
    """The norm of the power of a transition matrix that ``steps`` steps apply."""
    norm = torch.linalg.matrix_power(A.detach().float(), steps).norm()
    return float(norm.nan_to_num(nan=math.inf, posinf=math.inf))


def check_radius(spectral_radius: float) -> float:
    """Returns a spectral radius at which states fade."""
    if isinstance(spectral_radius, bool) or not isinstance(spectral_radius, numbers.Real):
        raise TypeError(f"spectral_radius must be a number, got {type(spectral_radius).__name__}")
    if not 0.0 <= spectral_radius < 1.0:
        raise ValueError(f"spectral_radius must be in [0, 1), got {spectral_radius}")
    return float(spectral_radius)
