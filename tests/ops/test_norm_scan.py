from __future__ import annotations

import pytest
import torch
from references import norm_scan_loop, relative_rms
from torch.func import grad, hessian, jacfwd, jacrev

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


def test_a_large_mean_does_not_spoil_the_variance():
    u, A, weight, bias, s0, reset = problem(3, 4, 63, dtype=torch.float32)
    arguments = (u + 1e3, A, weight, bias, s0, reset)
    expected = norm_scan_loop(*(x.double() for x in arguments[:-1]), reset)
    assert relative_rms(norm_scan(*arguments), expected) <= 1e-4


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
