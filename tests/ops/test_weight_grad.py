from __future__ import annotations

import pytest
import torch
from references import relative_rms
from torch.autograd import gradcheck, gradgradcheck

from ssm_fast.ops.weight_grad import reference, weight_grad


def problem(G, B, T, N, dtype=torch.float64, s0=True):
    generator = torch.Generator().manual_seed(0)
    x, s = torch.randn(2, G, B, T, N, dtype=dtype, generator=generator)
    initial = torch.randn(G, B, N, dtype=dtype, generator=generator) if s0 else None
    return x, s, initial, torch.rand(G, B, T, generator=generator) < 0.2


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("G", "B", "T", "N"),
    [
        (1, 1, 1, 1),
        (2, 3, 1, 5),
        (3, 2, 97, 7),
        (1, 16, 100, 63),
        (1, 9, 200, 64),
        (1, 3, 7, 130),
        (40, 2, 9, 6),
    ],
)
def test_equals_explicit_sum(G, B, T, N, reverse, time_major):
    x, s, s0, reset = problem(G, B, T, N, s0=not reverse)
    expected = torch.zeros(G, N, N, dtype=torch.float64)
    for t in range(T):
        if reverse:
            h = s[:, :, t + 1] * ~reset[:, :, t + 1, None] if t + 1 < T else 0 * s[:, :, 0]
        else:
            h = (s0 if t == 0 else s[:, :, t - 1]) * ~reset[:, :, t, None]
        expected += x[:, :, t].mT @ h
    if time_major:
        x, s = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, s))
    actual = weight_grad(x, s, s0, reset, reverse)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        reference(x, s, s0, reset, reverse), expected, rtol=1e-11, atol=1e-11
    )


def test_float32_error():
    inputs = problem(1, 64, 256, 64)
    single = [y.float() if y.is_floating_point() else y for y in inputs]
    assert relative_rms(weight_grad(*single, False), reference(*inputs, False)) <= 1e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_and_gradgradcheck(reverse):
    x, s, s0, reset = problem(2, 2, 3, 3)
    leaves = [y.requires_grad_() for y in ((x, s) if reverse else (x, s, s0))]

    def f(x, s, s0=None):
        return weight_grad(x, s, s0, reset, reverse)

    assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, leaves)


def test_opcheck():
    x, s, s0, reset = problem(2, 3, 4, 5)
    for tensor in (x, s, s0):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.ssm_fast.weight_grad.default, (x, s, s0, reset, False))


def test_results_are_bitwise_the_same_for_any_thread_count():
    inputs = problem(1, 40, 200, 63, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(weight_grad(*inputs, False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_reset_drops_a_state_that_is_not_finite():
    x, s, s0, reset = problem(1, 2, 5, 4)
    reset[:, :, 3] = True
    s[:, :, 2] = float("inf")
    assert weight_grad(x, s, s0, reset, False).isfinite().all()
