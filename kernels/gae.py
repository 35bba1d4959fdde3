"""gae and discounted_returns on a GPU. Maths in docs/ops/gae.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_fast.kernels.linear_scan import MANY_COLUMNS, STEPS, steps_of
from ssm_fast.kernels.recurrence import OPTIONS, accumulator, only_if
from ssm_fast.ops.gae import empty_targets

_SIZES = ("stride_m", "stride_t", "stride_c", "M", "T", "C")


@triton.jit
def advance(coefficient, later, source):
    """The step behind: a coefficient of zero cuts off whatever came later, NaN included."""
    return tl.where(coefficient == 0.0, source, coefficient * later + source)


# Time runs backwards: step i in sweep order stands at T - 1 - i. A value that is not used may be
# anything, NaN included, so it is left out rather than multiplied by zero.
@triton.jit(do_not_specialize=_SIZES)
def gae_kernel(
    p_rewards, p_values, p_next_values, p_terminated, p_truncated, p_advantages, p_returns,
    stride_m, stride_t, stride_c, M, T, C,
    gamma: tl.constexpr, gae_lambda: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    mask = column < M.to(tl.int64) * C
    back = -stride_t.to(tl.int64)
    o = column // C * stride_m + column % C * stride_c - (T - 1) * back
    advantage = tl.zeros((BC,), ACC)
    decay = tl.full((BC,), 1.0, ACC) * gamma * gae_lambda
    for i in range(0, T, BT):
        rewards = steps_of(p_rewards + o, back, i, 0, T, mask)
        values = steps_of(p_values + o, back, i, 0, T, mask)
        next_values = steps_of(p_next_values + o, back, i, 0, T, mask)
        terminated = steps_of(p_terminated + o, back, i, 0, T, mask)
        truncated = steps_of(p_truncated + o, back, i, 0, T, mask)
        for j in tl.static_range(BT):
            value = values[j].to(ACC)
            bootstrap = tl.where(terminated[j] != 0, 0.0, next_values[j].to(ACC))
            source = rewards[j].to(ACC) + gamma * bootstrap - value
            coefficient = tl.where((terminated[j] | truncated[j]) != 0, 0.0, decay)
            advantage = advance(coefficient, advantage, source)
            inside = only_if(i + j < T, mask)
            returned = (advantage + value).to(p_returns.dtype.element_ty)
            tl.store(p_advantages + o, advantage.to(p_advantages.dtype.element_ty), mask=inside)
            tl.store(p_returns + o, returned, mask=inside)
            o += back


@triton.jit(do_not_specialize=_SIZES)
def returns_kernel(
    p_rewards, p_next_values, p_terminated, p_truncated, p_returns,
    stride_m, stride_t, stride_c, M, T, C,
    gamma: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    mask = column < M.to(tl.int64) * C
    back = -stride_t.to(tl.int64)
    o = column // C * stride_m + column % C * stride_c - (T - 1) * back
    x = tl.zeros((BC,), ACC)
    decay = tl.full((BC,), 1.0, ACC) * gamma
    for i in range(0, T, BT):
        rewards = steps_of(p_rewards + o, back, i, 0, T, mask)
        next_values = steps_of(p_next_values + o, back, i, 0, T, mask)
        terminated = steps_of(p_terminated + o, back, i, 0, T, mask)
        truncated = steps_of(p_truncated + o, back, i, 0, T, mask)
        for j in tl.static_range(BT):
            ends = truncated[j] != 0
            if j == 0:
                ends = ends | (column * 0 + i == 0)  # the last step
            bootstrap = tl.where(ends, next_values[j].to(ACC), 0.0)
            bootstrap = tl.where(terminated[j] != 0, 0.0, bootstrap)
            coefficient = tl.where(ends | (terminated[j] != 0), 0.0, decay)
            x = advance(coefficient, x, rewards[j].to(ACC) + gamma * bootstrap)
            tl.store(p_returns + o, x.to(p_returns.dtype.element_ty), mask=only_if(i + j < T, mask))
            o += back


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """The op ``ssm_fast::gae``: advantages and returns, [M, T, C]."""
    inputs = (rewards, values, next_values, terminated, truncated)
    advantages, returns = empty_targets(rewards), empty_targets(rewards)
    launch(gae_kernel, inputs, (advantages, returns), gamma=gamma, gae_lambda=gae_lambda)
    return advantages, returns


def discounted_returns(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    """The op ``ssm_fast::discounted_returns``: [M, T, C]."""
    returns = empty_targets(rewards)
    inputs = (rewards, next_values, terminated, truncated)
    launch(returns_kernel, inputs, (returns,), gamma=gamma)
    return returns


def launch(
    kernel: triton.runtime.JITFunction,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    **discounts: float,
) -> None:
    """One launch, all tensors in the layout of the outputs."""
    like = outputs[0]
    M, T, C = M_T_C = like.shape
    if like.numel() == 0:
        return
    laid_out = [
        x
        if x.stride() == like.stride()
        else torch.empty_strided(M_T_C, like.stride(), dtype=x.dtype, device=x.device).copy_(x)
        for x in inputs
    ]
    columns, warps = (128, 4) if M * C >= MANY_COLUMNS else (32, 1)
    kernel[(triton.cdiv(M * C, columns),)](
        *(x.view(torch.uint8) if x.dtype == torch.bool else x for x in laid_out), *outputs,
        *like.stride(), M, T, C, **discounts,
        BT=STEPS, BC=columns, ACC=accumulator(like.dtype), num_warps=warps, **OPTIONS,
    )  # fmt: skip
