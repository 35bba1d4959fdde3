"""The outer update of MAML-TRPO (Finn et al. 2017, arXiv 1703.03400), to compare with ProMP's.

The Hessian of a divergence at the policies that played is J' F J, where F is its Hessian in the adapted weights and
J their derivative by the shared ones; both J and its transpose take only products with Hessians of the inner losses.
So no third derivative is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import functional_call

from ssm_fast.meta_rl.meta_maml import Weights, inner_update, task_losses
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer

Product: TypeAlias = Callable[[Weights], Weights]


class TrustRegionTrainer(MetaRLTrainer):
    """Everything as in `MetaRLTrainer` but the outer step: a natural gradient within a trust region.

    Args:
        max_kl: Largest mean divergence of the policies of all rounds.
        cg_steps: Steps of the conjugate gradients.
        damping: Added to the diagonal of the Hessian.
        backtracks: Times that a step is shortened to 0.8 of its length, until it improves the
            surrogate within the region; otherwise none is taken.
    """

    def __init__(
        self,
        *args: Any,
        max_kl: float = 0.01,
        cg_steps: int = 10,
        damping: float = 1e-3,
        backtracks: int = 15,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.max_kl, self.cg_steps, self.damping = max_kl, cg_steps, damping
        self.backtracks = backtracks

    def update(self, rounds: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """One step on all tasks; see `MetaRLTrainer.update`."""
        batches = [dict(batch) for batch in rounds]
        loss = self._outer_loss(batches)
        gradient = torch.autograd.grad(
            loss, self._learnt, allow_unused=True, materialize_grads=True
        )
        before, loss = _flat(gradient), float(loss.detach())
        times_hessian = self._hessian(batches)
        direction = conjugate_gradients(times_hessian, -before, self.cg_steps)
        curvature = direction @ times_hessian(direction)
        if not bool(torch.isfinite(curvature)) or float(curvature) <= 0.0:
            raise FloatingPointError(f"meta-loss {loss}, curvature {float(curvature)}")
        step = direction * (2.0 * self.max_kl / curvature).sqrt()
        self._search(batches, step, loss)
        return {"meta_loss": loss, "grad_norm": float(before.norm())}

    @torch.no_grad()
    def _search(self, batches: list[dict[str, Tensor]], step: Tensor, loss: float) -> None:
        """Takes the longest step that improves the surrogate within the region, or none."""
        start = [p.clone() for p in self._learnt]
        for i in range(self.backtracks):
            for p, first, change in zip(self._learnt, start, self._split(step), strict=True):
                p.copy_(first + 0.8**i * change)
            new_loss, divergence = float(self._outer_loss(batches)), self._divergence(batches)
            if new_loss < loss and divergence <= self.max_kl:
                return
        for p, first in zip(self._learnt, start, strict=True):
            p.copy_(first)

    def _divergence(self, batches: list[dict[str, Tensor]]) -> float:
        total = 0.0
        for weights, batch in self._chain(batches):
            total += float(task_losses(self._kl, weights, batch).mean())
        return total / len(batches)

    def _chain(self, batches: list[dict[str, Tensor]]) -> list[tuple[Weights, dict[str, Tensor]]]:
        """The weights of each round, and what was played with them."""
        weights, pairs = self.shared_weights(len(batches[0]["rewards"])), []
        for batch in batches:
            pairs.append((weights, batch))
            weights, _ = inner_update(self._inner_loss, weights, batch, self.rates)
        return pairs

    def _hessian(self, batches: list[dict[str, Tensor]]) -> Callable[[Tensor], Tensor]:
        """The product with the damped Hessian of the mean divergence, by shared weights and rates."""
        with torch.no_grad():
            pairs = self._chain(batches)
            for weights, batch in pairs:  # the policies that played, whose divergence is 0
                old = torch.vmap(self._policy)(weights, batch)
                batch["old"] = tuple(x.clone() for x in old)  # not views of what `_search` moves
        scale = 1.0 / (len(batches) * len(batches[0]["rewards"]))
        fishers = [products(self._kl, weights, batch)[0] for weights, batch in pairs]
        inner = [products(self._inner_loss, weights, batch) for weights, batch in pairs[:-1]]
        rates, names = self.rates, list(self._shared)

        def product(flat: Tensor) -> Tensor:
            parts = [x.detach() for x in self._split(flat)]
            G = len(batches[0]["rewards"])
            change = {n: x.expand(G, *x.shape) for n, x in zip(names, parts, strict=False)}
            by_rates = dict(zip(names, parts[len(names) :], strict=False))
            forces = []
            for k, fisher in enumerate(fishers):
                forces.append(fisher(change))
                if k < len(inner):
                    times, slope = inner[k]
                    bent = times(change)
                    change = {
                        n: change[n] - rates[n].detach() * bent[n] - by_rates.get(n, 0.0) * slope[n]
                        for n in names
                    }
            back, rate_force = forces[-1], {n: torch.zeros_like(rates[n]) for n in by_rates}
            for k in reversed(range(len(inner))):
                times, slope = inner[k]
                for n in rate_force:
                    rate_force[n] -= (back[n] * slope[n]).sum(0)
                bent = times({n: rates[n].detach() * back[n] for n in names})
                back = {n: forces[k][n] + back[n] - bent[n] for n in names}
            result = [back[n].sum(0) for n in names] + [rate_force[n] for n in by_rates]
            return scale * _flat(result) + self.damping * flat

        return product

    def _policy(self, weights: Weights, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        inputs = batch["observations"], None, batch["reset"]
        mean, log_std, _, _ = functional_call(self.model, weights, inputs)
        if log_std is None:
            log_p = mean.log_softmax(-1)
            return log_p, log_p
        return mean, log_std.expand_as(mean)

    def _kl(self, weights: Weights, batch: Mapping[str, Any]) -> Tensor:
        """Mean divergence of a task's policy from the one that played."""
        (old, old_log_std), (new, log_std) = batch["old"], self._policy(weights, batch)
        if self.model.discrete:
            return (old.exp() * (old - new)).sum(-1).mean()
        squares = (2 * old_log_std).exp() + (old - new).square()
        return (log_std - old_log_std + 0.5 * squares * (-2 * log_std).exp() - 0.5).sum(-1).mean()

    def _split(self, flat: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self._learnt]
        return [x.view_as(p) for x, p in zip(flat.split(sizes), self._learnt, strict=True)]


def products(loss: Any, weights: Weights, batch: Any) -> tuple[Product, Weights]:
    """The product with the Hessian of each task's loss, and its gradient, both `[G, ...]`."""
    points = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    total = task_losses(loss, points, batch).sum()
    slopes = torch.autograd.grad(
        total, list(points.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )

    def times(vector: Weights) -> Weights:
        pairs = [(s, vector[n]) for n, s in zip(points, slopes, strict=True) if s.requires_grad]
        bent = torch.autograd.grad(
            [s for s, _ in pairs],
            list(points.values()),
            [v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(points, bent, strict=True))

    return times, dict(zip(points, [s.detach() for s in slopes], strict=True))


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """An approximate solution of `product(x) = b`."""
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), residual @ residual
    for _ in range(steps):
        image = product(direction)
        length = square / (direction @ image)
        x = x + length * direction
        residual = residual - length * image
        new_square = residual @ residual
        if float(new_square) < 1e-10 * float(b @ b):
            break
        direction = residual + (new_square / square) * direction
        square = new_square
    return x


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
