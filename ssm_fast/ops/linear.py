"""linear: a linear layer of groups of rows, with tanh behind it. Maths in docs/ops/linear.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_fast._torch import direct_apply
from ssm_fast.ops.dispatch import (
    LIBRARY,
    cpu_kernel,
    native_kernel,
    needs_autograd,
    needs_reference,
)
from ssm_fast.ops.layout import fold, last_contiguous
from ssm_fast.ops.validation import promoted


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, tanh: bool
) -> Tensor:
    """The layer as torch calls: [G, M, I], [G, O, I], [G, O], [G, M, O] -> [G, M, O]."""
    if bias is not None:
        add = bias.unsqueeze(1)
    y = x @ weight.mT if add is None else torch.baddbmm(add, x, weight.mT)
    return y.tanh() if tanh else y


def through_tanh(grad: Tensor, y: Tensor | None) -> Tensor:
    """The gradient (or tangent) on the other side of the tanh that gave ``y``, if there was one."""
    return grad if y is None else grad * (1 - y.square())


def composed_gradients(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`run_linear_grad` as torch calls."""
    z = through_tanh(grad, y)
    return (
        z @ weight if for_x else x.new_empty(0),
        z.mT @ x if for_weight else x.new_empty(0),
        z.sum(1) if for_bias else x.new_empty(0),
    )


def composed_tangent(
    x: Tensor,
    weight: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    y: Tensor | None,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`run_linear_tangent` as torch calls."""
    z_t = x.new_zeros(*x.shape[:-1], weight.shape[1])  # [G, M, O]
    if x_t is not None:
        z_t = z_t + x_t @ weight.mT
    if weight_t is not None:
        z_t = z_t + x @ weight_t.mT
    if bias_t is not None:
        z_t = z_t + bias_t.unsqueeze(1)
    curvature = x.new_empty(0) if grad is None or y is None else -2 * y * grad * z_t
    return through_tanh(z_t, y), curvature


# x is [G, M, I], weight [G, O, I], bias [G, O] and add [G, M, O], without a bias or tanh. y, if given, is
# what the layer gave through a tanh.
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? add, bool tanh) -> Tensor")
LIBRARY.define(
    "linear_grad(Tensor grad, Tensor? y, Tensor x, Tensor weight, bool for_x, bool for_weight, "
    "bool for_bias) -> (Tensor, Tensor, Tensor)",
)
LIBRARY.define(
    "linear_tangent(Tensor x, Tensor weight, Tensor? x_t, Tensor? weight_t, Tensor? bias_t, "
    "Tensor? y, Tensor? grad) -> (Tensor, Tensor)",
)


for _op, _composed in (
    ("linear", reference),
    ("linear_grad", composed_gradients),
    ("linear_tangent", composed_tangent),
):
    torch.library.register_fake(f"ssm_fast::{_op}", _composed)


def _last_contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else last_contiguous(x)


@cpu_kernel("linear")
def run_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, tanh: bool
) -> Tensor:
    """`linear` of groups without a graph; internal."""
    G, M, I = x.shape
    y = x.new_empty(G, M, weight.shape[1])
    if y.numel() == 0 or I == 0:
        return reference(x, weight, bias, add, tanh)
    x, bias, add = last_contiguous(x), _last_contiguous(bias), _last_contiguous(add)
    native_kernel("linear", x.dtype)(x, weight, bias, add, y, (*x.shape, y.shape[2]), tanh)
    return y


@cpu_kernel("linear_grad", "linear")
def run_linear_grad(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, ``weight`` and ``bias``, those that are wanted; internal."""
    if grad.numel() == 0 or x.numel() == 0:
        return composed_gradients(grad, y, x, weight, for_x, for_weight, for_bias)
    grad_x = x.new_empty(x.shape if for_x else (0,))
    grad_weight = x.new_empty(weight.shape if for_weight else (0,))
    grad_bias = x.new_empty(weight.shape[:2] if for_bias else (0,))
    grad, y, x = last_contiguous(grad), _last_contiguous(y), last_contiguous(x)
    native_kernel("linear_grad", x.dtype)(
        grad, y, x, weight, grad_x, grad_weight, grad_bias, (*x.shape, weight.shape[1])
    )
    return grad_x, grad_weight, grad_bias


@cpu_kernel("linear_tangent", "linear")
def run_linear_tangent(
    x: Tensor,
    weight: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    y: Tensor | None,
    grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The tangent of ``y`` by those of the arguments; with ``grad``, a gradient of y, a curvature term.

    Internal. The second result is the derivative of ``grad (1 - y²)`` by y, times the tangent before
    the tanh.
    """
    shape, wants_curvature = (*x.shape[:-1], weight.shape[1]), grad is not None and y is not None
    y_t, curvature = x.new_empty(shape), x.new_empty(shape if wants_curvature else (0,))
    if y_t.numel() == 0 or x.numel() == 0:
        return composed_tangent(x, weight, x_t, weight_t, bias_t, y, grad)
    x, y, grad = last_contiguous(x), _last_contiguous(y), _last_contiguous(grad)
    x_t, bias_t = _last_contiguous(x_t), _last_contiguous(bias_t)
    native_kernel("linear_tangent", x.dtype)(
        x_t, weight_t, bias_t, x, weight, y, grad, y_t, curvature, (*x.shape, shape[2])
    )
    return y_t, curvature


def _folded(
    tensors: tuple[Tensor | None, ...], in_dims: tuple[int | None, ...], V: int
) -> list[Tensor | None]:
    """The tensors of V times as many groups."""
    return [
        None if t is None else fold(t, in_dim, V, 0)
        for t, in_dim in zip(tensors, in_dims, strict=False)
    ]


class Linear(torch.autograd.Function):
    """Autograd of the layer; its gradients are another Function."""

    forward = staticmethod(run_linear)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what the gradients and tangents read."""
        x, weight, *_, tanh = inputs
        y = output if tanh else None
        ctx.save_for_backward(x, weight, y)
        ctx.save_for_forward(x, weight, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, which can be differentiated again."""
        x, weight, y = ctx.saved_tensors
        *wanted, for_add, _ = ctx.needs_input_grad
        call = _differentiable_grad if needs_autograd(grad, y, x, weight) else run_linear_grad
        gradients = call(grad, y, x, weight, *wanted)
        by_input = (g if w else None for g, w in zip(gradients, wanted, strict=True))
        return *by_input, grad if for_add else None, None

    @staticmethod
    def jvp(
        ctx: Any,
        x_t: Tensor | None,
        weight_t: Tensor | None,
        bias_t: Tensor | None,
        add_t: Tensor | None,
        *_: None,
    ) -> Tensor:
        """The tangent of the output, as torch calls."""
        x, weight, y = ctx.saved_tensors
        y_t = composed_tangent(x, weight, x_t, weight_t, bias_t, y, None)[0]
        return y_t if add_t is None else y_t + add_t

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        add: Tensor | None,
        tanh: bool,
    ) -> tuple[Tensor, int]:
        """V times as many groups."""
        V = info.batch_size
        folded = _folded((x, weight, bias, add), in_dims, V)
        return _differentiable(*folded, tanh).unflatten(0, (V, -1)), 0


class LinearGrad(torch.autograd.Function):
    """Autograd of the layer's gradients, which its tangent and its gradients again make up."""

    forward = staticmethod(run_linear_grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps what the gradients and tangents read."""
        *tensors, for_x, for_weight, for_bias = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.wanted = for_x, for_weight, for_bias

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, which can be differentiated again."""
        grad, y, x, weight = ctx.saved_tensors
        # Cotangents u, V, v of the gradients of x, weight and bias enter as tangents would.
        u, V, v = (c if wanted else None for c, wanted in zip(cotangents, ctx.wanted, strict=True))
        for_grad, for_y, for_x, for_weight, *_ = ctx.needs_input_grad
        for_x, for_weight = for_x and V is not None, for_weight and u is not None
        tensors = grad, y, x, weight, u, V, v
        again = needs_autograd(*tensors)  # a third time: by torch's own formulas
        tangent = composed_tangent if again else run_linear_tangent
        gradients = composed_gradients if again else run_linear_grad
        grad_of_grad, curvature = tangent(x, weight, u, V, v, y, None if y is None else grad)
        grad_x = grad_weight = None
        if for_x or for_weight:
            rows = x if u is None else u
            matrix = weight if V is None else V
            grad_x, grad_weight, _ = gradients(grad, y, rows, matrix, for_x, for_weight, False)
        return (
            grad_of_grad if for_grad else None,
            curvature if for_y else None,
            grad_x if for_x else None,
            grad_weight if for_weight else None,
            *(None,) * 3,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        grad_t: Tensor | None,
        y_t: Tensor | None,
        x_t: Tensor | None,
        weight_t: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tangent of the output, as torch calls."""
        grad, y, x, weight = ctx.saved_tensors
        z, z_t = through_tanh(grad, y), torch.zeros_like(grad)
        if grad_t is not None:
            z_t = z_t + through_tanh(grad_t, y)
        if y_t is not None:
            z_t = z_t - 2 * y * y_t * grad
        by_x, by_weight, by_bias = composed_gradients(z_t, None, x, weight, *ctx.wanted)
        if weight_t is not None and ctx.wanted[0]:
            by_x = by_x + z @ weight_t
        if x_t is not None and ctx.wanted[1]:
            by_weight = by_weight + z.mT @ x_t
        return by_x, by_weight, by_bias

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        grad: Tensor,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor,
        *wanted: bool,
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """V times as many groups."""
        V = info.batch_size
        folded = _folded((grad, y, x, weight), in_dims, V)
        gradients = _differentiable_grad(*folded, *wanted)
        return (
            tuple(
                g.unflatten(0, (V, -1)) if w else g for g, w in zip(gradients, wanted, strict=True)
            ),
            tuple(0 if w else None for w in wanted),
        )


_differentiable = direct_apply(Linear)
_differentiable_grad = direct_apply(LinearGrad)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    tanh: bool = False,
) -> Tensor:
    """Compute ``x Wᵀ + b``, its hyperbolic tangent, or ``x Wᵀ + add``.

    `torch.nn.functional.linear` for the sequences of this package: one pass over the rows gives
    product, sum and tanh, another all gradients, and gradients of these again take two. Weights that
    are vmapped run as groups of one call. Internal to the models.

    Args:
        x: ``[..., I]``, float32 or float64.
        weight: ``[O, I]``.
        bias: ``[O]``, or None.
        add: ``[..., O]``, or None; not with a bias or tanh.
        tanh: Whether to take the hyperbolic tangent.

    Returns:
        ``[..., O]``, bitwise the same for any number of threads.

    Raises:
        ValueError: A shape does not fit, or ``add`` stands beside a bias or tanh.
        TypeError: The dtypes differ, or there is no kernel for them.
    """
    x, weight, bias, add = promoted(x, weight, bias, add)
    O, I = weight.shape
    if add is not None and (bias is not None or tanh):
        raise ValueError("add must be None with a bias or tanh")
    given = {"x": (x, I), "bias": (bias, O), "add": (add, O)}
    for name, (tensor, size) in given.items():
        if tensor is None:
            continue
        if tensor.shape[-1] != size:
            raise ValueError(f"{name} {list(tensor.shape)} does not fit weights [{O}, {I}]")
        if tensor.dtype != weight.dtype:
            raise TypeError(f"{name} must have the dtype of the weights, {weight.dtype}")
    if add is not None and add.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"add {list(add.shape)} does not fit x {list(x.shape)}")
    y = grouped_linear(
        x.reshape(1, -1, I),
        weight.unsqueeze(0),
        None if bias is None else bias.unsqueeze(0),
        None if add is None else add.reshape(1, -1, O),
        tanh,
    )
    return y.view(*x.shape[:-1], O)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    tanh: bool = False,
) -> Tensor:
    """`linear` of groups, as in the schema; nothing is checked."""
    if torch.compiler.is_compiling() or needs_reference():
        return reference(x, weight, bias, add, tanh)
    call = _differentiable if needs_autograd(x, weight, bias, add) else run_linear
    y: Tensor = call(x, weight, bias, add, tanh)
    return y
