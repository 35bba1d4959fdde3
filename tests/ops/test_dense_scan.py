from __future__ import annotations

import numpy as np
import pytest
import torch
from references import dense_scan_loop, relative_rms
from scipy import signal
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from ssm_fast.ops import dense_scan

RESETS = {
    "none": [],
    "first": [0],
    "last": [-1],
    "consecutive": [1, 2],
    "all": slice(None),
}


def problem(B, T, N, *, dtype=torch.float64, seed=0, radius=0.9, resets="none", s0=True):
    """Inputs of a scan whose states stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(B, T, N, dtype=torch.float64, generator=generator)
    A = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=generator))[0] * radius
    initial = torch.randn(B, N, dtype=torch.float64, generator=generator) if s0 else None
    reset = torch.zeros(B, T, dtype=torch.bool)
    if resets == "random":
        reset = torch.rand(B, T, generator=generator) < 0.2
    else:
        steps = RESETS[resets]
        reset[:, [t for t in steps if t < T] if isinstance(steps, list) else steps] = True
    return u.to(dtype), A.to(dtype), None if initial is None else initial.to(dtype), reset


@pytest.mark.parametrize("resets", [*RESETS, "random"])
@pytest.mark.parametrize(
    ("B", "T", "N"),
    [
        (1, 1, 1),
        (2, 1, 64),
        (7, 9, 3),
        (5, 33, 63),
        (13, 17, 64),
        (3, 6, 65),
        (2, 5, 130),
        (1, 4, 500),
        (60, 3, 300),
    ],
)
def test_float64_equals_loop(B, T, N, resets):
    u, A, s0, reset = problem(B, T, N, resets=resets)
    torch.testing.assert_close(
        dense_scan(u, A, s0, reset), dense_scan_loop(u, A, s0, reset), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("N", [1, 8, 63, 64, 65, 128, 500])
def test_float32_error_of_outputs_and_gradients(N):
    u, A, s0, reset = problem(6, 100, N, resets="random")
    weights = torch.randn(6, 100, N, dtype=torch.float64)
    results = []
    for dtype, scan in ((torch.float32, dense_scan), (torch.float64, dense_scan_loop)):
        leaves = [x.to(dtype).requires_grad_() for x in (u, A, s0)]
        s = scan(*leaves, reset)
        first = torch.autograd.grad((s * weights.to(dtype)).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves[1:])
        results.append((s, first, second))
    (s, first, second), (s_ref, first_ref, second_ref) = results
    assert relative_rms(s, s_ref) <= 1e-5
    for actual, expected in zip(first, first_ref, strict=True):
        assert relative_rms(actual, expected) <= 1e-5
    for actual, expected in zip(second, second_ref, strict=True):
        assert relative_rms(actual, expected) <= 1e-4


CHUNKED = [(2048, 5), (2111, 32), (2113, 96)]  # sizes of one row that is cut into chunks of time


@pytest.mark.parametrize("resets", ["none", "sparse"])
@pytest.mark.parametrize(("T", "N"), CHUNKED)
def test_long_time_of_one_row_equals_loop(T, N, resets):
    u, A, s0, reset = problem(1, T, N)
    if resets == "sparse":
        reset[:, [63, 64, 700, 1151, 2047]] = True
    weights = torch.randn(1, T, N, dtype=torch.float64)
    results = []
    for dtype, scan in (
        (torch.float64, dense_scan_loop),
        (torch.float64, dense_scan),
        (torch.float32, dense_scan),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (u, A, s0)]
        s = scan(*leaves, reset)
        results.append((s, *torch.autograd.grad((s * weights.to(dtype)).sum(), leaves)))
    for expected, double, single in zip(*results, strict=True):
        torch.testing.assert_close(double, expected, rtol=1e-10, atol=1e-10)
        assert relative_rms(single, expected) <= 1e-5


def test_long_time_with_powers_out_of_range_equals_loop():
    u, A, s0, reset = problem(1, 2048, 8, radius=1.5, dtype=torch.float32)
    reset[:, ::50] = True  # A^64 would amplify rounding errors: one sweep
    expected = dense_scan_loop(*(x.double() for x in (u, A, s0)), reset)
    assert relative_rms(dense_scan(u, A, s0, reset), expected) <= 1e-5
    overflow = dense_scan(u, A * 1e3, s0, reset)  # inf - inf in powers and states alike
    torch.testing.assert_close(overflow[:, ::50], u[:, ::50])


def test_long_time_after_a_reset_forgets_a_state_that_is_not_finite():
    u, A, s0, reset = problem(1, 2048, 8)
    u[:, 100] = float("inf")
    reset[:, 300] = True
    s = dense_scan(u, A, s0, reset)
    assert not s[:, 100:300].isfinite().any()
    assert s[:, 300:].isfinite().all()
    torch.testing.assert_close(s[:, 300:], dense_scan_loop(u[:, 300:], A))


@pytest.mark.parametrize("resets", [*RESETS, "random"])
@pytest.mark.parametrize("T", [1, 4])
def test_gradcheck_and_gradgradcheck(T, resets):
    u, A, s0, reset = problem(2, T, 3, resets=resets)
    leaves = [x.requires_grad_() for x in (u, A, s0)]

    def scan(u, A, s0):
        return dense_scan(u, A, s0, reset)

    assert gradcheck(scan, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(scan, leaves, check_fwd_over_rev=True)


def test_third_order_equals_reference():
    u, A, s0, reset = problem(2, 5, 3, resets="random")

    def third(impl):
        def f(A):
            return dense_scan(u, A, s0, reset, impl=impl).pow(3).sum()

        return jacrev(jacrev(grad(f)))(A)

    torch.testing.assert_close(third("native"), third("reference"), rtol=1e-9, atol=1e-9)


def test_grouped_equals_a_call_per_group():
    problems = [problem(4, 9, 19, seed=g, resets="random") for g in range(3)]
    u, A, s0, reset = (torch.stack(x) for x in zip(*problems, strict=True))
    expected = torch.stack([dense_scan(*p) for p in problems])
    assert torch.equal(dense_scan(u, A, s0, reset), expected)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_vmapped_gradients_over_tasks_equal_a_loop(impl):
    problems = [problem(3, 7, 5, seed=g, resets="random") for g in range(4)]
    u, A, s0, reset = (torch.stack(x) for x in zip(*problems, strict=True))

    def loss(A, u, s0, reset):
        return dense_scan(u, A, s0, reset, impl=impl).square().sum()

    def adapted(A, u, s0, reset):  # the meta-gradient of one inner step
        def outer(A):
            return loss(A - 0.01 * grad(loss)(A, u, s0, reset), u, s0, reset)

        return grad(outer)(A)

    together = vmap(adapted)(A, u, s0, reset)
    alone = torch.stack([adapted(*p) for p in zip(A, u, s0, reset, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, 2, 0), (2, None, 1)])
def test_vmap_of_any_dimension_equals_a_loop(in_dims):
    u, A, s0, _ = problem(3, 4, 5)
    args = [
        x if d is None else torch.stack([x, 2 * x, -x], dim=d)
        for x, d in zip((u, A, s0), in_dims, strict=True)
    ]
    together = vmap(dense_scan, in_dims)(*args)
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]
        torch.testing.assert_close(together[i], dense_scan(*one))


def test_nested_vmap_equals_loops():
    u, A, s0, reset = problem(2, 6, 4, resets="random")
    As = torch.stack([torch.stack([A * (i + 1) * (j + 1) / 6 for j in range(3)]) for i in range(2)])
    together = vmap(vmap(lambda A: dense_scan(u, A, s0, reset)))(As)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], dense_scan(u, As[i, j], s0, reset))


def test_forward_mode_equals_reverse_mode():
    u, A, s0, reset = problem(2, 6, 4, resets="random")

    def f(A):
        return dense_scan(u, A, s0, reset)

    torch.testing.assert_close(jacfwd(f)(A), jacrev(f)(A))
    _, tangent = jvp(f, (A,), (torch.ones_like(A),))
    torch.testing.assert_close(tangent, jacrev(f)(A).sum(dim=(-1, -2)))


@pytest.mark.parametrize("resets", ["none", "random"])
def test_compile_sees_one_graph(resets):
    u, A, s0, reset = problem(3, 8, 5, resets=resets)

    def loss(u, A, s0):
        return (dense_scan(u * 2, A, s0, reset) ** 2).sum()

    eager, compiled = [], []
    for f, out in (
        (loss, eager),
        (torch.compile(loss, fullgraph=True, backend="aot_eager"), compiled),
    ):
        leaves = [x.clone().requires_grad_() for x in (u, A, s0)]
        value = f(*leaves)
        out.extend([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time_major", [False, True])
def test_opcheck(reverse, time_major):
    u, A, s0, reset = problem(3, 4, 5, resets="random")
    if time_major:
        u = u.transpose(0, 1).contiguous().transpose(0, 1)
    args = (
        u.unsqueeze(0).requires_grad_(),
        A.unsqueeze(0).requires_grad_(),
        None if reverse else s0.unsqueeze(0).requires_grad_(),
        reset.unsqueeze(0),
        reverse,
    )
    torch.library.opcheck(torch.ops.ssm_fast.dense_scan.default, args)


def test_scipy_dlsim_is_the_same_linear_system():
    _, A, s0, _ = problem(1, 50, 6)
    B = torch.randn(6, 2, dtype=torch.float64)
    x = torch.randn(50, 2, dtype=torch.float64)
    system = (A.numpy(), B.numpy(), np.eye(6), np.zeros((6, 2)), 1.0)
    _, _, states = signal.dlsim(system, x.numpy(), x0=s0[0].numpy())  # states[t] precedes x[t]
    ours = dense_scan((x @ B.T).unsqueeze(0), A, s0)[0]
    np.testing.assert_allclose(ours[:-1].numpy(), states[1:], rtol=1e-12, atol=1e-12)


def test_split_in_two_equals_whole():
    u, A, s0, reset = problem(4, 31, 17, resets="random")
    whole = dense_scan(u, A, s0, reset)
    first = dense_scan(u[:, :13], A, s0, reset[:, :13])
    second = dense_scan(u[:, 13:], A, first[:, -1], reset[:, 13:])
    assert torch.equal(torch.cat([first, second], dim=1), whole)


def test_any_layout_gives_the_same_states_and_gradients():
    u, A, s0, reset = problem(5, 8, 21, resets="random")
    layouts = {
        "time-major": u.transpose(0, 1).contiguous().transpose(0, 1),
        "every other feature": u.repeat_interleave(2, dim=2)[:, :, ::2],
        "every other step": u.repeat_interleave(2, dim=1)[:, ::2],
        "feature first": u.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    transposed = A.T.contiguous().T
    shifted = torch.cat([s0, s0], dim=1)[:, :21]
    expected = dense_scan(u, A, s0, reset)
    weights = torch.randn_like(expected)
    expected_grad = torch.autograd.grad(
        (dense_scan(u, A.requires_grad_(), s0, reset) * weights).sum(), A
    )[0]
    for name, view in layouts.items():
        assert torch.equal(dense_scan(view, transposed, shifted, reset), expected), name
        leaf = transposed.detach().requires_grad_()
        (actual,) = torch.autograd.grad((dense_scan(view, leaf, s0, reset) * weights).sum(), leaf)
        torch.testing.assert_close(actual, expected_grad, msg=name)


def test_time_major_input_gives_time_major_states():
    u, A, _, _ = problem(5, 8, 4)
    assert (
        dense_scan(u.transpose(0, 1).contiguous().transpose(0, 1), A)
        .transpose(0, 1)
        .is_contiguous()
    )


def test_broadcast_gradient_is_accepted():
    u, A, s0, _ = problem(3, 4, 5)
    u.requires_grad_()
    dense_scan(u, A, s0).sum().backward()  # the gradient arrives with strides of zero
    (expected,) = torch.autograd.grad(dense_scan_loop(u, A, s0).sum(), u)
    torch.testing.assert_close(u.grad, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_reset_may_be_any_number(dtype):
    u, A, s0, reset = problem(3, 6, 5, resets="random")
    assert torch.equal(dense_scan(u, A, s0, reset.to(dtype)), dense_scan(u, A, s0, reset))


def test_reset_drops_a_state_that_is_not_finite():
    u, A, s0, reset = problem(2, 5, 4)
    u[:, 1] = float("nan")
    reset[:, 2] = True
    s = dense_scan(u, A, s0, reset)
    assert s[:, 1].isnan().all()
    assert s[:, 2:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)])
def test_empty_sizes(shape):
    B, _, N = shape
    u = torch.zeros(shape, requires_grad=True)
    A = torch.zeros(N, N, requires_grad=True)
    s = dense_scan(u, A, torch.zeros(B, N))
    assert s.shape == u.shape
    s.sum().backward()
    assert u.grad.shape == u.shape
    assert A.grad is None or torch.equal(A.grad, torch.zeros(N, N))


def test_inputs_are_left_as_they_were():
    tensors = problem(4, 9, 21, resets="random")
    copies = [x.clone() for x in tensors]
    u, A, s0, reset = tensors
    dense_scan(u, A.requires_grad_(), s0, reset).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


def test_every_element_is_written(monkeypatch):
    u, A, s0, reset = problem(5, 9, 21, resets="random")
    expected = dense_scan(u, A, s0, reset)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan"))
    )
    assert torch.equal(dense_scan(u, A, s0, reset), expected)


@pytest.mark.parametrize(("B", "T", "N"), [(37, 40, 63), (3, 9, 300), (1, 2111, 16), (1, 2048, 96)])
def test_results_are_bitwise_the_same_for_any_thread_count(B, T, N):
    u, A, s0, reset = problem(B, T, N, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(dense_scan(u, A, s0, reset))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"A": torch.zeros(5, 4)},
            ValueError,
            r"A must have shape \[N, N\] = \[5, 5\], got \[5, 4\]",
        ),
        ({"s0": torch.zeros(2, 5)}, ValueError, r"s0 must have shape \[B, N\] = \[3, 5\]"),
        ({"reset": torch.zeros(3, 5)}, ValueError, r"reset must have shape \[B, T\] = \[3, 4\]"),
        ({"u": torch.zeros(3, 5)}, ValueError, "u must have shape"),
        (
            {"u": torch.zeros(3, 4, 5, dtype=torch.int64)},
            TypeError,
            "u of dense_scan must be float32",
        ),
        ({"A": torch.zeros(5, 5, dtype=torch.float64)}, TypeError, "A must have the dtype of u"),
        ({"A": [[1.0]]}, TypeError, "A must be a torch.Tensor, got list"),
        ({"s0": [[0.0]]}, TypeError, "s0 must be a torch.Tensor, got list"),
        ({"A": torch.zeros(5, 5, device="meta")}, ValueError, "A must be on the device of u, cpu"),
        ({"s0": torch.zeros(3, 5, device="meta")}, ValueError, "s0 must be on the device of u"),
        ({"reset": torch.zeros(3, 4, device="meta")}, ValueError, "reset must be on the device of"),
        ({"reset": torch.zeros(3, 4, dtype=torch.complex64)}, TypeError, "reset must be boolean"),
        ({"impl": "fast"}, ValueError, "unknown impl 'fast'; expected one of auto, native"),
        ({"impl": "triton"}, ValueError, "impl='triton' of dense_scan cannot run on cpu"),
        ({"u": torch.zeros(3, 4, 5, device="meta")}, RuntimeError, "has no kernel for device meta"),
    ],
)
def test_wrong_arguments_raise_before_a_kernel_runs(change, error, message):
    arguments = {"u": torch.zeros(3, 4, 5), "A": torch.zeros(5, 5)} | change
    with pytest.raises(error, match=message):
        dense_scan(**arguments)
