"""The contenders of a case do the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssm_fast.bench import cases
from ssm_fast.bench.cases import OPS, Case, make_cases
from ssm_fast.bench.timing import take_turns

pytestmark = pytest.mark.isa_independent

SAME = {"eager loop", "the same modules", "three torch calls", "TorchRL vectorised"}


@pytest.fixture(autouse=True)
def _without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would stay, and every later fork of the test process would warn of them."""
    monkeypatch.setattr(cases, "jax_contenders", lambda *_: {})


@pytest.mark.parametrize("op", OPS)
def test_the_same_is_computed(op: str) -> None:
    for case in make_cases(op, torch.device("cpu"), 1, quick=True):
        with torch.set_grad_enabled(case.gradients):
            results = {name: run() for name, run in case.contenders.items()}
        ours = numbers(results[case.ours])
        if op == "policy_step":
            del ours[1]  # the log-probability, which the modules leave out
        compared = SAME & set(results)
        assert bool(compared) is (op != "ssm")  # no peer computes what SSM does
        for peer in compared:
            for got, expected in zip(numbers(results[peer]), ours, strict=True):
                torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def numbers(found: Any) -> list[torch.Tensor]:
    """The tensors of a result."""
    if isinstance(found, (tuple, list)):
        return [x for part in found for x in numbers(part)]
    return [found.detach().squeeze(-1)]


def test_sizes_follow_the_threads() -> None:
    def names(threads: int, quick: bool) -> list[str]:
        made: list[Case] = list(make_cases("output_norm", torch.device("cpu"), threads, quick))
        return [case.name.partition(",")[0] for case in made][::2]

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
