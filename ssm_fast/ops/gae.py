"""gae and discounted_returns: reverse scans of the temporal difference. docs/ops/gae.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssm_fast.ops.backend import (
    LIBRARY,
    Impl,
    check_dtype,
    check_shape,
    check_tensors,
    choose,
    cpu_kernel,
    native_kernel,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """The recurrence as a loop of torch calls: [M, T, C]."""
    # what is not used may be anything, NaN included
    delta = rewards + gamma * next_values.masked_fill(terminated, 0) - values
    ended = terminated | truncated
    advantages = torch.empty_like(delta)
    later = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        later = delta[:, t] + gamma * gae_lambda * later.masked_fill(ended[:, t], 0)
        advantages[:, t] = later
    return advantages, advantages + values


def discounted_returns_reference(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    """The recurrence as a loop of torch calls: [M, T, C]."""
    returns = torch.empty_like(rewards)
    later = next_values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        later = torch.where(truncated[:, t], next_values[:, t], later)
        later = rewards[:, t] + gamma * later.masked_fill(terminated[:, t], 0)
        returns[:, t] = later
    return returns


LIBRARY.define(
    "gae(Tensor rewards, Tensor values, Tensor next_values, Tensor terminated, Tensor truncated, "
    "float gamma, float gae_lambda) -> (Tensor, Tensor)",
)
LIBRARY.define(
    "discounted_returns(Tensor rewards, Tensor next_values, Tensor terminated, Tensor truncated, "
    "float gamma) -> Tensor",
)


@torch.library.register_fake("ssm_fast::gae")
def _(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@torch.library.register_fake("ssm_fast::discounted_returns")
def _(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    return rewards.new_empty(rewards.shape)


@cpu_kernel("gae")
def _(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    inputs = [x.contiguous() for x in (rewards, values, next_values, terminated, truncated)]
    outputs = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    if rewards.numel():
        native_kernel("gae", rewards.dtype)(
            *(x.data_ptr() for x in (*inputs, *outputs)), rewards.shape, gamma, gae_lambda
        )
    return outputs


@cpu_kernel("discounted_returns", "gae")
def _(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    inputs = [x.contiguous() for x in (rewards, next_values, terminated, truncated)]
    returns = rewards.new_empty(rewards.shape)
    if rewards.numel():
        native_kernel("discounted_returns", rewards.dtype)(
            *(x.data_ptr() for x in (*inputs, returns)), rewards.shape, gamma
        )
    return returns


def _validate(
    op: str,
    dim: int,
    flags: dict[str, Tensor],
    reals: dict[str, Tensor],
    fractions: dict[str, float],
) -> Callable[[Tensor], Tensor]:
    """Check the arguments of one op; return what brings each tensor to [M, T, C]."""
    check_tensors(**reals, **flags)
    check_dtype(op, reals)
    rewards = reals["rewards"]
    if not -rewards.dim() <= dim < rewards.dim():
        raise ValueError(f"dim must be a dimension of rewards, {list(rewards.shape)}, got {dim}")
    for name, tensor in (reals | flags).items():
        check_shape(name, tensor, "that of rewards", rewards.shape)
    for name, flag in flags.items():
        if flag.dtype != torch.bool:
            raise TypeError(f"{name} must be torch.bool, got {flag.dtype}")
        if flag.device != rewards.device:
            raise ValueError(f"{name} must be on {rewards.device}, got {flag.device}")
    for name, fraction in fractions.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {fraction}")
    dim %= rewards.dim()
    shape = (
        rewards.shape[:dim].numel(),
        rewards.shape[dim],
        rewards.shape[dim + 1 :].numel(),
    )
    return lambda x: x.detach().reshape(shape)


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
    dim: int = -1,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    ``δ_t = r_t + γ (1 - terminated_t) V(s'_t) - V(s_t)`` and
    ``Â_t = δ_t + γ λ (1 - terminated_t)(1 - truncated_t) Â_{t+1}``: a truncated episode bootstraps
    from the value of its last observation, a terminated one from nothing. Not differentiable: the
    advantages are targets.

    Args:
        rewards: ``[B, T]``, or any shape with time as dimension ``dim``; float32 or float64.
        values: value of the observation before each step, shaped as ``rewards``.
        next_values: value of the observation after each step, shaped as ``rewards``; at the end of
            an episode that of its true last observation, not of the one after the reset.
        terminated: boolean, shaped as ``rewards``: the episode ended in a terminal state.
        truncated: boolean, shaped as ``rewards``: the episode was cut, for instance by a time limit.
        gamma: discount, in [0, 1].
        gae_lambda: λ, in [0, 1].
        dim: the time dimension; the last one by default, 0 for ``[T, B]``.
        impl: "auto" (the kernel of the tensors' device), "native" (C++), "triton" or "reference".

    Returns:
        ``(advantages, returns)``, both shaped as ``rewards``; returns are advantages plus values.

    Raises:
        ValueError: a shape, device or range is wrong, or ``impl`` is unknown or cannot run there.
        TypeError: a dtype is not supported, or the dtypes differ.
    """
    canonical = _validate(
        "gae",
        dim,
        {"terminated": terminated, "truncated": truncated},
        {"rewards": rewards, "values": values, "next_values": next_values},
        {"gamma": gamma, "gae_lambda": gae_lambda},
    )
    chosen = choose("gae", impl, rewards.device)
    run = gae_reference if chosen == "reference" else torch.ops.ssm_fast.gae
    advantages, returns = run(
        canonical(rewards),
        canonical(values),
        canonical(next_values),
        canonical(terminated),
        canonical(truncated),
        gamma,
        gae_lambda,
    )
    return advantages.reshape(rewards.shape), returns.reshape(rewards.shape)


def discounted_returns(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    next_values: Tensor | None = None,
    dim: int = -1,
    impl: Impl = "auto",
) -> Tensor:
    """Discounted sum of future rewards within each episode.

    ``G_t = r_t + γ (1 - terminated_t) G'_t`` where ``G'_t`` is ``G_{t+1}`` inside an episode and
    ``next_values_t`` at a truncation and at the last step.

    Args:
        rewards: ``[B, T]``, or any shape with time as dimension ``dim``; float32 or float64.
        terminated: boolean, shaped as ``rewards``: the episode ended in a terminal state.
        truncated: boolean, shaped as ``rewards``: the episode was cut, for instance by a time limit.
        gamma: discount, in [0, 1].
        next_values: value of the observation after each step, shaped as ``rewards``; zeros if None.
        dim: the time dimension; the last one by default, 0 for ``[T, B]``.
        impl: "auto" (the kernel of the tensors' device), "native" (C++), "triton" or "reference".

    Returns:
        The returns, shaped as ``rewards``.

    Raises:
        ValueError: a shape, device or range is wrong, or ``impl`` is unknown or cannot run there.
        TypeError: a dtype is not supported, or the dtypes differ.
    """
    check_tensors(rewards=rewards)
    if next_values is None:
        next_values = torch.zeros_like(rewards)
    canonical = _validate(
        "discounted_returns",
        dim,
        {"terminated": terminated, "truncated": truncated},
        {"rewards": rewards, "next_values": next_values},
        {"gamma": gamma},
    )
    chosen = choose("discounted_returns", impl, rewards.device)
    native = torch.ops.ssm_fast.discounted_returns
    run = discounted_returns_reference if chosen == "reference" else native
    returns = run(
        canonical(rewards),
        canonical(next_values),
        canonical(terminated),
        canonical(truncated),
        gamma,
    )
    return returns.reshape(rewards.shape)
