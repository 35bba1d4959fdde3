"""A second-order meta-update of 20 tasks beside eager loops and the products that it needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contest import contest
from meta_updates import (
    MODELS,
    SIZES,
    make_update,
    one_product,
    peak_memory,
    products,
    updates_of,
)

from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.meta_rl.meta_maml import MetaMAML


@pytest.mark.timeout(3600)  # the peers take minutes where another program holds the cores
@pytest.mark.parametrize("kind", MODELS)
def test_meta_update(benchmark, kind):
    contenders = {name: make_update(kind, name, **SIZES) for name in updates_of(kind)}
    contenders["bmm alone"] = products(kind, **SIZES)
    contenders["one mm of as many operations"] = one_product(kind, **SIZES)
    contest(benchmark, "MetaMAML", contenders, floor="bmm alone")
    benchmark.extra_info["peak_mib"] = {
        name: peak_memory(kind, name, **SIZES) for name in updates_of(kind)
    }


@pytest.mark.parametrize("num_steps", [1, 3])
def test_adapt_task(benchmark, num_steps):
    x, y = torch.randn(20, 100, 17), torch.randn(20, 100, 6)
    maml, other = MetaMAML(StateSpaceModel(64, 17, 6, 128)), StateSpaceModel(64, 17, 6, 128)
    sgd = torch.optim.SGD(other.parameters(), lr=0.01)

    def by_sgd() -> None:
        for _ in range(num_steps):
            sgd.zero_grad()
            F.mse_loss(other(x)[0], y).backward()
            sgd.step()

    contenders = {
        "adapt_task": torch.no_grad()(lambda: maml.adapt_task(x, y, num_steps=num_steps)),
        "SGD on the model": by_sgd,
    }
    contest(benchmark, "adapt_task", contenders)
