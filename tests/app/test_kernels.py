from __future__ import annotations

import os

import pytest

from ssm_fast.app.kernels import measure
from ssm_fast.app.visitors import Visitor

pytestmark = pytest.mark.isa_independent


def test_a_row_each(visitor: Visitor) -> None:
    *_, view = measure(visitor, 1, 64, 32, 1)
    assert view.status.kind == "done", view.status
    assert [row.what for row in view.rows] == [
        f"{what}, {how}"
        for what in ("dense_scan", "norm_scan", "SSM layer")
        for how in ("forward", "forward and backward")
    ]
    for row in view.rows:
        assert row.native > 0
        assert row.eager > 0
        assert (row.gru is not None) == row.what.startswith("SSM")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((2, 64, 32, 1), "Batch must be one of (1, 16, 64), got 2."),
        ((1, 64, 512, 1), "State must be one of (32, 64, 128), got 512."),
        ((1, 64, 32, 10_000), f"Threads must be at most {os.cpu_count()}, got 10000."),
    ],
)
def test_sizes_that_are_not_offered(
    sizes: tuple[int, int, int, int], text: str, visitor: Visitor
) -> None:
    *_, view = measure(visitor, *sizes)
    assert (view.status.kind, view.status.text) == ("error", text)
