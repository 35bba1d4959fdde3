"""output_norm on a GPU. Maths in docs/ops/output_norm.md."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssm_fast.kernels.recurrence import OPTIONS, accumulator, strides, wide
from ssm_fast.ops.layout import last_contiguous

MAX_FEATURES = 8192
TILE = 2048  # elements of a tile of rows
PARTS = 256  # programs a group, at most, that the sums of the backward are split over

_SIZES = (
    "z_g", "z_m", "weight_g", "bias_g", "residual_g", "residual_m", "grad_g", "grad_m", "M", "parts",
)  # fmt: skip


@triton.jit
def tanh(x):
    """The hyperbolic tangent, by its series near zero, where the quotient would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    y = tl.where(tl.abs(x) < 0.2, x * x, 0.0)
    series = 62.0 / 2835.0 + y * (-1382.0 / 155925.0 + y * (21844.0 / 6081075.0))
    series += y * y * y * (-929569.0 / 638512875.0 + y * (6404582.0 / 10854718875.0))
    series = 1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * series)))
    far = tl.where(x < 0.0, -quotient, quotient)
    return tl.where(tl.abs(x) < 0.2, x * series, far)


@triton.jit
def mean_of(x, H: tl.constexpr):
    """The mean of each row, [BM, 1]."""
    return (tl.sum(x, axis=1) * (1.0 / H))[:, None]


@triton.jit(do_not_specialize=_SIZES)
def kernel(
    p_z, p_weight, p_bias, p_residual, p_y, p_mean, p_rstd,
    z_g, z_m, weight_g, bias_g, residual_g, residual_m, M,
    eps: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr,
    TANH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BM)
    i_g = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    o_h = tl.arange(0, BH)
    in_rows, columns = m < M, o_h < H
    inside = in_rows[:, None] & columns[None, :]
    m = m.to(tl.int64)
    row = i_g * M + m
    o_z = i_g * z_g + m[:, None] * z_m + o_h[None, :]
    y = tl.load(p_z + o_z, mask=inside, other=0.0).to(ACC)
    if p_weight is not None:
        weight = tl.load(p_weight + i_g * weight_g + o_h, mask=columns, other=0.0).to(ACC)
        bias = tl.load(p_bias + i_g * bias_g + o_h, mask=columns, other=0.0).to(ACC)
        mean = mean_of(y, H)
        centred = tl.where(columns[None, :], y - mean, 0.0)
        rstd = tl.rsqrt(mean_of(centred * centred, H) + eps)
        y = centred * rstd * weight[None, :] + bias[None, :]
        if p_mean is not None:
            tl.store(p_mean + row[:, None], mean.to(p_mean.dtype.element_ty), mask=in_rows[:, None])
            tl.store(p_rstd + row[:, None], rstd.to(p_rstd.dtype.element_ty), mask=in_rows[:, None])
    if TANH:
        y = tanh(y)
    if p_residual is not None:
        o_residual = i_g * residual_g + m[:, None] * residual_m + o_h[None, :]
        y += tl.load(p_residual + o_residual, mask=inside, other=0.0).to(ACC)
    tl.store(p_y + row[:, None] * H + o_h[None, :], y.to(p_y.dtype.element_ty), mask=inside)


# Each program takes every PARTS-th tile of rows and writes what it adds to the sums of the weights.
@triton.jit(do_not_specialize=_SIZES)
def grad_kernel(
    p_grad, p_z, p_weight, p_bias, p_mean, p_rstd, p_grad_z, p_parts,
    grad_g, grad_m, z_g, z_m, weight_g, bias_g, M, parts,
    H: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, TANH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(0) % parts
    i_g = (tl.program_id(0) // parts).to(tl.int64)
    o_h = tl.arange(0, BH)
    columns = o_h < H
    if p_weight is not None:
        weight = tl.load(p_weight + i_g * weight_g + o_h, mask=columns, other=0.0).to(ACC)
        bias = tl.load(p_bias + i_g * bias_g + o_h, mask=columns, other=0.0).to(ACC)
        grad_weight = tl.zeros((BH,), ACC)
        grad_bias = tl.zeros((BH,), ACC)
    for first in range(i_part * BM, M, parts * BM):
        m = first + tl.arange(0, BM)
        in_rows = m < M
        inside = in_rows[:, None] & columns[None, :]
        m = m.to(tl.int64)
        row = i_g * M + m
        o_grad = i_g * grad_g + m[:, None] * grad_m + o_h[None, :]
        grad = tl.load(p_grad + o_grad, mask=inside, other=0.0).to(ACC)
        o_z = i_g * z_g + m[:, None] * z_m + o_h[None, :]
        z = tl.load(p_z + o_z, mask=inside, other=0.0).to(ACC)
        if p_weight is not None:
            mean = tl.load(p_mean + row, mask=in_rows, other=0.0).to(ACC)[:, None]
            rstd = tl.load(p_rstd + row, mask=in_rows, other=0.0).to(ACC)[:, None]
            n = tl.where(inside, (z - mean) * rstd, 0.0)
            if TANH:
                y = tanh(n * weight[None, :] + bias[None, :])
                grad *= 1.0 - y * y
            grad_weight += tl.sum(grad * n, axis=0)
            grad_bias += tl.sum(grad, axis=0)
            p = grad * weight[None, :]
            grad = (p - mean_of(p, H) - n * mean_of(p * n, H)) * rstd
        else:
            if TANH:
                y = tanh(z)
                grad *= 1.0 - y * y
        o_out = row[:, None] * H + o_h[None, :]
        tl.store(p_grad_z + o_out, grad.to(p_grad_z.dtype.element_ty), mask=inside)
    if p_weight is not None:
        p_part = p_parts + (i_g * parts + i_part) * 2 * H + o_h
        tl.store(p_part, grad_weight, mask=columns)
        tl.store(p_part + H, grad_bias, mask=columns)


def output_norm(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``ssm_fast::output_norm``: y, and the mean and rstd of each row if ``save``."""
    y = z.new_empty(z.shape)
    saved = z.shape[:-1] if save and weight is not None else (0,)
    # Not in half precision: the gradient takes the difference of z and its mean.
    mean, rstd = (z.new_empty(saved, dtype=wide(z.dtype)) for _ in range(2))
    if y.numel() == 0:
        return y, mean, rstd
    rows, added = grouped(z, weight), grouped(residual, weight)
    weight, bias = contiguous(weight), contiguous(bias)
    G, M, H = rows.shape
    features, tile, warps = tile_of("output_norm", H)
    keep = save and weight is not None
    kernel[(G * triton.cdiv(M, tile),)](
        rows, weight, bias, added, y, mean if keep else None, rstd if keep else None,
        *strides(rows, 2), group_stride(weight), group_stride(bias), *strides(added, 2), M,
        eps=eps, H=H, BH=features, BM=tile, TANH=tanh, ACC=accumulator(z.dtype), num_warps=warps,
        **OPTIONS,
    )  # fmt: skip
    return y, mean, rstd


def output_norm_grad(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``ssm_fast::output_norm_grad``: the gradients of z, weight and bias."""
    grad_z = z.new_empty(z.shape)
    shape = (0,) if weight is None else weight.shape
    if z.numel() == 0:
        return grad_z, z.new_zeros(shape), z.new_zeros(shape)
    grads, rows = grouped(grad, weight), grouped(z, weight)
    weight, bias = contiguous(weight), contiguous(bias)
    G, M, H = rows.shape
    features, tile, warps = tile_of("output_norm", H)
    count = min(PARTS, triton.cdiv(M, tile))
    parts = None if weight is None else z.new_empty(G, count, 2, H, dtype=wide(z.dtype))
    grad_kernel[(count * G,)](
        grads, rows, weight, bias, mean.contiguous(), rstd.contiguous(), grad_z, parts,
        *strides(grads, 2), *strides(rows, 2), group_stride(weight), group_stride(bias), M, count,
        H=H, BH=features, BM=tile, TANH=tanh, ACC=accumulator(z.dtype), num_warps=warps, **OPTIONS,
    )  # fmt: skip
    if parts is None:
        return grad_z, z.new_empty(0), z.new_empty(0)
    sums = parts.sum(1).to(z.dtype)  # [G, 2, H]
    return grad_z, sums[:, 0].reshape(shape), sums[:, 1].reshape(shape)


def tile_of(op: str, H: int) -> tuple[int, int, int]:
    """Features padded to a power of two, rows of a tile, and warps."""
    if H > MAX_FEATURES:
        raise ValueError(
            f"{op} on a GPU takes at most H = {MAX_FEATURES} features, got {H}; "
            "pass impl='reference'"
        )
    features = max(16, triton.next_power_of_2(H))
    return features, max(1, TILE // features), min(16, max(4, features // 512))


def grouped(x: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """``x`` as [G, M, H] with its last dimension contiguous."""
    if x is None:
        return None
    G = 1 if weight is None or weight.dim() == 1 else weight.shape[0]
    return last_contiguous(x.reshape(G, -1, x.shape[-1]))


def contiguous(weight: Tensor | None) -> Tensor | None:
    """``weight`` with elements side by side."""
    return None if weight is None else last_contiguous(weight)


def group_stride(weight: Tensor | None) -> int:
    """The stride from one group's weights to the next; none where all share them."""
    return 0 if weight is None or weight.dim() == 1 else weight.stride(0)
