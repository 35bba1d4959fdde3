"""The maths of LayerNorm that the norms of states and outputs share, as torch calls."""

from __future__ import annotations

from torch import Tensor


def normalised(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``n = (z - mean) rstd`` and ``rstd``, over the last dimension; ``rstd`` keeps it, of size 1.

    Written out: torch's layer_norm has wrong derivatives of third order.
    """
    centred = z - z.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def project_norm(x: Tensor, n: Tensor, rstd: Tensor) -> Tensor:
    """The (symmetric) Jacobian of the norm, ``rstd (x - mean(x) - n mean(x n))``."""
    return (x - x.mean(-1, keepdim=True) - n * (x * n).mean(-1, keepdim=True)) * rstd
