from __future__ import annotations

import pytest
import torch

from ssm_fast.ops import discounted_returns, gae

pytest.importorskip("triton")


def problem(shape, *, device="cpu", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reals = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3)]
    flags = [torch.rand(shape, generator=generator) < 0.15 for _ in range(2)]
    return [x.to(device, dtype) for x in reals], [x.to(device) for x in flags]


@pytest.mark.parametrize(
    ("shape", "dim"), [((1, 1), -1), ((3, 17), -1), ((16, 2), 0), ((2, 5, 3), 1)]
)
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_reference(backend, canaries, shape, dim, gamma, gae_lambda):
    reals, flags = problem(shape, device=backend)
    actual, expected = (
        gae(*reals, *flags, gamma, gae_lambda, dim=dim, impl=impl) for impl in ("auto", "reference")
    )
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "dim"), [((1, 1), -1), ((3, 17), -1), ((16, 2), 0), ((2, 5, 3), 1)]
)
@pytest.mark.parametrize("bootstrap", [False, True])
def test_discounted_returns_equal_reference(backend, canaries, shape, dim, bootstrap):
    (rewards, _, next_values), flags = problem(shape, device=backend)
    next_values = next_values if bootstrap else None
    actual, expected = (
        discounted_returns(rewards, *flags, 0.97, next_values, dim=dim, impl=impl)
        for impl in ("auto", "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_each_dtype(device, canaries, dtype):
    reals, flags = problem((3, 20), device=device, dtype=dtype)
    actual = gae(*reals, *flags, 0.99, 0.95)
    expected = gae(*(x.double() for x in reals), *flags, 0.99, 0.95, impl="reference")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def test_a_value_that_is_not_used_may_be_anything(backend):
    (rewards, values, next_values), (terminated, truncated) = problem((1, 9), device=backend)
    terminated[:] = truncated[:] = False
    terminated[0, 4] = True
    values[0, 6] = float("nan")
    next_values[0, 4] = float("inf")
    advantages, _ = gae(rewards, values, next_values, terminated, truncated, 0.99, 0.95)
    assert advantages[0, :5].isfinite().all()
    assert advantages[0, 5].isnan()


def test_views_equal_copies(backend):
    reals, flags = problem((4, 6), device=backend)
    expected = gae(*reals, *flags, 0.99, 0.95)
    views = [x.T.contiguous().T for x in (*reals, *flags)]
    for x, y in zip(gae(*views, 0.99, 0.95), expected, strict=True):
        assert torch.equal(x, y)
    wide = [torch.stack([x, x], dim=-1)[..., 0] for x in (*reals, *flags)]
    for x, y in zip(gae(*wide, 0.99, 0.95), expected, strict=True):
        assert torch.equal(x, y)
