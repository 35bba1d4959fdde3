"""The contenders of a case do the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ssm_fast.bench.cases import OPS, Case, make_cases
from ssm_fast.bench.timing import take_turns

pytestmark = pytest.mark.isa_independent

CASES = [
    (op, i, case.name)
    for op in OPS
    for i, case in enumerate(make_cases(op, torch.device("cpu"), 1, quick=True))
]
SAME = ("eager loop", "three torch calls", "JAX lax.scan", "TorchRL vectorised")


@pytest.mark.parametrize(("op", "i", "name"), CASES, ids=[name for *_, name in CASES])
def test_the_same_is_computed(op: str, i: int, name: str) -> None:
    case = list(make_cases(op, torch.device("cpu"), 1, quick=True))[i]
    with torch.set_grad_enabled(case.gradients):
        ours = numbers(case.contenders[case.ours]())
        for peer, run in case.contenders.items():
            result = run()
            if peer in SAME:
                found = numbers(result)
                for got, expected in zip(found[-len(ours) :], ours, strict=True):
                    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def numbers(found: Any) -> list[torch.Tensor]:
    """The tensors of a result, which may be JAX's; its loss goes before the gradients."""
    if isinstance(found, (tuple, list)):
        return [x for part in found for x in numbers(part)]
    return [torch.tensor(np.asarray(found)).squeeze(-1)]


def test_sizes_follow_the_threads() -> None:
    def names(threads: int, quick: bool) -> list[str]:
        cases: list[Case] = list(make_cases("output_norm", torch.device("cpu"), threads, quick))
        return [case.name.partition(",")[0] for case in cases][::2]

    small = "output_norm B8 T256 N64"
    assert names(3, quick=True) == [small]
    assert names(3, False) == [small, "output_norm B96 T256 N64", "output_norm B48 T256 N128"]


def test_contenders_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    timing = take_turns(runs, rounds=4, seconds=60.0, calls=2)
    assert timing.rounds == 4
    assert order[:3] == list("abc")  # not timed
    rounds = [order[i : i + 6] for i in range(3, len(order), 6)]
    assert [sorted(turn) for turn in rounds] == [list("aabbcc")] * 4
    assert len({tuple(turn) for turn in rounds}) > 1
    assert take_turns(runs, rounds=4, seconds=0.0).rounds == 1
    assert take_turns(runs, rounds=4, seconds=0.0, least_rounds=2).rounds == 2
