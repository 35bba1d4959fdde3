from __future__ import annotations

import numpy as np
import pytest
import torch
from references import linear_scan_gradients, linear_scan_loop
from torch.func import grad, jacrev

from ssm_fast.ops import linear_scan

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-13,
    torch.complex64: 1e-5,
    torch.complex128: 1e-13,
}


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=dtype, generator=generator)


def coefficients(*shape, dtype=torch.float64, seed=1):
    a = draw(*shape, dtype=dtype, seed=seed)
    return a / (1 + a.abs())  # inside the unit disc


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((1, 1), 1),
        ((1, 17), 1),
        ((37, 50), 1),
        ((37, 50), 0),
        ((64, 33), -1),
        ((16, 16), 1),
        ((5, 9, 3), 1),
        ((2, 7, 63), 1),
        ((3, 5, 4, 6), 1),
        ((3, 4, 6, 5), -1),
        ((11, 4, 6), 0),
        ((2, 3, 5000), 1),
        ((19,), 0),
    ],
)
def test_equals_loop(shape, dim, dtype, reverse):
    a, b = coefficients(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    h0 = b.select(dim, 0).clone() * 2
    for initial in (None, h0):
        actual = linear_scan(a, b, initial, reverse=reverse, dim=dim)
        expected = linear_scan_loop(
            a.numpy(),
            b.numpy(),
            None if initial is None else initial.numpy(),
            reverse,
            dim % len(shape),
        )
        np.testing.assert_allclose(
            actual.numpy(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "a_shape", [(), (1,), (6,), (9, 1), (9, 6), (4, 1, 1), (4, 1, 6), (4, 9, 1)]
)
def test_coefficients_broadcast(a_shape, reverse):
    a, b = coefficients(*a_shape), draw(4, 9, 6)
    expected = linear_scan_loop(a.numpy(), b.numpy(), None, reverse, 1)
    np.testing.assert_allclose(
        linear_scan(a, b, reverse=reverse).numpy(), expected, rtol=1e-13, atol=1e-13
    )


def test_third_order_equals_reference():
    b, h0 = draw(2, 5, 3), draw(2, 3)

    def third(impl):
        def f(a):
            return linear_scan(a, b, h0, impl=impl).pow(3).sum()

        return jacrev(jacrev(grad(f)))(coefficients(3))

    torch.testing.assert_close(third("native"), third("reference"), rtol=1e-9, atol=1e-9)


def test_conjugate_views_are_resolved():
    a, b = coefficients(3, 5, 2, dtype=torch.complex128), draw(3, 5, 2, dtype=torch.complex128)
    torch.testing.assert_close(
        linear_scan(a.conj(), b.conj()), linear_scan(a, b).conj().resolve_conj()
    )


LONG = [((1, 40_001), 1), ((40_001, 1), 0), ((3, 20_000), 1), ((1, 9001, 3), 1), ((7, 4100), 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "dim"), LONG)
def test_chunks_of_time_equal_the_loop(shape, dim, reverse, dtype):
    a, b = coefficients(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    a.select(dim, 5000 % shape[dim]).zero_()  # as at the start of an episode
    h0 = b.select(dim, 0).clone() * 2
    for initial in (None, h0):
        expected = linear_scan_loop(
            a.numpy(), b.numpy(), None if initial is None else h0.numpy(), reverse, dim
        )
        actual = linear_scan(a, b, initial, reverse=reverse, dim=dim)
        np.testing.assert_allclose(
            actual.numpy(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize(("shape", "dim"), LONG)
def test_gradients_over_chunks_of_time(shape, dim):
    leaves = [coefficients(*shape).requires_grad_(), draw(*shape).requires_grad_()]
    h = linear_scan(*leaves, dim=dim)
    actual = torch.autograd.grad(h.square().sum(), leaves)
    a, states = (x.detach().movedim(dim, 0).numpy() for x in (leaves[0], h))
    for x, y in zip(actual, linear_scan_gradients(a, states, 2 * states), strict=True):
        np.testing.assert_allclose(x.movedim(dim, 0).numpy(), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_coefficient_over_chunks_of_time(dtype):
    b = draw(1, 20_000, 2, dtype=dtype)
    a = coefficients(2, dtype=dtype)
    expected = linear_scan_loop(a.numpy(), b.numpy(), None, False, 1)
    np.testing.assert_allclose(
        linear_scan(a, b).numpy(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_growing_products_do_not_cancel():
    T = 20_000
    a, b = torch.full((1, T), 2.0), torch.full((1, T), -1.0)
    assert torch.equal(linear_scan(a, b, torch.ones(1)), torch.ones(1, T))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [0, 4000, 19_999])
@pytest.mark.parametrize("what", ["a", "b"])
def test_what_is_not_finite_spreads_over_chunks_as_in_the_loop(what, where, value):
    inputs = {"a": coefficients(1, 20_000).abs() + 0.01, "b": draw(1, 20_000)}
    inputs[what][0, where] = value
    with np.errstate(invalid="ignore", over="ignore"):
        expected = linear_scan_loop(inputs["a"].numpy(), inputs["b"].numpy(), None, False, 1)
    if (what, where) == ("a", 0):
        expected = expected[:, :0]  # with nothing incoming the first coefficient is not used
    actual = linear_scan(inputs["a"], inputs["b"]).numpy()[:, : expected.shape[1]]
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_underflow_loses_nothing_that_counts():
    T = 20_000
    b = torch.zeros(1, T)
    b[0, 0] = 1e30
    h = linear_scan(torch.full((1, T), 0.99), b)
    expected = 1e30 * 0.99 ** torch.arange(T, dtype=torch.float64)
    torch.testing.assert_close(h[0].double(), expected, rtol=1e-2, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1000, 512), (1030, 1031, 1), (1, 1031, 1030)])
@pytest.mark.parametrize("a_shape", [None, (1,)])
def test_large_outputs(shape, a_shape, dtype):
    b = draw(*shape, dtype=dtype)
    a = coefficients(*(a_shape or shape), dtype=dtype)
    for reverse in (False, True):
        expected = linear_scan_loop(a.numpy(), b.numpy(), None, reverse, 1)
        np.testing.assert_allclose(
            linear_scan(a, b, reverse=reverse).numpy(),
            expected,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
        )


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)]
)
@pytest.mark.parametrize("shape", [(6, 40, 10), (20, 33, 1), (1, 33, 20), (20, 33, 4)])
def test_states_lie_in_memory_as_the_inputs_do(shape, order):
    back = [order.index(i) for i in range(3)]
    a, b = (
        x.permute(order).contiguous().permute(back) for x in (coefficients(*shape), draw(*shape))
    )
    h = linear_scan(a, b)
    assert h.squeeze().stride() == b.squeeze().stride()
    expected = linear_scan_loop(a.numpy(), b.numpy(), None, False, 1)
    np.testing.assert_allclose(h.numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"a": torch.ones(3, 5)},
            ValueError,
            r"a must be broadcastable to the shape of b, \[3, 4\]",
        ),
        (
            {"h0": torch.ones(4)},
            ValueError,
            r"h0 must have shape b without time = \[3\], got \[4\]",
        ),
        ({"dim": 2}, ValueError, r"dim must be a dimension of b, \[3, 4\], got 2"),
        ({"b": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "b of linear_scan must be float32"),
        ({"a": torch.ones(3, 4, dtype=torch.float64)}, TypeError, "a must have the dtype of b"),
        ({"h0": 0.0}, TypeError, "h0 must be a torch.Tensor, got float"),
        ({"a": torch.ones(3, 4, device="meta")}, ValueError, "a must be on the device of b, cpu"),
        ({"b": 3.0}, TypeError, "b must be a torch.Tensor, got float"),
        ({"impl": "triton"}, ValueError, "cannot run on cpu"),
    ],
)
def test_wrong_arguments_raise_before_a_kernel_runs(change, error, message):
    with pytest.raises(error, match=message):
        linear_scan(**({"a": torch.ones(3, 4), "b": torch.ones(3, 4)} | change))
