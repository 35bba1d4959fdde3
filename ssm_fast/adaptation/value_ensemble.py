"""An ensemble of linear value heads, whose disagreement tells how little is known of a state."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_fast.adaptation.policy_objective import SMALLEST_DEVIATION
from ssm_fast.checks import check_count


class ValueEnsemble:
    """``K`` heads on the features of a policy, each fitted to a bootstrap of the returns.

    Head ``k`` is the ridge regression, solved exactly, of the returns on the features
    ``f = (φ, 1)``, with a draw of its own for the prior and for the weights of the data::

        w_k = argmin Σ_i m_ik (G_i - f_i · w)² + λ |w - (w_0 + e_k)|²

    ``m_ik`` are exponential, equal within a block of consecutive steps and summing to about 1 over
    it (the Bayesian bootstrap; returns of neighbouring steps share their noise), ``e_k`` is
    Gaussian (randomised priors, Osband et al. 2018, arXiv 1806.03335), and ``w_0`` is the best
    multiple of the meta-critic, so that without data the heads are that critic and disagree by
    their priors. The prior's variance is such that its deviation on a typical state is that of the
    meta-critic's error; ``λ`` follows.

    Args:
        num_heads: ``K``.
        block_length: Steps of a block.
        seed: Of the draws.

    Attributes:
        explained_variance: Of the returns, by the meta-critic before any head was fitted; at most
            1, and 0 before the first fit.
        scale: The multiple of the meta-critic that the returns come to; 1 before the first fit.

    Raises:
        ValueError: A number is less than 1, or there are less than two heads.
        TypeError: It is no integer.
    """

    def __init__(self, num_heads: int = 8, block_length: int = 100, seed: int = 0) -> None:
        check_count("num_heads", num_heads, 2)
        check_count("block_length", block_length)
        self.num_heads = num_heads
        self.block_length = block_length
        self.explained_variance = 0.0
        self.scale = 1.0
        self._seed = seed
        self._heads: Tensor | None = None  # [K, F]
        self._priors: Tensor | None = None  # [K, F], without the meta-critic

    def fit(self, features: Tensor, returns: Tensor, critic: Tensor) -> None:
        """Fit all heads to what was seen.

        Args:
            features: ``φ`` of consecutive steps ``[B, T, H]``.
            returns: ``[B, T]``, not scaled.
            critic: The meta-critic's weights and, last, its bias ``[H + 1]``.

        Raises:
            ValueError: A shape does not fit, or a number is not finite.
        """
        if features.ndim != 3 or returns.shape != features.shape[:2] or returns.numel() == 0:
            raise ValueError(
                "features and returns must have shapes [B, T, H] and [B, T], got "
                f"{list(features.shape)} and {list(returns.shape)}"
            )
        for name, x in (("features", features), ("returns", returns)):
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        f = _with_one(features.detach().double())  # [B, T, F]
        G = returns.detach().double()  # [B, T]
        w_0 = self._scaled_critic(f, G, critic.detach().double())  # [F]
        B, T, F = f.shape
        K, device = self.num_heads, f.device
        generator = torch.Generator().manual_seed(self._seed)
        directions = torch.randn(K, F, generator=generator, dtype=f.dtype, device="cpu").to(device)
        blocks = -(-T // self.block_length)
        weights = torch.empty(K, B, blocks, dtype=f.dtype, device="cpu")
        weights = weights.exponential_(generator=generator)
        weights = weights.to(device).repeat_interleave(self.block_length, -1)[..., :T]
        weights = weights / min(self.block_length, T)
        m, X = weights.reshape(K, B * T), f.reshape(B * T, F)

        error = G.reshape(-1) - X @ w_0  # [M]
        noise = error.square().mean().clamp(min=1e-12)
        ridge = X.square().sum(-1).mean().clamp(min=1e-12)  # noise over the prior's variance
        priors = directions * (noise / ridge).sqrt()  # [K, F]
        A = torch.einsum("km,mf,mg->kfg", m, X, X)
        A.diagonal(dim1=-2, dim2=-1).add_(ridge)
        b = torch.einsum("km,m,mf->kf", m, error, X) + ridge * priors
        self._heads = w_0 + torch.linalg.solve(A, b)
        self._priors = priors

    def values(self, features: Tensor) -> Tensor:
        """The mean of the heads ``[...]`` at features ``[..., H]``.

        Raises:
            ValueError: Nothing was fitted yet.
        """
        if self._heads is None:
            raise ValueError("fit the heads first")
        return (_with_one(features.double()) @ self._heads.mean(0)).to(features.dtype)

    def disagreement(self, features: Tensor) -> Tensor:
        """The deviation of the heads ``[...]``, in the unit of the returns.

        Raises:
            ValueError: Nothing was fitted yet.
        """
        if self._heads is None:
            raise ValueError("fit the heads first")
        return _deviation(features, self._heads)

    def uncertainty(self, features: Tensor) -> Tensor:
        """Disagreement over that of the priors ``[...]``: 1 where nothing is known, towards 0.

        Before the first fit it is 1.
        """
        if self._heads is None or self._priors is None:
            return torch.ones_like(features[..., 0])
        ratio = _deviation(features, self._heads) / _deviation(features, self._priors)
        return ratio.clamp(max=1.0)

    def _scaled_critic(self, f: Tensor, G: Tensor, critic: Tensor) -> Tensor:
        """The meta-critic in the unit of the returns ``[F]``; sets what it explains of them."""
        self.scale, self.explained_variance = critic_scale(f @ critic, G)
        w_0 = self.scale * critic
        w_0[-1] += (G - f @ w_0).mean()
        return w_0


def critic_scale(values: Tensor, returns: Tensor) -> tuple[float, float]:
    """How many units of the returns a unit of a critic's values is, by least squares.

    Training leaves a critic in a unit of its own (`PPOTrainer` scales rewards), which a policy's
    file does not tell.

    Args:
        values: ``[...]``.
        returns: ``[...]``.

    Returns:
        The scale, 0 of a critic that is of no use, and the share of the returns' variance that the
        scaled and shifted values explain, in [0, 1]. Where the returns or the values are all the
        same but for rounding, there is nothing to compare, and both are 0.
    """
    values, returns = values.double(), returns.double()
    if is_constant(values) or is_constant(returns):
        return 0.0, 0.0
    spread, around = values - values.mean(), returns - returns.mean()
    scale = float((spread * around).sum() / spread.square().sum())
    if scale <= 0.0:
        return 0.0, 0.0
    left = float((around - scale * spread).square().sum() / around.square().sum())
    return scale, min(max(1.0 - left, 0.0), 1.0)


def is_constant(x: Tensor) -> bool:
    """Whether numbers deviate by less than a thousandth of the largest, as rounding does."""
    return bool(x.std(correction=0) <= SMALLEST_DEVIATION * x.abs().max())


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


def _deviation(features: Tensor, heads: Tensor) -> Tensor:
    values = _with_one(features.double()) @ heads.T  # [..., K]
    return values.std(-1).to(features.dtype)
