"""output_norm: norm, tanh and residual of a layer's output in one pass. Maths in docs/ops/output_norm.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_fast._torch import direct_apply
from ssm_fast.ops.dispatch import (
    LIBRARY,
    Impl,
    choose,
    cpu_kernel,
    native_kernel,
    needs_autograd,
    needs_reference,
)
from ssm_fast.ops.layer_norm import normalised, project_norm
from ssm_fast.ops.layout import last_contiguous
from ssm_fast.ops.validation import check_dtypes, check_shape, check_tensors, promoted


def reference(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    tanh: bool,
) -> Tensor:
    """The output as differentiable torch calls: [..., H], any dtype and device."""
    y = z
    if weight is not None and bias is not None:
        n, _ = normalised(z, eps)
        y = n * _like(weight, z) + _like(bias, z)
    if tanh:
        y = y.tanh()
    return y if residual is None else residual + y


def _like(weight: Tensor, z: Tensor) -> Tensor:
    """Weights [H], or [G, H] of groups, so that they broadcast against [..., H] or [G, ..., H]."""
    if weight.dim() == 1:
        return weight
    return weight.view(weight.shape[0], *(1,) * (z.dim() - 2), weight.shape[1])


def _rows_of(z: Tensor, weight: Tensor | None) -> tuple[int, ...]:
    """The dimensions that a gradient of the weights sums over."""
    first = 0 if weight is None or weight.dim() == 1 else 1
    return tuple(range(first, z.dim() - 1))


# z is [..., H] with weights [H], or [G, ..., H] with weights [G, H] of G groups. `save` asks for the
# mean and rstd of each row, [...].
LIBRARY.define(
    "output_norm(Tensor z, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool tanh, "
    "bool save) -> (Tensor, Tensor, Tensor)",
)
LIBRARY.define(
    "output_norm_grad(Tensor grad, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "bool tanh) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("ssm_fast::output_norm")
def _(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = z.shape[:-1] if save and weight is not None else (0,)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        z.new_empty(z.shape),
        z.new_empty(saved, dtype=dtype),
        z.new_empty(saved, dtype=dtype),
    )


@torch.library.register_fake("ssm_fast::output_norm_grad")
def _(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (0,) if weight is None else weight.shape
    return z.new_empty(z.shape), z.new_empty(weights), z.new_empty(weights)


def _grouped(x: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """``x`` as [G, M, H] with its last dimension contiguous."""
    if x is None:
        return None
    G = 1 if weight is None or weight.dim() == 1 else weight.shape[0]
    return last_contiguous(x.reshape(G, -1, x.shape[-1]))


def _check_fit(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> None:
    """What the kernel relies on, for callers of `fused_output` whose modules somebody has changed."""
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must be given together")
    for name, x in (("weight", weight), ("bias", bias), ("residual", residual)):
        if x is None:
            continue
        if x.dtype != z.dtype:
            raise TypeError(f"{name} must have the dtype of z, {z.dtype}, got {x.dtype}")
        if x.shape != z.shape if x is residual else x.shape[-1] != z.shape[-1]:
            raise ValueError(f"{name} must fit z of {list(z.shape)}, got {list(x.shape)}")


@cpu_kernel("output_norm")
def run_output_norm(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`output_norm` without a graph, with the mean and rstd of each row if ``save``; internal."""
    y = z.new_empty(z.shape)
    saved = z.shape[:-1] if save and weight is not None else (0,)
    mean, rstd = z.new_empty(saved), z.new_empty(saved)
    if y.numel() == 0:
        return y, mean, rstd
    _check_fit(z, weight, bias, residual)
    rows, added = _grouped(z, weight), _grouped(residual, weight)
    assert rows is not None
    weight = None if weight is None else last_contiguous(weight)
    bias = None if bias is None else last_contiguous(bias)
    native_kernel("output_norm", z.dtype)(
        rows,
        weight,
        bias,
        added,
        y,
        mean,
        rstd,
        rows.shape,
        eps,
        tanh,
    )
    return y, mean, rstd


@cpu_kernel("output_norm_grad", "output_norm")
def run_output_norm_grad(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``z``, ``weight`` and ``bias`` from what `run_output_norm` saved; internal."""
    grad_z = z.new_empty(z.shape)
    weights = (0,) if weight is None else weight.shape
    grad_weight, grad_bias = z.new_empty(weights), z.new_empty(weights)
    if z.numel() == 0:
        return grad_z, grad_weight.zero_(), grad_bias.zero_()
    grads, rows = _grouped(grad, weight), _grouped(z, weight)
    assert rows is not None
    mean, rstd = mean.contiguous(), rstd.contiguous()  # hooks on saved tensors may change them
    weight = None if weight is None else last_contiguous(weight)
    bias = None if bias is None else last_contiguous(bias)
    native_kernel("output_norm_grad", z.dtype)(
        grads,
        rows,
        weight,
        bias,
        mean,
        rstd,
        grad_z,
        grad_weight,
        grad_bias,
        rows.shape,
        tanh,
    )
    return grad_z, grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, weight, bias, _, ctx.eps, ctx.tanh, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(z, weight, bias, mean, rstd)
    ctx.save_for_forward(z, weight, bias)


def _composed_gradients(
    grad: Tensor, z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tanh: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of z, weight and bias as torch calls, which can be differentiated again."""
    if weight is None or bias is None:
        return grad * (1 - z.tanh().square()) if tanh else grad, None, None
    n, rstd = normalised(z, eps)
    if tanh:
        grad = grad * (1 - (n * _like(weight, z) + _like(bias, z)).tanh().square())
    rows = _rows_of(z, weight)
    grad_z = project_norm(grad * _like(weight, z), n, rstd)
    if not rows:
        return grad_z, grad * n, grad
    return grad_z, (grad * n).sum(rows), grad.sum(rows)


class OutputNorm(torch.autograd.Function):
    """Autograd of the output; its gradients run natively unless they are differentiated again."""

    @staticmethod
    def forward(  # noqa: D102
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        tanh: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run_output_norm(z, weight, bias, residual, eps, tanh, True)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        z, weight, bias, mean, rstd = ctx.saved_tensors
        gradients: tuple[Tensor | None, ...]
        if needs_autograd(grad, z, weight, bias):
            gradients = _composed_gradients(grad, z, weight, bias, ctx.eps, ctx.tanh)
        else:
            gradients = run_output_norm_grad(grad, z, weight, bias, mean, rstd, ctx.tanh)
            if weight is None:
                gradients = gradients[0], None, None
        wanted = ctx.needs_input_grad
        return *gradients, grad if wanted[3] else None, *(None,) * (len(wanted) - 4)

    @staticmethod
    def jvp(  # noqa: D102
        ctx: Any,
        z_t: Tensor | None,
        weight_t: Tensor | None,
        bias_t: Tensor | None,
        residual_t: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, None, None]:
        z, weight, bias = ctx.saved_tensors
        y_t = torch.zeros_like(z) if z_t is None else z_t
        y = z
        if weight is not None and bias is not None:
            n, rstd = normalised(z, ctx.eps)
            y = n * _like(weight, z) + _like(bias, z)
            y_t = project_norm(y_t, n, rstd) * _like(weight, z)
            if weight_t is not None:
                y_t = y_t + n * _like(weight_t, z)
            if bias_t is not None:
                y_t = y_t + _like(bias_t, z)
        if ctx.tanh:
            y_t = y_t * (1 - y.tanh().square())
        return y_t if residual_t is None else y_t + residual_t, None, None

    @staticmethod
    def vmap(  # noqa: D102
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        V = info.batch_size
        z, weight, bias, residual, eps, tanh = arguments

        def front(x: Tensor, in_dim: int | None) -> Tensor:
            return x.expand(V, *x.shape) if in_dim is None else x.movedim(in_dim, 0)

        z = front(z, in_dims[0])
        residual = None if residual is None else front(residual, in_dims[3])
        if in_dims[1] is None and in_dims[2] is None:  # shared weights: more rows
            if weight is not None and weight.dim() == 2:
                z = z.movedim(0, 1)
                residual = None if residual is None else residual.movedim(0, 1)
                outputs = _differentiable(z, weight, bias, residual, eps, tanh)
                return outputs, (1, 1, 1)
            outputs = _differentiable(z, weight, bias, residual, eps, tanh)
            saved = None if weight is None else 0
            return outputs, (0, saved, saved)
        # Weights of their own: V groups, or V times as many.
        weight, bias = front(weight, in_dims[1]), front(bias, in_dims[2])
        groups = weight.dim() - 1
        flat = [
            None if x is None else x.flatten(0, groups - 1) for x in (z, weight, bias, residual)
        ]
        outputs = _differentiable(*flat, eps, tanh)
        return tuple(x.unflatten(0, z.shape[:groups]) for x in outputs), (0, 0, 0)


_differentiable = direct_apply(OutputNorm)

# What torch.compile traces: the op with the same gradients registered on it.
torch.library.register_autograd(
    "ssm_fast::output_norm", OutputNorm.backward, setup_context=_setup_context
)


def output_norm(
    z: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    tanh: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Compute ``residual + tanh(LayerNorm(z) * weight + bias)``, each part where it is asked for.

    What a state-space layer does behind its read-out ``z = C s + D x``, in one pass instead of
    three. LayerNorm is that of Ba et al. 2016, arXiv 1607.06450. Differentiable any number of times.

    Args:
        z: ``[..., H]``, float32 or float64.
        weight: ``[H]``, with ``bias``; no norm if None.
        bias: ``[H]``, with ``weight``.
        residual: What to add, shaped as ``z``; nothing if None.
        eps: Added to the variance.
        tanh: Whether to take the hyperbolic tangent (before the sum).
        impl: "auto" (the kernel of the tensors' device), "native" (C++), "triton" or "reference".

    Returns:
        ``[..., H]``.

    Raises:
        ValueError: A shape, device or eps is wrong, only one of weight and bias is given, or ``impl`` is
            unknown or cannot run there.
        TypeError: A dtype is not supported, or the dtypes differ.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    tensors = {"z": z, "weight": weight, "bias": bias, "residual": residual}
    check_tensors(**{name: x for name, x in tensors.items() if name == "z" or x is not None})
    z, weight, bias, residual = promoted(z, weight, bias, residual)
    tensors = {"z": z, "weight": weight, "bias": bias, "residual": residual}
    chosen = choose("output_norm", impl, z.device)
    check_dtypes("output_norm", tensors)
    if z.dim() < 1:
        raise ValueError(f"z must have shape [..., H], got {list(z.shape)}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must be given together")
    H = z.shape[-1]
    for name in ("weight", "bias"):
        x = tensors[name]
        if x is not None:
            check_shape(name, x, "[H]", [H])
    if residual is not None:
        check_shape("residual", residual, "that of z", z.shape)
    if chosen == "reference":
        return reference(z, weight, bias, residual, eps, tanh)
    return fused_output(z, weight, bias, residual, eps, tanh)


def fused_output(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    tanh: bool,
) -> Tensor:
    """`output_norm` by the kernel, for layers: only what could crash it is checked."""
    z, weight, bias, residual = promoted(z, weight, bias, residual)
    if needs_reference():
        return reference(z, weight, bias, residual, eps, tanh)
    if torch.compiler.is_compiling():
        y, _, _ = run_output_norm(z, weight, bias, residual, eps, tanh, True)
    elif needs_autograd(z, weight, bias, residual):
        y, _, _ = _differentiable(z, weight, bias, residual, eps, tanh)
    else:
        y, _, _ = run_output_norm(z, weight, bias, residual, eps, tanh, False)
    return y
