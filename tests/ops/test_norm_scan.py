from __future__ import annotations

import pytest
import torch
from references import norm_scan_loop
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from ssm_fast.ops import norm_scan


def problem(B=3, T=7, N=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, A, weight, bias, s0 = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in [(B, T, N), (N, N), (N,), (N,), (B, N)]
    )
    return u, A, weight, bias, s0, torch.rand(B, T, generator=generator) < 0.3


def test_equals_loop():
    arguments = problem()
    torch.testing.assert_close(norm_scan(*arguments), norm_scan_loop(*arguments))


def test_gradcheck_and_gradgradcheck():
    *leaves, reset = problem(2, 3, 3)
    leaves = [x.requires_grad_() for x in leaves]
    assert gradcheck(lambda *x: norm_scan(*x, reset), leaves)
    assert gradgradcheck(lambda *x: norm_scan(*x, reset), leaves)


def test_grouped_and_vmapped_equal_a_call_per_task():
    problems = [problem(seed=g) for g in range(3)]
    stacked = [torch.stack(x) for x in zip(*problems, strict=True)]
    expected = torch.stack([norm_scan(*p) for p in problems])
    torch.testing.assert_close(norm_scan(*stacked), expected)

    def loss(A, u, weight, bias, s0, reset):
        return norm_scan(u, A, weight, bias, s0, reset).square().sum()

    order = (1, 0, 2, 3, 4, 5)
    together = vmap(grad(loss))(*(stacked[i] for i in order))
    alone = torch.stack([grad(loss)(*(p[i] for i in order)) for p in problems])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": torch.zeros(4)},
            ValueError,
            r"weight must have shape \[N\] = \[5\], got \[4\]",
        ),
        ({"A": torch.zeros(4, 5)}, ValueError, r"A must have shape \[N, N\] = \[5, 5\]"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"impl": "native"}, RuntimeError, "norm_scan has no native kernel yet"),
        ({"impl": "fast"}, ValueError, "unknown impl 'fast'"),
    ],
)
def test_wrong_arguments_raise(change, error, message):
    arguments = {
        "u": torch.zeros(3, 7, 5),
        "A": torch.zeros(5, 5),
        "weight": torch.ones(5),
        "bias": torch.zeros(5),
    }
    with pytest.raises(error, match=message):
        norm_scan(**(arguments | change))
