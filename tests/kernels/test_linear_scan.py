from __future__ import annotations

import pytest
import torch
from references import linear_scan_loop, relative_rms
from torch.autograd import gradcheck, gradgradcheck

from ssm_fast.ops import linear_scan

pytest.importorskip("triton")
from ssm_fast.kernels import linear_scan as kernels


def problem(shape, *, device="cpu", dtype=torch.float64, seed=0):
    """Coefficients inside the unit circle, inputs, and a state for time as dimension 1."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    a, b = (torch.randn(shape, dtype=wide, generator=generator) for _ in range(2))
    h0 = torch.randn(shape[0], *shape[2:], dtype=wide, generator=generator)
    return tuple(x.to(device, dtype) for x in (0.7 * a, b, h0))


def loop(a, b, h0, reverse, dim=1):
    arrays = (None if x is None else x.cpu().resolve_conj().numpy() for x in (a, b, h0))
    return torch.from_numpy(linear_scan_loop(*arrays, reverse, dim))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 1), (2, 8, 3), (1, 9, 5), (2, 33)])
def test_equals_loop(backend, canaries, shape, reverse, dtype):
    a, b, h0 = problem(shape, device=backend, dtype=dtype)
    for initial in (h0, None):
        h = linear_scan(a, b, initial, reverse)
        torch.testing.assert_close(h.cpu(), loop(a, b, initial, reverse), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_shift_takes_the_coefficient_of_the_step_before(device, canaries, reverse):
    a, b, _ = problem((2, 19, 3), device=device)
    shifted = a.roll(-1 if reverse else 1, dims=1)
    h = torch.ops.ssm_fast.linear_scan(a, b, None, reverse, True)
    torch.testing.assert_close(h.cpu(), loop(shifted, b, None, reverse), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-6), (torch.complex64, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
)
def test_error_of_each_dtype(device, canaries, dtype, bound):
    a, b, h0 = problem((2, 21, 4), device=device, dtype=dtype)
    h = linear_scan(a, b, h0)
    assert h.dtype == dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = loop(*(x.to(wide) for x in (a, b, h0)), False)
    error, scale = h.cpu().to(wide) - expected, expected.abs().square().mean().sqrt()
    assert error.abs().square().mean().sqrt() / scale <= bound


@pytest.mark.parametrize(
    ("dtype", "reverse"), [(torch.float64, False), (torch.float64, True), (torch.complex128, True)]
)
def test_gradcheck_and_gradgradcheck(backend, dtype, reverse):
    shape = (1, 2) if dtype.is_complex else (1, 3, 2)
    leaves = [x.requires_grad_() for x in problem(shape, device=backend, dtype=dtype)]
    assert gradcheck(
        lambda *x: linear_scan(*x, reverse),
        leaves,
        check_forward_ad=not dtype.is_complex,
        fast_mode=True,
    )
    assert gradgradcheck(lambda *x: linear_scan(*x, reverse), leaves, fast_mode=True)


def test_layouts_and_broadcasting(backend):
    a, b, h0 = problem((3, 5, 4), device=backend, dtype=torch.complex128)
    expected = linear_scan(a, b, h0)
    for view in (
        b.transpose(0, 1).contiguous().transpose(0, 1),
        b.repeat_interleave(2, dim=2)[:, :, ::2],
        b.conj().resolve_conj().conj(),
    ):
        torch.testing.assert_close(linear_scan(a, view, h0), expected)
    first = linear_scan(b.movedim(1, 0), b.movedim(1, 0), h0, dim=0)
    torch.testing.assert_close(first.movedim(0, 1), linear_scan(b, b, h0))
    decay = a[0, 0]
    torch.testing.assert_close(linear_scan(decay, b), linear_scan(decay.expand_as(b).clone(), b))


def test_many_columns_equal_few(device, canaries, monkeypatch):
    a, b, h0 = problem((2, 5, 70), device=device)
    expected = linear_scan(a, b, h0)
    monkeypatch.setattr(kernels, "MANY_COLUMNS", 1)
    assert torch.equal(linear_scan(a, b, h0), expected)


@pytest.fixture
def in_chunks(monkeypatch):
    """Chunks of eight steps wherever there is more than one."""
    monkeypatch.setattr(kernels, "CHUNKED_STEPS", 2)
    monkeypatch.setattr(kernels, "chunk_length", lambda _: 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 9, 1), (2, 16, 1), (1, 17, 2)])
def test_chunks_equal_loop(device, canaries, in_chunks, shape, reverse, dtype):
    a, b, h0 = problem(shape, device=device, dtype=dtype)
    a[:, 11 % shape[1]] = 0  # as at the start of an episode
    for initial in (h0, None):
        h = linear_scan(a, b, initial, reverse)
        torch.testing.assert_close(h.cpu(), loop(a, b, initial, reverse), rtol=1e-12, atol=1e-12)


def test_more_chunks_than_are_read_at_once(device, canaries, in_chunks):
    a, b, h0 = problem((1, 81), device=device)
    h = linear_scan(a, b, h0)
    torch.testing.assert_close(h.cpu(), loop(a, b, h0, False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_shifted_chunks_equal_loop(device, canaries, in_chunks, reverse):
    a, b, _ = problem((2, 19, 3), device=device)
    shifted = a.roll(-1 if reverse else 1, dims=1)
    h = torch.ops.ssm_fast.linear_scan(a, b, None, reverse, True)
    torch.testing.assert_close(h.cpu(), loop(shifted, b, None, reverse), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [16.0, 16.0j])
def test_growing_products_do_not_cancel(backend, in_chunks, factor):
    a = torch.full((1, 27), factor, device=backend)
    h0 = torch.ones(1, dtype=a.dtype, device=backend)
    assert torch.equal(linear_scan(a, 1 - a, h0), torch.ones_like(a))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, interpreting
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", [1, 7, 8, 13, 26])
@pytest.mark.parametrize("what", ["a", "b"])
def test_what_is_not_finite_spreads_over_chunks_as_in_the_loop(
    device, in_chunks, what, where, value
):
    a, b, _ = problem((1, 27), device=device)
    inputs = {"a": a.abs() + 0.01, "b": b}
    inputs[what][0, where] = value
    expected = loop(inputs["a"], inputs["b"], None, False)
    actual = linear_scan(inputs["a"], inputs["b"]).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_product_that_underflows_and_grows_again_takes_the_sequential_path(device, in_chunks):
    a, b = torch.ones(1, 17, device=device), torch.zeros(1, 17, device=device)
    a[0, 9:11], a[0, 13:15] = (
        1e-30,
        1e30,
    )  # the product of all is one, that of the first two is lost
    h0 = torch.full((1,), 1e30, device=device)
    torch.testing.assert_close(linear_scan(a, b, h0)[:, 8], h0)
    torch.testing.assert_close(linear_scan(a, b, h0).cpu(), loop(a, b, h0, False))


def test_long_sequences_of_few_columns_are_cut_into_chunks(device, monkeypatch):
    passes = []
    monkeypatch.setattr(kernels, "launch", lambda *a: passes.append(a[0]))
    for B, T in ((1, 511), (1, 512), (kernels.MANY_COLUMNS - 1, 512), (kernels.MANY_COLUMNS, 512)):
        x = torch.zeros(1, device=device).expand(B, T)
        linear_scan(x, x)
    assert passes == ["whole", "ends", "fix", "ends", "fix", "whole"]
    assert [kernels.chunk_length(T) for T in (512, 1024, 4096)] == [16, 32, 64]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, interpreting
def test_products_of_coefficients_may_overflow(backend):
    a, b = torch.full((1, 9, 1), 1e200, device=backend, dtype=torch.float64), torch.zeros(1, 9, 1)
    b = b.to(a)
    b[:, -1] = 1.0
    assert torch.equal(linear_scan(a, b), b)


def test_float32_error_of_gradients(backend):
    inputs = problem((2, 20, 3), device=backend)
    results = []
    for dtype, impl in ((torch.float32, "auto"), (torch.float64, "reference")):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        s = linear_scan(*leaves, impl=impl)
        results.append(torch.autograd.grad(s.square().sum(), leaves))
    assert all(relative_rms(x, y) <= 1e-5 for x, y in zip(*results, strict=True))
