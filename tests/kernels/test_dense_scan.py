from __future__ import annotations

import pytest
import torch
from references import dense_scan_loop, relative_rms
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

from ssm_fast.ops import dense_scan

pytest.importorskip("triton")
from ssm_fast.kernels import dense_scan as kernels
from ssm_fast.kernels.recurrence import Plan

RESETS = {"none": [], "first": [0], "last": [-1], "consecutive": [1, 2], "all": slice(None)}


def problem(B, T, N, *, device="cpu", dtype=torch.float64, seed=0, resets="random"):
    """Inputs of a scan whose states stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(B, T, N, dtype=torch.float64, generator=generator)
    A = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=generator))[0] * 0.9
    s0 = torch.randn(B, N, dtype=torch.float64, generator=generator)
    reset = torch.rand(B, T, generator=generator) < 0.2
    if resets != "random":
        reset[:] = False
        steps = RESETS[resets]
        reset[:, [t for t in steps if t < T] if isinstance(steps, list) else steps] = True
    return *(x.to(device, dtype) for x in (u, A, s0)), reset.to(device)


@pytest.mark.parametrize("resets", [*RESETS, "random"])
@pytest.mark.parametrize(("B", "T", "N"), [(1, 1, 1), (3, 5, 17), (2, 3, 64)])
def test_float64_equals_loop(backend, canaries, B, T, N, resets):
    arguments = problem(B, T, N, device=backend, resets=resets)
    torch.testing.assert_close(
        dense_scan(*arguments), dense_scan_loop(*arguments), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("N", [65, 128, 129, 256])
def test_large_states_equal_loop(device, canaries, N):
    arguments = problem(2, 3, N, device=device)
    torch.testing.assert_close(
        dense_scan(*arguments), dense_scan_loop(*arguments), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("product", "rows"), [("sum", 4), ("stream", 4), ("ieee", 16), ("tf32x3", 16)]
)
@pytest.mark.parametrize("N", [33, 64])
def test_every_plan_equals_loop(device, canaries, monkeypatch, product, rows, N):
    monkeypatch.setattr(kernels, "plan", lambda *_: Plan(64, rows, product, 4))
    arguments = problem(5, 4, N, device=device, dtype=torch.float32)
    expected = dense_scan_loop(*(x.double() for x in arguments))
    assert relative_rms(dense_scan(*arguments), expected) <= 1e-6


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
def test_error_of_each_dtype(device, canaries, dtype, bound):
    *arguments, reset = problem(3, 20, 30, device=device, dtype=dtype)
    s = dense_scan(*arguments, reset)
    assert s.dtype == dtype
    assert relative_rms(s, dense_scan_loop(*(x.double() for x in arguments), reset)) <= bound


def test_float32_error_of_gradients(backend):
    u, A, s0, reset = problem(3, 20, 8, device=backend)
    results = []
    for dtype, scan in ((torch.float32, dense_scan), (torch.float64, dense_scan_loop)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (u, A, s0)]
        first = torch.autograd.grad(scan(*leaves, reset).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((first, second))
    for bound, actual, expected in zip((1e-5, 1e-4), *results, strict=True):
        assert all(relative_rms(x, y) <= bound for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("T", "resets"), [(1, "first"), (3, "random")])
def test_gradcheck_and_gradgradcheck(backend, T, resets):
    *leaves, reset = problem(min(T, 2), T, 2, device=backend, resets=resets)
    leaves = [x.requires_grad_() for x in leaves]
    assert gradcheck(
        lambda *x: dense_scan(*x, reset), leaves, check_forward_ad=True, fast_mode=True
    )
    assert gradgradcheck(lambda *x: dense_scan(*x, reset), leaves, fast_mode=True)


def test_vmapped_gradients_over_tasks_equal_a_loop(backend):
    problems = [problem(2, 4, 5, device=backend, seed=g) for g in range(3)]
    u, A, s0, reset = (torch.stack(x) for x in zip(*problems, strict=True))

    def loss(A, u, s0, reset):
        return dense_scan(u, A, s0, reset).square().sum()

    def adapted(A, u, s0, reset):  # the meta-gradient of one inner step
        inner = grad(loss)
        return grad(lambda A: loss(A - 0.01 * inner(A, u, s0, reset), u, s0, reset))(A)

    together = vmap(adapted)(A, u, s0, reset)
    alone = torch.stack([adapted(*p) for p in zip(A, u, s0, reset, strict=True)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        dense_scan(u, A, s0, reset), torch.stack([dense_scan(*p) for p in problems])
    )


def test_forward_mode_equals_reverse_mode(backend):
    u, A, s0, reset = problem(2, 3, 3, device=backend)
    f = lambda A: dense_scan(u, A, s0, reset)
    torch.testing.assert_close(jacfwd(f)(A), jacrev(f)(A))


def test_any_layout_gives_the_same_states(device):
    u, A, s0, reset = problem(3, 5, 6, device=device)
    layouts = {
        "time-major": u.transpose(0, 1).contiguous().transpose(0, 1),
        "every other feature": u.repeat_interleave(2, dim=2)[:, :, ::2],
        "every other step": u.repeat_interleave(2, dim=1)[:, ::2],
        "feature first": u.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    shifted = torch.cat([s0, s0], dim=1)[:, :6]
    transposed = reset.T.contiguous().T
    expected = dense_scan(u, A, s0, reset)
    for name, view in layouts.items():
        s = dense_scan(view, A.T.contiguous().T, shifted, transposed)
        assert torch.equal(s, expected), name
    assert dense_scan(layouts["time-major"], A).transpose(0, 1).is_contiguous()


def test_reset_drops_a_state_that_is_not_finite(backend):
    u, A, s0, reset = problem(2, 5, 4, device=backend)
    u[:, 1] = float("nan")
    reset[:, 2] = True
    s = dense_scan(u, A, s0, reset)
    assert s[:, 1].isnan().all()
    assert s[:, 2:].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, interpreting
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_state_stays_infinite(backend):
    u, A = torch.ones(1, 4, 1, device=backend), torch.full((1, 1), 1e30, device=backend)
    torch.testing.assert_close(dense_scan(u, A), dense_scan_loop(u, A))


def test_split_in_two_equals_whole(backend):
    u, A, s0, reset = problem(3, 7, 6, device=backend)
    first = dense_scan(u[:, :3], A, s0, reset[:, :3])
    second = dense_scan(u[:, 3:], A, first[:, -1], reset[:, 3:])
    assert torch.equal(torch.cat([first, second], dim=1), dense_scan(u, A, s0, reset))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("resets", ["none", "first", "last", "random", "all"])
@pytest.mark.parametrize("T", [3, 4, 5, 8, 9])
def test_chunks_equal_whole(device, canaries, monkeypatch, T, resets, reverse):
    u, A, s0, reset = (x.unsqueeze(0) for x in problem(3, T, 6, device=device, resets=resets))
    reset = None if resets == "none" else reset
    s0 = None if reverse else s0
    expected = kernels.dense_scan(u, A, s0, reset, reverse)
    monkeypatch.setattr(kernels, "CHUNKED_STEPS", 2)
    monkeypatch.setattr(kernels, "chunk_length", lambda _: 4)
    actual = kernels.dense_scan(u, A, s0, reset, reverse)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, interpreting
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("factor", [100.0, 1e100, float("nan")])
def test_powers_too_large_take_the_sequential_path(device, canaries, monkeypatch, factor):
    u, A, s0, reset = (torch.stack([x, x]) for x in problem(2, 9, 5, device=device))
    A[0] *= factor  # the other group stays as it is
    expected = kernels.dense_scan(u, A, s0, reset, False)
    monkeypatch.setattr(kernels, "CHUNKED_STEPS", 2)
    monkeypatch.setattr(kernels, "chunk_length", lambda _: 4)
    actual = kernels.dense_scan(u, A, s0, reset, False)
    assert torch.equal(actual[0].nan_to_num(1.0), expected[0].nan_to_num(1.0))
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-12)


def test_few_long_rows_are_cut_into_chunks(device, monkeypatch):
    passes = []
    monkeypatch.setattr(kernels, "launch", lambda *a: passes.append(a[0]))
    A = torch.zeros(3, 3, device=device)
    for B, T in ((1, 255), (1, 256), (64, 256), (65, 256)):
        dense_scan(torch.zeros(1, device=device).expand(B, T, 3), A)
    assert passes == ["whole", "ends", "whole", "fix", "ends", "whole", "fix", "whole"]
    assert [kernels.chunk_length(T) for T in (256, 1024, 4096)] == [16, 32, 64]


def test_a_state_that_does_not_fit_is_named(device):
    u, A, s0, reset = problem(1, 1, 257, device=device)
    with pytest.raises(
        ValueError, match="dense_scan on a GPU takes at most N = 256 states, got 257"
    ):
        dense_scan(u, A, s0, reset)


@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck(device, reverse):
    u, A, s0, reset = (x.unsqueeze(0) for x in problem(2, 3, 4, device=device))
    leaves = [x.requires_grad_() for x in (u, A)]
    torch.library.opcheck(
        torch.ops.ssm_fast.dense_scan.default,
        (*leaves, None if reverse else s0.requires_grad_(), reset, reverse),
    )


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_sizes(backend, shape):
    u = torch.zeros(shape, device=backend)
    assert dense_scan(u, torch.zeros(shape[2], shape[2], device=backend)).shape == u.shape
