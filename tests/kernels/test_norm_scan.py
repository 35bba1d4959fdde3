from __future__ import annotations

import pytest
import torch
from references import norm_scan_loop, relative_rms
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

from ssm_fast.ops import norm_scan

pytest.importorskip("triton")
from ssm_fast.kernels import norm_scan as kernels
from ssm_fast.kernels.recurrence import Plan

RESETS = {"none": [], "first": [0], "last": [-1], "consecutive": [1, 2], "all": slice(None)}


def problem(B=2, T=3, N=4, *, device="cpu", dtype=torch.float64, seed=0, resets="random"):
    """Inputs, weights and episode starts of a scan."""
    generator = torch.Generator().manual_seed(seed)
    u, A, weight, bias, s0 = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in [(B, T, N), (N, N), (N,), (N,), (B, N)]
    )
    reset = torch.rand(B, T, generator=generator) < 0.3
    if resets != "random":
        reset[:] = False
        steps = RESETS[resets]
        reset[:, [t for t in steps if t < T] if isinstance(steps, list) else steps] = True
    inputs = (u, 0.5 * A / N**0.5, weight, bias, s0)
    return *(x.to(device, dtype) for x in inputs), reset.to(device)


@pytest.mark.parametrize("resets", [*RESETS, "random"])
@pytest.mark.parametrize(("B", "T", "N"), [(1, 1, 1), (3, 5, 17), (2, 3, 64)])
def test_float64_equals_loop(backend, canaries, B, T, N, resets):
    arguments = problem(B, T, N, device=backend, resets=resets)
    torch.testing.assert_close(
        norm_scan(*arguments), norm_scan_loop(*arguments), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("N", [65, 129, 256])
def test_large_states_equal_loop(device, canaries, N):
    arguments = problem(2, 3, N, device=device)
    torch.testing.assert_close(
        norm_scan(*arguments), norm_scan_loop(*arguments), rtol=1e-11, atol=1e-11
    )


def sweeps(arguments, second):
    """Outputs of all three sweeps, with and without the tensors that may be left out."""
    u, A, weight, bias, s0, reset = (x.unsqueeze(0) for x in arguments)
    second = second.unsqueeze(0)
    ops = torch.ops.ssm_fast
    s, n, rstd = ops.norm_scan(u, A, weight, bias, s0, reset, 1e-5, True)
    bare, *_ = ops.norm_scan(u, A, weight, bias, None, None, 1e-5, False)
    return {
        "forward": (s, n, rstd),
        "forward, no s0, no reset": (bare,),
        "tangent": ops.norm_scan_tangent(u, second, A, weight, n, rstd, s0, reset),
        "tangent, bare": ops.norm_scan_tangent(u, None, A, weight, n, rstd, None, None),
        "adjoint": ops.norm_scan_adjoint(u, second, A, weight, n, rstd, reset),
        "adjoint, bare": ops.norm_scan_adjoint(u, None, A, weight, n, rstd, None),
    }


@pytest.mark.parametrize("product", ["sum", "stream", "ieee"])
@pytest.mark.parametrize(("B", "T", "N"), [(1, 1, 2), (3, 2, 9), (5, 4, 33)])
def test_sweeps_equal_native(canaries, device, monkeypatch, product, B, T, N):
    from ssm_fast.ops import dispatch

    monkeypatch.setattr(
        kernels, "plan", lambda *_: Plan(64, 16 if product == "ieee" else 2, product, 4)
    )
    arguments = problem(B, T, N)
    second = torch.randn(B, T, N, dtype=torch.float64)
    actual = sweeps([x.to(device) for x in arguments], second.to(device))
    with monkeypatch.context() as native:
        native.setattr(dispatch, "_interpreting", False)
        expected = sweeps(arguments, second)
    for name, outputs in expected.items():
        for x, y in zip(actual[name], outputs, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_error_of_each_dtype(device, canaries, dtype, bound):
    arguments = problem(3, 12, 30, device=device, dtype=dtype)
    s = norm_scan(*arguments)
    assert s.dtype == dtype
    assert relative_rms(s, norm_scan_loop(*(x.double() for x in arguments))) <= bound


def test_float32_error_of_gradients(backend):
    *inputs, reset = problem(3, 12, 8, device=backend)
    results = []
    for dtype, scan in ((torch.float32, norm_scan), (torch.float64, norm_scan_loop)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        first = torch.autograd.grad(scan(*leaves, reset).pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((first, second))
    for bound, actual, expected in zip((1e-5, 1e-4), *results, strict=True):
        assert all(relative_rms(x, y) <= bound for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("T", "resets"), [(1, "first"), (3, "random")])
def test_gradcheck_and_gradgradcheck(backend, T, resets):
    *leaves, reset = problem(min(T, 2), T, 3, device=backend, resets=resets)
    leaves = [x.requires_grad_() for x in leaves]
    assert gradcheck(lambda *x: norm_scan(*x, reset), leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(lambda *x: norm_scan(*x, reset), leaves, fast_mode=True)


def test_vmapped_gradients_over_tasks_equal_a_loop(backend):
    problems = [problem(device=backend, seed=g) for g in range(3)]
    stacked = [torch.stack(x) for x in zip(*problems, strict=True)]

    def loss(A, u, weight, bias, s0, reset):
        return norm_scan(u, A, weight, bias, s0, reset).square().sum()

    def adapted(A, *rest):  # the meta-gradient of one inner step
        return grad(lambda A: loss(A - 0.01 * grad(loss)(A, *rest), *rest))(A)

    order = (1, 0, 2, 3, 4, 5)
    together = vmap(adapted)(*(stacked[i] for i in order))
    alone = torch.stack([adapted(*(p[i] for i in order)) for p in problems])
    torch.testing.assert_close(together, alone)


def test_forward_mode_equals_reverse_mode(backend):
    u, A, *rest = problem(2, 3, 2, device=backend)
    f = lambda A: norm_scan(u, A, *rest)
    torch.testing.assert_close(jacfwd(f)(A), jacrev(f)(A))


def test_any_layout_gives_the_same_states(device):
    u, A, *rest = problem(3, 4, 6, device=device)
    expected = norm_scan(u, A, *rest)
    for view in (
        u.transpose(0, 1).contiguous().transpose(0, 1),
        u.repeat_interleave(2, dim=2)[:, :, ::2],
        u.repeat_interleave(2, dim=1)[:, ::2],
    ):
        assert torch.equal(norm_scan(view, A.T.contiguous().T, *rest), expected)


def test_reset_drops_a_state_that_is_not_finite(backend):
    u, *rest, reset = problem(2, 5, 4, device=backend)
    u[:, 1] = float("nan")
    reset[:, 2] = True
    s = norm_scan(u, *rest, reset)
    assert s[:, 1].isnan().all()
    assert s[:, 2:].isfinite().all()


def test_a_state_that_does_not_fit_is_named(device):
    with pytest.raises(
        ValueError, match="norm_scan on a GPU takes at most N = 256 states, got 300"
    ):
        norm_scan(*problem(1, 1, 300, device=device))
