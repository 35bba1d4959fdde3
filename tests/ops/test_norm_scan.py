from __future__ import annotations

import pytest
import torch
from references import norm_scan_loop, relative_rms
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from ssm_fast.ops import norm_scan

RESETS = {"none": [], "first": [0], "last": [-1], "consecutive": [1, 2], "all": slice(None)}


def problem(B=3, T=7, N=5, seed=0, resets="random", dtype=torch.float64):
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
    return *(x.to(dtype) for x in (u, A / N**0.5, weight, bias, s0)), reset


@pytest.mark.parametrize("resets", [*RESETS, "random"])
@pytest.mark.parametrize(
    ("B", "T", "N"), [(1, 1, 1), (2, 1, 64), (7, 9, 3), (5, 33, 63), (13, 17, 64), (3, 6, 130)]
)
def test_float64_equals_loop(B, T, N, resets):
    arguments = problem(B, T, N, resets=resets)
    torch.testing.assert_close(
        norm_scan(*arguments), norm_scan_loop(*arguments), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("N", [8, 63, 64, 65, 128])
def test_float32_error_of_outputs_and_gradients(N):
    *inputs, reset = problem(6, 100, N)
    inputs[1] = inputs[1] * 0.5  # contracting, so that rounding does not grow with time
    weights = torch.randn(6, 100, N, dtype=torch.float64)
    results = []
    for dtype, scan in ((torch.float32, norm_scan), (torch.float64, norm_scan_loop)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        s = scan(*leaves, reset)
        first = torch.autograd.grad((s * weights.to(dtype)).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((s, first, second))
    (s, first, second), (s_ref, first_ref, second_ref) = results
    assert relative_rms(s, s_ref) <= 1e-5
    assert all(relative_rms(x, y) <= 1e-5 for x, y in zip(first, first_ref, strict=True))
    assert all(relative_rms(x, y) <= 1e-4 for x, y in zip(second, second_ref, strict=True))


@pytest.mark.parametrize("resets", [*RESETS, "random"])
@pytest.mark.parametrize("T", [1, 4])
def test_gradcheck_and_gradgradcheck(T, resets):
    *leaves, reset = problem(2, T, 3, resets=resets)
    leaves = [x.requires_grad_() for x in leaves]
    assert gradcheck(
        lambda *x: norm_scan(*x, reset), leaves, check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(lambda *x: norm_scan(*x, reset), leaves, check_fwd_over_rev=True)


def test_third_order_equals_reference():
    u, A, weight, bias, s0, reset = problem(2, 4, 3)

    def third(impl):
        def f(A):
            return norm_scan(u, A, weight, bias, s0, reset, impl=impl).pow(3).sum()

        return jacrev(jacrev(grad(f)))(A)

    torch.testing.assert_close(third("native"), third("reference"), rtol=1e-8, atol=1e-8)


def test_hessian_and_jacobians_equal_reference():
    u, A, weight, bias, s0, reset = problem(2, 5, 3)

    def f(A, weight, impl):
        return norm_scan(u, A, weight, bias, s0, reset, impl=impl).pow(2).sum()

    for argument in (0, 1):
        results = [
            (hessian(f, argument)(A, weight, impl), jacfwd(f, argument)(A, weight, impl))
            for impl in ("native", "reference")
        ]
        torch.testing.assert_close(*results)


def test_grouped_and_vmapped_equal_a_call_per_task():
    problems = [problem(seed=g) for g in range(3)]
    stacked = [torch.stack(x) for x in zip(*problems, strict=True)]
    expected = torch.stack([norm_scan(*p) for p in problems])
    assert torch.equal(norm_scan(*stacked), expected)

    def loss(A, u, weight, bias, s0, reset):
        return norm_scan(u, A, weight, bias, s0, reset).square().sum()

    def adapted(A, *rest):  # the meta-gradient of one inner step
        return grad(lambda A: loss(A - 0.01 * grad(loss)(A, *rest), *rest))(A)

    order = (1, 0, 2, 3, 4, 5)
    together = vmap(adapted)(*(stacked[i] for i in order))
    alone = torch.stack([adapted(*(p[i] for i in order)) for p in problems])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("batched", [(0,), (1,), (2,), (3, 4), (0, 5)])
def test_vmap_of_any_argument_equals_a_loop(batched):
    arguments = problem()
    in_dims = tuple(0 if i in batched else None for i in range(6))
    args = [torch.stack([x, x.flip(0)]) if i in batched else x for i, x in enumerate(arguments)]
    together = vmap(norm_scan, in_dims)(*args)
    for k in range(2):
        one = [x[k] if i in batched else x for i, x in enumerate(args)]
        torch.testing.assert_close(together[k], norm_scan(*one))


def test_compile_sees_one_graph():
    *inputs, reset = problem()

    def loss(*x):
        return norm_scan(x[0] * 2, *x[1:], reset).square().sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = f(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


OPS = ["norm_scan", "norm_scan_tangent", "norm_scan_adjoint", "norm_scan_gradients"]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    u, A, weight, bias, s0, reset = (x.unsqueeze(0) for x in problem(3, 4, 5))
    s, n, rstd = torch.ops.ssm_fast.norm_scan(u, A, weight, bias, s0, reset, 1e-5, True)
    leaves = [x.requires_grad_() for x in (u, s, A, weight, n, rstd)]
    if op == "norm_scan":
        args = (leaves[0], leaves[2], leaves[3], bias, s0.requires_grad_(), reset, 1e-5, True)
    elif op == "norm_scan_tangent":
        args = (*leaves, s0.requires_grad_(), reset)
    elif op == "norm_scan_adjoint":
        args = (*leaves, reset)
    else:  # runs below autograd only
        args = (*(x.detach() for x in leaves), reset)
    torch.library.opcheck(getattr(torch.ops.ssm_fast, op).default, args)


@pytest.mark.parametrize(("B", "T", "N"), [(1, 1, 1), (7, 9, 21), (13, 40, 64)])
def test_first_order_sums_equal_those_of_the_stored_adjoints(B, T, N):
    u, A, weight, bias, s0, reset = (x.unsqueeze(0) for x in problem(B, T, N))
    _, n, rstd = torch.ops.ssm_fast.norm_scan(u, A, weight, bias, s0, reset, 1e-5, True)
    sweep = (torch.randn_like(n), torch.randn_like(n), A, weight, n, rstd, reset)
    z, s = torch.ops.ssm_fast.norm_scan_adjoint(*sweep)
    zeta, weight_grad, bias_grad = torch.ops.ssm_fast.norm_scan_gradients(*sweep)
    assert torch.equal(zeta, z)
    torch.testing.assert_close(weight_grad, (s * n).sum((1, 2)), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(bias_grad, s.sum((1, 2)), rtol=1e-11, atol=1e-11)


def test_split_in_two_equals_whole():
    u, A, weight, bias, s0, reset = problem(4, 31, 17)
    whole = norm_scan(u, A, weight, bias, s0, reset)
    first = norm_scan(u[:, :13], A, weight, bias, s0, reset[:, :13])
    second = norm_scan(u[:, 13:], A, weight, bias, first[:, -1], reset[:, 13:])
    assert torch.equal(torch.cat([first, second], dim=1), whole)


def test_any_layout_gives_the_same_states():
    u, *rest = problem(5, 8, 21)
    expected = norm_scan(u, *rest)
    time_major = u.transpose(0, 1).contiguous().transpose(0, 1)
    states = norm_scan(time_major, *rest)
    assert torch.equal(states, expected)
    assert states.transpose(0, 1).is_contiguous()
    assert torch.equal(norm_scan(u.repeat_interleave(2, dim=2)[:, :, ::2], *rest), expected)


def test_a_large_mean_does_not_spoil_the_variance():
    u, A, weight, bias, s0, reset = problem(3, 4, 63, dtype=torch.float32)
    arguments = (u + 1e3, A, weight, bias, s0, reset)
    expected = norm_scan_loop(*(x.double() for x in arguments[:-1]), reset)
    assert relative_rms(norm_scan(*arguments), expected) <= 1e-4


def test_every_element_is_written(monkeypatch):
    arguments = problem(5, 9, 21)
    expected = norm_scan(*arguments)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan"))
    )
    assert torch.equal(norm_scan(*arguments), expected)
    arguments[0].requires_grad_()
    assert norm_scan(*arguments).sum().backward() is None
    assert arguments[0].grad.isfinite().all()


def test_results_are_bitwise_the_same_for_any_thread_count():
    *inputs, reset = problem(37, 40, 63, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            s = norm_scan(*leaves, reset)
            results.append((s, *torch.autograd.grad(s.sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_empty_sizes(shape):
    N = shape[2]
    assert norm_scan(torch.zeros(shape), torch.eye(N), torch.ones(N), torch.zeros(N)).shape == shape


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
        ({"impl": "triton"}, ValueError, "impl='triton' of norm_scan cannot run on cpu"),
        ({"impl": "fast"}, ValueError, "unknown impl 'fast'"),
        ({"bias": torch.zeros(5).double()}, TypeError, "bias must have the dtype of u"),
    ],
)
def test_wrong_arguments_raise_before_a_kernel_runs(change, error, message):
    arguments = {
        "u": torch.zeros(3, 7, 5),
        "A": torch.zeros(5, 5),
        "weight": torch.ones(5),
        "bias": torch.zeros(5),
    }
    with pytest.raises(error, match=message):
        norm_scan(**(arguments | change))
