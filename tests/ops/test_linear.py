from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck
from torch.func import grad, hessian, jvp

from ssm_fast.ops.linear import (
    composed_gradients,
    composed_tangent,
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
def test_gradgradcheck_of_the_gradients(tanh, has_bias):
    x, weight, bias = problem(1, 3, 5, 4)
    leaves = [x[0], weight[0], *([bias[0]] if has_bias else [])]
    leaves = [t.clone().requires_grad_() for t in leaves]

    def call(x, weight, bias=None):
        return linear(x, weight, bias, tanh=tanh)

    def gradients(*tensors):
        loss = call(*tensors).pow(3).sum()
        return torch.autograd.grad(loss, tensors, create_graph=True)

    assert gradgradcheck(gradients, leaves)


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


def test_leading_dimensions():
    x, weight, bias = problem(1, 24, 5, 4)
    x = x.view(2, 3, 4, 5)
    torch.testing.assert_close(
        linear(x, weight[0], bias[0]), torch_calls(x, weight[0], bias[0], False)
    )
    torch.testing.assert_close(
        linear(x[0, 0, 0], weight[0]), torch_calls(x[0, 0, 0], weight[0], None, False)
    )


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
