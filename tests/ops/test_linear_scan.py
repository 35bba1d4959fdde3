from __future__ import annotations

import numpy as np
import pytest
import torch
from references import linear_scan_loop, relative_rms
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

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


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("a_shape", "T"), [((2, 3, 4), 3), ((4,), 3), ((3, 1), 3), ((2, 1, 4), 1)])
def test_gradcheck_and_gradgradcheck(a_shape, T, dtype, reverse):
    leaves = [
        x.requires_grad_()
        for x in (
            coefficients(*a_shape, dtype=dtype),
            draw(2, T, 4, dtype=dtype),
            draw(2, 4, dtype=dtype),
        )
    ]

    def scan(a, b, h0):
        return linear_scan(a, b, h0, reverse)

    assert gradcheck(scan, leaves, check_forward_ad=True)
    assert gradgradcheck(scan, leaves, check_fwd_over_rev=True)


def test_third_order_equals_reference():
    b, h0 = draw(2, 5, 3), draw(2, 3)

    def third(impl):
        def f(a):
            return linear_scan(a, b, h0, impl=impl).pow(3).sum()

        return jacrev(jacrev(grad(f)))(coefficients(3))

    torch.testing.assert_close(third("native"), third("reference"), rtol=1e-9, atol=1e-9)


def test_float32_error_of_outputs_and_gradients():
    leaves = [coefficients(33, 200, 7), draw(33, 200, 7), draw(33, 7)]
    results = []
    for dtype, impl in ((torch.float32, "native"), (torch.float64, "reference")):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        h = linear_scan(*inputs, impl=impl)
        first = torch.autograd.grad(h.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append((h, first, second))
    (h, first, second), (h_ref, first_ref, second_ref) = results
    assert relative_rms(h, h_ref) <= 1e-5
    assert all(relative_rms(x, y) <= 1e-5 for x, y in zip(first, first_ref, strict=True))
    assert all(relative_rms(x, y) <= 1e-4 for x, y in zip(second, second_ref, strict=True))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 1, 0), (0, None, None), (1, 3, None)])
def test_vmap_equals_a_loop(in_dims):
    args = [
        x if d is None else torch.stack([x, 2 * x], dim=d)
        for x, d in zip(
            (coefficients(2, 5, 3) / 2, draw(2, 5, 3), draw(2, 3)), in_dims, strict=True
        )
    ]

    def f(a, b, h0):
        return grad(lambda a: linear_scan(a, b, h0).square().sum())(a)

    together = vmap(f, in_dims)(*args)
    for i in range(2):
        one = [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]
        torch.testing.assert_close(together[i], f(*one))


def test_forward_mode_equals_reverse_mode():
    b = draw(2, 5, 3)
    a = coefficients(3)
    for reverse in (False, True):

        def f(a, reverse=reverse):
            return linear_scan(a, b, reverse=reverse)

        torch.testing.assert_close(jacfwd(f)(a), jacrev(f)(a))


def test_compile_sees_one_graph():
    a, b, h0 = coefficients(3), draw(2, 5, 3), draw(2, 3)

    def loss(a, b, h0):
        return linear_scan(a, b * 2, h0).square().sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (a, b, h0)]
        value = f(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    ("reverse", "shift"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_opcheck(reverse, shift, dtype):
    a, b, h0 = (
        coefficients(3, 4, 5, dtype=dtype),
        draw(3, 4, 5, dtype=dtype),
        draw(3, 5, dtype=dtype),
    )
    initial = None if shift else h0.requires_grad_()
    torch.library.opcheck(
        torch.ops.ssm_fast.linear_scan.default,
        (a.requires_grad_(), b.requires_grad_(), initial, reverse, shift),
    )


def test_split_in_two_equals_whole():
    a, b = coefficients(20, 31), draw(20, 31)
    first = linear_scan(a[:, :13], b[:, :13])
    second = linear_scan(a[:, 13:], b[:, 13:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second], dim=1), linear_scan(a, b))


def test_views_give_the_same_states():
    a, b = coefficients(6, 40, 10), draw(6, 40, 10)
    expected = linear_scan(a, b)
    for order in [(1, 0, 2), (2, 1, 0), (0, 2, 1)]:
        back = [order.index(i) for i in range(3)]
        views = [x.permute(order).contiguous().permute(back) for x in (a, b)]
        torch.testing.assert_close(linear_scan(*views), expected)
    wide = b.repeat_interleave(2, dim=2)[:, :, ::2]
    assert torch.equal(linear_scan(a, wide), expected)


def test_conjugate_views_are_resolved():
    a, b = coefficients(3, 5, 2, dtype=torch.complex128), draw(3, 5, 2, dtype=torch.complex128)
    torch.testing.assert_close(
        linear_scan(a.conj(), b.conj()), linear_scan(a, b).conj().resolve_conj()
    )


def test_every_element_is_written(monkeypatch):
    a, b = coefficients(37, 33), draw(37, 33)
    expected = linear_scan(a, b)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *x: empty_like(*x).fill_(float("nan")))
    assert torch.equal(linear_scan(a, b), expected)


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
    gradients = []
    for impl in ("native", "reference"):
        leaves = [coefficients(*shape).requires_grad_(), draw(*shape).requires_grad_()]
        h = linear_scan(*leaves, dim=dim, impl=impl)
        gradients.append(torch.autograd.grad(h.square().sum(), leaves))
    for native, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-9, atol=1e-9)


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


def test_results_are_bitwise_the_same_for_any_thread_count():
    a, b = coefficients(3, 100, 999), draw(3, 100, 999)
    rows = coefficients(67, 1000), draw(67, 1000)
    long = coefficients(2, 50_000), draw(2, 50_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((linear_scan(a, b), linear_scan(*rows), linear_scan(*long)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0)])
def test_empty_sizes(shape):
    assert linear_scan(torch.ones(shape), torch.ones(shape)).shape == shape


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
