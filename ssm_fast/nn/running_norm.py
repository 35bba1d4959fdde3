"""Observation normalisation by running statistics that travel in the state_dict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssm_fast.checks import check_count


class RunningNorm(nn.Module):
    """Normalise features by the mean and variance of everything seen by ``update``.

    ``y = clip((x - mean) / sqrt(var + eps), -clip, clip)``. ``forward`` never changes the
    statistics: they move only in ``update``, so a sequence seen twice is normalised the same way
    unless somebody updated in between. Before the first update it only clips.

    Args:
        num_features: Number of features ``F``.
        clip: Bound of the normalised values.
        eps: Added to the variance.

    Attributes:
        mean: Running mean ``[F]``, float64 whatever dtype the module is moved to.
        var: Running population variance ``[F]``, float64.
        count: Number of observations seen, int64 ``[]``.

    Raises:
        ValueError: If ``num_features`` is less than 1 or ``clip`` or ``eps`` is not positive.
        TypeError: If ``num_features`` is not an integer.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, num_features: int, clip: float = 10.0, eps: float = 1e-8) -> None:
        super().__init__()
        if not clip > 0.0:
            raise ValueError(f"clip must be positive, got {clip}")
        if not eps > 0.0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.num_features = check_count("num_features", num_features)
        self.clip = clip
        self.eps = eps
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("var", torch.ones(num_features, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and clip.

        Args:
            x: Observations ``[..., F]``, floating point.

        Returns:
            Normalised observations ``[..., F]`` in the dtype of ``x``.
        """
        # The float64 statistics promote the arithmetic: a large mean costs no digits.
        y = (x - self.mean) * torch.rsqrt(self.var + self.eps)  # [..., F] float64
        return y.clamp(-self.clip, self.clip).to(x.dtype)  # [..., F]

    def update(self, x: Tensor) -> None:
        """Merge a batch of observations into the statistics.

        Args:
            x: Observations ``[..., F]``; every leading dimension is a batch dimension.

        Raises:
            ValueError: If the last dimension is not ``F`` or a value is not finite; the
                statistics are then untouched.
        """
        self.merge(*self.moments(x))

    @torch.no_grad()
    def moments(self, x: Tensor) -> tuple[int, Tensor, Tensor]:
        """Number, mean ``[F]`` and population variance ``[F]``, float64, of a batch.

        Arguments and errors are those of ``update``, which merges them.
        """
        if x.ndim == 0 or x.shape[-1] != self.num_features:
            raise ValueError(f"x must have shape [..., {self.num_features}], got {list(x.shape)}")
        batch = x.reshape(-1, self.num_features).to(torch.float64)  # [M, F]
        if len(batch) == 0:
            return 0, torch.zeros_like(self.mean), torch.zeros_like(self.var)
        if not bool(torch.isfinite(batch).all()):
            raise ValueError("x must be finite, got NaN or Inf")
        batch_var, batch_mean = torch.var_mean(batch, dim=0, correction=0)  # [F], [F]
        return len(batch), batch_mean, batch_var

    @torch.no_grad()
    def merge(self, count: int, mean: Tensor, var: Tensor) -> None:
        """Merge the moments of a batch into the statistics.

        The parallel formula of Chan, Golub and LeVeque (1979): with counts ``n``, ``m`` and
        ``δ = mean_m - mean_n``, ``M2 = M2_n + M2_m + δ² n m / (n + m)``.

        Args:
            count: Number of observations.
            mean: Their mean ``[F]``.
            var: Their population variance ``[F]``.
        """
        if count == 0:
            return
        total = self.count + count  # []
        weight = count / total.to(torch.float64)  # []
        delta = mean.to(self.mean.device) - self.mean  # [F]
        spread = var.to(self.var.device) + (1.0 - weight) * delta.square()  # [F]
        self.var.mul_(1.0 - weight).add_(weight * spread)
        self.mean.add_(weight * delta)
        self.count.copy_(total)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningNorm:
        # module.float() and module.to(dtype) would round the statistics; a device move is wanted.
        mean, var = self.mean, self.var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mean.dtype != torch.float64:
            self.mean, self.var = mean.to(self.mean.device), var.to(self.var.device)
        return self

    def extra_repr(self) -> str:
        """Size and options, for ``print(module)``."""
        return f"{self.num_features}, clip={self.clip}, eps={self.eps}"
