from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from references import relative_rms
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

from ssm_fast.ops.linear import (
    composed_gradients,
    composed_tangent,
    grouped_linear,
    linear,
    reference,
    run_linear,
    run_linear_grad,
    run_linear_tangent,
)

SIZES = [  # G, M, I, O
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 97, 17, 64),
    (1, 100, 63, 6),
    (1, 1500, 33, 65),
    (2, 700, 64, 128),
    (40, 2, 9, 130),
]
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
with_tanh = pytest.mark.parametrize("tanh", [False, True])


def problem(G, M, I, O, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    return draw(G, M, I), draw(G, O, I) / I**0.5, draw(G, O)


def torch_calls(x, weight, bias, tanh):
    y = F.linear(x, weight, bias)
    return torch.tanh(y) if tanh else y


def assert_all_close(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@every_size
@with_tanh
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_value_and_gradients_equal_torch(sizes, tanh, dtype, has_bias):
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    exact = problem(*sizes)
    exact = exact if has_bias else (*exact[:2], None)
    mine = [None if t is None else t.to(dtype).requires_grad_() for t in exact]
    theirs = [None if t is None else t.detach().requires_grad_() for t in exact]
    y = grouped_linear(*mine, tanh=tanh)
    expected = torch.stack(
        [torch_calls(*(None if t is None else t[g] for t in theirs), tanh) for g in range(sizes[0])]
    )
    assert_all_close([y], [expected], tolerance)
    cotangent = torch.randn_like(expected)
    y.backward(cotangent.to(dtype))
    expected.backward(cotangent)
    assert_all_close(
        [None if t is None else t.grad for t in mine],
        [None if t is None else t.grad for t in theirs],
        tolerance * sizes[1] ** 0.5,
    )


@every_size
@with_tanh
def test_kernels_equal_torch_calls(sizes, tanh):
    x, weight, bias = problem(*sizes)
    y = reference(x, weight, bias, None, tanh)
    u, V, v = problem(*sizes, seed=1)
    cotangent = torch.randn_like(y)
    torch.testing.assert_close(run_linear(x, weight, bias, None, tanh), y)
    saved = y if tanh else None
    for wanted in [(True, True, True), (True, False, False), (False, True, True)]:
        arguments = cotangent, saved, x, weight, *wanted
        assert_all_close(run_linear_grad(*arguments), composed_gradients(*arguments), 1e-10)
    for tangents in [(u, V, v), (u, None, None), (None, V, None), (None, None, v)]:
        arguments = x, weight, *tangents, saved, cotangent if tanh else None
        assert_all_close(run_linear_tangent(*arguments), composed_tangent(*arguments), 1e-10)


@with_tanh
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradcheck_to_the_third_order(tanh, has_bias):
    x, weight, bias = problem(1, 3, 5, 4)
    leaves = [x[0], weight[0], *([bias[0]] if has_bias else [])]
    leaves = [t.clone().requires_grad_() for t in leaves]

    def call(x, weight, bias=None):
        return linear(x, weight, bias, tanh=tanh)

    def gradients(*tensors):
        loss = call(*tensors).pow(3).sum()
        return torch.autograd.grad(loss, tensors, create_graph=True)

    assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, leaves)
    assert gradcheck(gradients, leaves)
    assert gradgradcheck(gradients, leaves)


@every_size
def test_adds_to_the_product(sizes):
    x, weight, _ = problem(*sizes)
    add = torch.randn(sizes[0], sizes[1], sizes[3], dtype=torch.float64)
    torch.testing.assert_close(grouped_linear(x, weight, add=add), add + x @ weight.mT)
    views = x, weight, add.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(run_linear(*views[:2], None, views[2], False), add + x @ weight.mT)


def test_gradients_of_what_it_adds_to():
    x, weight, _ = problem(1, 3, 5, 4)
    leaves = [t.clone().requires_grad_() for t in (x[0], weight[0], torch.rand(3, 4).double())]

    def call(x, weight, add):
        return linear(x, weight, add=add)

    assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, leaves)
    many = [torch.stack([t.detach(), 2 * t.detach()]) for t in leaves]
    expected = torch.stack([a + x @ w.mT for x, w, a in zip(*many, strict=True)])
    torch.testing.assert_close(vmap(call)(*many), expected)


@pytest.mark.parametrize("trained", range(3))
def test_second_order_of_one_argument_alone(trained):
    x, weight, bias = (t[0] for t in problem(1, 6, 5, 4))
    tensors = [x, weight, bias]

    def curvature(call):
        leaf = tensors[trained].clone().requires_grad_()
        arguments = [leaf if i == trained else t for i, t in enumerate(tensors)]
        (first,) = torch.autograd.grad(call(*arguments).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(
        curvature(lambda *t: linear(*t, tanh=True)), curvature(lambda *t: torch_calls(*t, True))
    )


@with_tanh
def test_vmap_over_weights_is_groups(tanh):
    x, weight, bias = problem(3, 8, 5, 4)

    def loss(x, weight, bias):
        return linear(x, weight, bias, tanh=tanh).pow(3).sum()

    for in_dims in [(0, 0, 0), (None, 0, 0), (0, None, None)]:
        shared = [t if d == 0 else t[0] for t, d in zip((x, weight, bias), in_dims, strict=True)]
        each = [
            [t[g] if d == 0 else t for t, d in zip(shared, in_dims, strict=True)] for g in range(3)
        ]
        actual = vmap(grad(loss, argnums=(0, 1, 2)), in_dims)(*shared)
        expected = [
            grad(lambda *t: torch_calls(*t, tanh).pow(3).sum(), (0, 1, 2))(*one) for one in each
        ]
        for one, others in zip(actual, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(one, torch.stack(others))


def test_forward_over_reverse_and_reverse_over_reverse():
    x, weight, bias = (t[0] for t in problem(1, 6, 4, 3))

    def loss(call):
        return lambda weight: call(x, weight, bias).pow(3).sum()

    mine, theirs = (
        loss(lambda *t: linear(*t, tanh=True)),
        loss(lambda *t: torch_calls(*t, True)),
    )
    direction = torch.randn_like(weight)
    torch.testing.assert_close(
        jvp(grad(mine), (weight,), (direction,)), jvp(grad(theirs), (weight,), (direction,))
    )
    torch.testing.assert_close(hessian(mine)(weight), hessian(theirs)(weight))


def test_any_layout():
    x, weight, bias = problem(1, 12, 10, 8)
    views = x[0].t().contiguous().t(), weight[0].t().contiguous().t(), bias[0].repeat(2)[::2]
    leaves = [t.detach().requires_grad_() for t in views]
    y = linear(*leaves, tanh=True)
    expected = torch_calls(*(t.clone() for t in views), True)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn(8, 12, dtype=torch.float64).t()
    actual = torch.autograd.grad(y, leaves, cotangent)
    copies = [t.clone().requires_grad_() for t in views]
    expected = torch.autograd.grad(torch_calls(*copies, True), copies, cotangent)
    assert_all_close(actual, expected, 1e-12)


def test_leading_dimensions():
    x, weight, bias = problem(1, 24, 5, 4)
    x = x.view(2, 3, 4, 5)
    torch.testing.assert_close(
        linear(x, weight[0], bias[0]), torch_calls(x, weight[0], bias[0], False)
    )
    torch.testing.assert_close(
        linear(x[0, 0, 0], weight[0]), torch_calls(x[0, 0, 0], weight[0], None, False)
    )


@pytest.mark.parametrize("sizes", [(1, 0, 3, 4), (1, 5, 3, 0), (2, 0, 3, 4)])
def test_empty(sizes):
    leaves = [t.requires_grad_() for t in problem(*sizes)]
    y = grouped_linear(*leaves, tanh=True)
    assert y.shape == (sizes[0], sizes[1], sizes[3])
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert all(not g.any() for g in gradients)


def test_float32_error():
    tensors = problem(1, 4096, 128, 64)
    single = [t.float().requires_grad_() for t in tensors]
    double = [t.requires_grad_() for t in tensors]
    y, expected = grouped_linear(*single, tanh=True), reference(*double, None, True)
    assert relative_rms(y, expected) <= 1e-6
    cotangent = torch.randn_like(expected)
    actual = torch.autograd.grad(y, single, cotangent.float())
    for one, other in zip(actual, torch.autograd.grad(expected, double, cotangent), strict=True):
        assert relative_rms(one, other) <= 1e-6


def test_results_are_bitwise_the_same_for_any_thread_count():
    x, weight, bias = problem(3, 2000, 64, 128, torch.float32)
    u, V, v = problem(3, 2000, 64, 128, torch.float32, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = run_linear(x, weight, bias, None, True)
            gradients = run_linear_grad(y, y, x, weight, True, True, True)
            results.append([y, *gradients, *run_linear_tangent(x, weight, u, V, v, y, y)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@with_tanh
def test_opcheck(tanh):
    x, weight, bias = problem(2, 3, 4, 5)
    y = run_linear(x, weight, bias, None, tanh)
    ops = torch.ops.ssm_fast
    torch.library.opcheck(ops.linear.default, (x, weight, bias, None, tanh))
    saved, cotangent = (y, torch.randn_like(y)) if tanh else (None, None)
    torch.library.opcheck(
        ops.linear_grad.default, (torch.randn_like(y), saved, x, weight, True, True, False)
    )
    torch.library.opcheck(ops.linear_tangent.default, (x, weight, x, None, bias, saved, cotangent))


def test_compiles_to_torchs_own_products():
    x, weight, bias = problem(1, 6, 5, 4)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x[0], weight[0], bias[0], None, True), torch_calls(x[0], weight[0], bias[0], True)
    )


def test_errors():
    x, weight, bias = (t[0] for t in problem(1, 6, 5, 4))
    with pytest.raises(ValueError, match=r"x \[6, 4\] does not fit weights \[4, 5\]"):
        linear(x[:, :4], weight)
    with pytest.raises(ValueError, match=r"bias \[3\] does not fit weights \[4, 5\]"):
        linear(x, weight, bias[:3])
    with pytest.raises(ValueError, match=r"add \[5, 4\] does not fit x \[6, 5\]"):
        linear(x, weight, add=torch.ones(5, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="add must be None with a bias or tanh"):
        linear(x, weight, bias, torch.ones(6, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x must have the dtype of the weights, torch\.float32"):
        linear(x, weight.float())
    with pytest.raises(TypeError, match=r"linear has no kernel for torch\.float16"):
        linear(x.half(), weight.half())


def test_nan_and_infinity_pass_through():
    x, weight, bias = (t[0] for t in problem(1, 6, 5, 4))
    x[2, 1] = float("nan")
    x[4] = float("inf")
    y, expected = (
        linear(x, weight.abs(), bias, None, True),
        torch_calls(x, weight.abs(), bias, True),
    )
    torch.testing.assert_close(y, expected, equal_nan=True)
