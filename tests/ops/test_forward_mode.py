"""Forward mode inside forward mode, and transforms in compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from ssm_fast import SSM, ops
from ssm_fast.ops.linear import linear
from ssm_fast.ops.output_norm import output_norm

B, T, N = 3, 5, 4


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _cases() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return {
        "dense_scan": (ops.dense_scan, (_draw(B, T, N), 0.3 * _draw(N, N), _draw(B, N))),
        "norm_scan": (
            ops.norm_scan,
            (_draw(B, T, N), 0.3 * _draw(N, N), _draw(N), _draw(N), _draw(B, N)),
        ),
        "linear_scan": (ops.linear_scan, (0.3 * _draw(B, T, N), _draw(B, T, N), _draw(B, N))),
        "output_norm": (
            lambda *x, impl: output_norm(*x, tanh=True, impl=impl),
            (_draw(B, N), _draw(N), _draw(N), _draw(B, N)),
        ),
    }


def _second(f: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """The second derivative of the sum of squares along a direction."""
    direction = tuple(0.5 + x for x in inputs)

    def first(*x: Tensor) -> Tensor:
        return jvp(lambda *y: f(*y).square().sum(), x, direction)[1]

    found: Tensor = jvp(first, inputs, direction)[1]
    return found


@pytest.mark.parametrize("name", _cases())
def test_equals_differences(name: str) -> None:
    f, inputs = _cases()[name]
    direction, step = tuple(0.5 + x for x in inputs), 1e-4

    def value(k: int) -> float:
        moved = (x + k * step * d for x, d in zip(inputs, direction, strict=True))
        return float(f(*moved, impl="auto").square().sum())

    expected = (value(1) - 2 * value(0) + value(-1)) / step**2
    found = float(_second(lambda *x: f(*x, impl="auto"), inputs))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    with pytest.raises(ValueError, match="no forward mode inside forward mode"):
        _second(lambda *x: f(*x, impl="native"), inputs)


@pytest.mark.parametrize("name", _cases())
@pytest.mark.parametrize("order", [1, 2])
def test_compiled(name: str, order: int) -> None:
    f, inputs = _cases()[name]
    g = partial(f, impl="auto")

    def along_ones(*x: Tensor) -> Tensor:
        return jvp(lambda *y: g(*y).square().sum(), x, tuple(map(torch.ones_like, x)))[1]

    def derivative(*x: Tensor) -> Tensor:
        return along_ones(*x) if order == 1 else _second(g, x)

    torch._dynamo.reset()
    compiled = torch.compile(derivative, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), derivative(*inputs))


@pytest.mark.parametrize("name", _cases())
@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap", "vmap of grad", "grad of vmap"])
def test_transforms_in_a_compiled_function(name: str, transform: str) -> None:
    f, inputs = _cases()[name]
    several = tuple(torch.stack((x, 0.5 * x)) for x in inputs)

    def loss(*x: Tensor) -> Tensor:
        return f(*x, impl="auto").square().sum()

    every = tuple(range(len(inputs)))
    transformed, arguments = {
        "grad": (grad(loss, every), inputs),
        "jacrev": (jacrev(loss, every), inputs),
        "vmap": (vmap(loss), several),
        "vmap of grad": (vmap(grad(loss, every)), several),
        "grad of vmap": (grad(lambda *x: vmap(loss)(*x).sum(), every), several),
    }[transform]
    torch._dynamo.reset()
    compiled = torch.compile(transformed, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), transformed(*arguments))


def test_linear() -> None:
    torch.manual_seed(0)
    x, weight = _draw(6, 3), _draw(2, 3)

    def loss(f: Any) -> Callable[[Tensor], Tensor]:
        return lambda w: f(x, w).square().sum()

    def by_torch(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x @ w.T)

    found = jacfwd(jacfwd(loss(lambda x, w: linear(x, w, tanh=True))))(weight)
    torch.testing.assert_close(found, hessian(loss(by_torch))(weight))


def test_layer() -> None:
    torch.manual_seed(0)
    layer = SSM(3, 4, state_size=5, norm="output").double()
    weights = {n: p.detach() for n, p in layer.named_parameters()}
    x = _draw(4, 2, 3)

    def loss(A: Tensor) -> Tensor:
        name = next(n for n in weights if n.endswith("A"))
        y, _ = torch.func.functional_call(layer, weights | {name: A}, (x,))
        total: Tensor = y.square().sum()
        return total

    A = next(w for n, w in weights.items() if n.endswith("A"))
    torch.testing.assert_close(jacfwd(jacfwd(loss))(A), hessian(loss)(A))
