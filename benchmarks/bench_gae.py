"""gae beside copies of the same bytes, into warm and into fresh memory, and TorchRL's two forms of it."""

from __future__ import annotations

import pytest
import torch
from contest import contest

from ssm_fast.ops import gae
from ssm_fast.ops.dispatch import native_kernel

functional = pytest.importorskip("torchrl.objectives.value.functional", reason="peer: TorchRL")


def into_warm_memory(inputs, sizes):
    """The kernel alone, its outputs allocated beforehand."""
    outputs = [torch.empty_like(inputs[0]) for _ in range(2)]
    kernel = native_kernel("gae", inputs[0].dtype)
    return lambda: kernel(*inputs, *outputs, sizes, 0.99, 0.95)


@pytest.mark.parametrize(
    ("B", "T", "dim"),
    [(8, 256, 1), (64, 1000, 1), (1024, 1024, 1), (1024, 1024, 0), (1, 1_000_000, 1)],
    ids=["B8-T256", "B64-T1000", "B1024-T1024", "T1024-B1024", "B1-T1000000"],
)
def test_gae(benchmark, B, T, dim):
    shape = (B, T) if dim == 1 else (T, B)
    rewards, values, next_values = torch.randn(3, *shape)
    terminated, truncated = torch.rand(2, *shape) < 0.01
    inputs = (rewards, values, next_values, terminated, truncated)
    columns = [x.unsqueeze(-1) for x in (values, next_values, rewards)]
    flags = {"done": (terminated | truncated).unsqueeze(-1), "terminated": terminated.unsqueeze(-1)}
    source = torch.randn(B * T * 22 // 8)  # 3 floats and 2 flags in, 2 floats out
    target = torch.empty_like(source)
    contenders = {
        "gae": lambda: gae(*inputs, 0.99, 0.95, dim=dim),
        "gae, warm output": into_warm_memory(inputs, (B, T, 1) if dim == 1 else (1, T, B)),
        "copy of the same bytes": lambda: target.copy_(source),
        "clone of the same bytes": lambda: source.clone(),
    }
    if T <= 1024:
        time_dim = {"time_dim": -2 if dim == 1 else 0}
        contenders["TorchRL vectorised"] = lambda: functional.vec_generalized_advantage_estimate(
            0.99, 0.95, *columns, **flags, **time_dim
        )
        contenders["TorchRL loop"] = lambda: functional.generalized_advantage_estimate(
            0.99, 0.95, *columns, **flags, **time_dim
        )
    contest(benchmark, "gae", contenders, floor="copy of the same bytes")
