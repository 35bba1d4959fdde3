"""gae beside a copy of the same bytes and TorchRL's two forms of it."""

from __future__ import annotations

import pytest
import torch
from contest import contest

from ssm_fast.ops import gae

functional = pytest.importorskip("torchrl.objectives.value.functional", reason="peer: TorchRL")


@pytest.mark.parametrize(("B", "T"), [(8, 256), (64, 1000), (1024, 1024)])
def test_gae(benchmark, B, T):
    rewards, values, next_values = torch.randn(3, B, T)
    terminated, truncated = torch.rand(2, B, T) < 0.01
    columns = [x.unsqueeze(-1) for x in (values, next_values, rewards)]
    flags = {"done": (terminated | truncated).unsqueeze(-1), "terminated": terminated.unsqueeze(-1)}
    source = torch.randn(B * T * 22 // 8)  # 3 floats and 2 flags in, 2 floats out
    target = torch.empty_like(source)
    contest(
        benchmark,
        "gae",
        {
            "gae": lambda: gae(rewards, values, next_values, terminated, truncated, 0.99, 0.95),
            "copy of the same bytes": lambda: target.copy_(source),
            "TorchRL vectorised": lambda: functional.vec_generalized_advantage_estimate(
                0.99, 0.95, *columns, **flags
            ),
            "TorchRL loop": lambda: functional.generalized_advantage_estimate(
                0.99, 0.95, *columns, **flags
            ),
        },
        floor="copy of the same bytes",
    )
