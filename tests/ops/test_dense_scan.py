from __future__ import annotations

import numpy as np
import pytest
import torch
from references import dense_scan_loop, relative_rms
from scipy import signal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, vmap

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


def test_third_order_equals_reference():
    u, A, s0, reset = problem(2, 5, 3, resets="random")

    def third(impl):
        def f(A):
            return dense_scan(u, A, s0, reset, impl=impl).pow(3).sum()

        return jacrev(jacrev(grad(f)))(A)

    torch.testing.assert_close(third("native"), third("reference"), rtol=1e-9, atol=1e-9)


def test_vmapped_gradients_of_the_reference_equal_a_loop():
    problems = [problem(3, 7, 5, seed=g, resets="random") for g in range(4)]
    u, A, s0, reset = (torch.stack(x) for x in zip(*problems, strict=True))

    def loss(A, u, s0, reset):
        return dense_scan(u, A, s0, reset, impl="reference").square().sum()

    def adapted(A, u, s0, reset):  # the meta-gradient of one inner step
        def outer(A):
            return loss(A - 0.01 * grad(loss)(A, u, s0, reset), u, s0, reset)

        return grad(outer)(A)

    together = vmap(adapted)(A, u, s0, reset)
    alone = torch.stack([adapted(*p) for p in zip(A, u, s0, reset, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_nested_vmap_equals_loops():
    u, A, s0, reset = problem(2, 6, 4, resets="random")
    As = torch.stack([torch.stack([A * (i + 1) * (j + 1) / 6 for j in range(3)]) for i in range(2)])
    together = vmap(vmap(lambda A: dense_scan(u, A, s0, reset)))(As)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], dense_scan(u, As[i, j], s0, reset))


def test_scipy_dlsim_is_the_same_linear_system():
    _, A, s0, _ = problem(1, 50, 6)
    B = torch.randn(6, 2, dtype=torch.float64)
    x = torch.randn(50, 2, dtype=torch.float64)
    system = (A.numpy(), B.numpy(), np.eye(6), np.zeros((6, 2)), 1.0)
    _, _, states = signal.dlsim(system, x.numpy(), x0=s0[0].numpy())  # states[t] precedes x[t]
    ours = dense_scan((x @ B.T).unsqueeze(0), A, s0)[0]
    np.testing.assert_allclose(ours[:-1].numpy(), states[1:], rtol=1e-12, atol=1e-12)


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


def test_second_order_through_a_compiled_function():
    # Compiled without AOT autograd, the op's registered gradients are differentiated again.
    u, A = torch.randn(2, 9, 5, dtype=torch.float64), 0.3 * torch.randn(5, 5, dtype=torch.float64)

    def second(f):
        x = u.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x, A), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    def loss(u, A):
        return dense_scan(u, A).pow(3).sum()

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(second(compiled), second(loss))


def test_tensors_that_are_not_what_they_look_like():
    z = torch.randn(2, 9, 5, dtype=torch.complex128)
    A = 0.3 * torch.randn(5, 5, dtype=torch.float64)
    negated = z.conj().imag  # a view of memory with the other sign
    assert negated.is_neg()
    torch.testing.assert_close(dense_scan(negated, A), dense_scan(negated.resolve_neg(), A))
    with FakeTensorMode():
        fake = torch.empty(2, 9, 5)
        fake_A = torch.empty(5, 5)
    assert dense_scan(fake, fake_A).shape == (2, 9, 5)
    zero = torch._efficientzerotensor((2, 9, 5), dtype=torch.float64)
    assert not dense_scan(zero, A).any()


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_jit_trace_sees_the_op():
    u, A = torch.randn(2, 9, 5), 0.3 * torch.randn(5, 5)
    traced = torch.jit.trace(lambda u: dense_scan(u, A), (u,), check_trace=False)
    x = torch.randn(2, 9, 5)
    torch.testing.assert_close(traced(x), dense_scan(x, A))


def test_one_row_with_an_infinity_and_underflowing_powers():
    u = torch.randn(1, 4096, 1)
    u[0, 5] = torch.inf
    A = torch.full((1, 1), 0.1)
    assert torch.equal(dense_scan(u, A).isnan(), dense_scan(u, A, impl="reference").isnan())
