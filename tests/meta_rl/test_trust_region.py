"""The products in the benchmark's MAML-TRPO, against finite differences."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from ssm_fast.core import ImprovedSSM
from ssm_fast.env_runner import Environment
from ssm_fast.meta_rl.meta_maml import inner_update, task_losses

pytestmark = pytest.mark.isa_independent
PATH = Path(__file__).parents[2] / "benchmarks" / "trust_region.py"


@pytest.fixture(scope="module")
def trust_region():
    spec = importlib.util.spec_from_file_location("trust_region", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["ssm_fast/CartPoleFamily-v0", "ssm_fast/HalfCheetahDir-v0"])
def played(request, trust_region):
    """A trainer in float64 and two rounds of two tasks."""
    torch.manual_seed(0)
    with Environment(request.param, 4, seed=0) as env:
        sizes = {"state_dim": 3, "hidden_dim": 4, "num_layers": 1, "discrete": env.discrete}
        model = ImprovedSSM(env.input_dim, env.action_dim, normalize_observations=True, **sizes)
        trainer = trust_region.TrustRegionTrainer(
            model.double(),
            inner_lr=0.5,
            inner_steps=1,
            learn_inner_lr=True,
            tasks_per_epoch=2,
            num_steps=8,
            seed=1,
        )
        adaptation = trainer.adapt(env, env.family.train_tasks[:2], 1, seed=3)
    return trainer, [dict(batch) for batch in adaptation.rounds]


def slope(trainer, batches):
    """Gradient of the mean divergence, through the inner step."""
    first = {n: p.expand(2, *p.shape) for n, p in trainer._shared.items()}
    second, _ = inner_update(trainer._inner_loss, first, batches[0], trainer.rates)
    divergences = [
        task_losses(trainer._kl, weights, batch).mean()
        for weights, batch in zip((first, second), batches, strict=True)
    ]
    gradients = torch.autograd.grad(
        sum(divergences) / 2, trainer._learnt, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in gradients])


def test_product_is_the_change_of_the_slope(played):
    trainer, batches = played
    product = trainer._hessian(batches)
    start = [p.detach().clone() for p in trainer._learnt]
    direction = torch.randn(sum(p.numel() for p in start), dtype=torch.float64)
    assert slope(trainer, batches).abs().max() < 1e-12  # the policies are those that played
    found, eps = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, a, d in zip(trainer._learnt, start, trainer._split(direction), strict=True):
                p.copy_(a + sign * eps * d)
        found.append(slope(trainer, batches))
    expected = (found[0] - found[1]) / (2 * eps) + trainer.damping * direction
    actual = product(direction)
    assert (actual - expected).norm() < 1e-4 * expected.norm()


def test_update_stays_in_the_region_and_improves(played):
    trainer, batches = played
    trainer._hessian(batches)  # keeps the policies that played
    before = float(trainer._outer_loss(batches).detach())
    trainer.update(batches)
    assert float(trainer._outer_loss(batches).detach()) < before
    with torch.no_grad():
        assert 0.1 * trainer.max_kl < trainer._divergence(batches) <= trainer.max_kl
