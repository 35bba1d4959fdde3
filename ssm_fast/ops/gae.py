"""gae and discounted_returns: reverse scans of the temporal difference. docs/ops/gae.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssm_fast.ops.dispatch import LIBRARY, Impl, choose, cpu_kernel, native_kernel
from ssm_fast.ops.validation import check_dtypes, check_shape, check_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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
    discount = float(delta.new_tensor(gamma) * delta.new_tensor(gae_lambda))
    later = torch.zeros_like(delta.sum(1))
    for t in reversed(range(delta.shape[1])):
        cut = ended[:, t] if discount else torch.ones_like(ended[:, t])
        later = delta[:, t] + discount * later.masked_fill(cut, 0)
        advantages[:, t] = later
    return advantages, advantages + values


def discounted_returns_reference(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    """The recurrence as a loop of torch calls: [M, T, C]."""
    returns = torch.empty_like(rewards)
    T, discount = rewards.shape[1], float(rewards.new_tensor(gamma))
    for t in reversed(range(T)):
        if t == T - 1:
            later = next_values[:, t]
        elif not discount:  # what is not used may be anything here, too
            later = torch.zeros_like(later)
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
def _(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_targets(rewards), empty_targets(rewards)


@torch.library.register_fake("ssm_fast::discounted_returns")
def _(rewards: Tensor, *_: Any) -> Tensor:
    return empty_targets(rewards)


@cpu_kernel("gae")
def _gae(*arguments: Any) -> tuple[Tensor, Tensor]:
    outputs = empty_targets(arguments[0]), empty_targets(arguments[0])
    _run("gae", arguments[:5], outputs, *arguments[5:])
    return outputs


@cpu_kernel("discounted_returns", "gae")
def _discounted_returns(*arguments: Any) -> Tensor:
    returns = empty_targets(arguments[0])
    _run("discounted_returns", arguments[:4], (returns,), *arguments[4:])
    return returns


def _run(op: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *discounts: float) -> None:
    """Call the kernel of ``op``; sequences that lie side by side are handed over as its columns."""
    tensors = [*inputs, *outputs]
    if _time_major(inputs[0]):
        tensors = [x.transpose(0, 2) for x in tensors]
    tensors = [x.contiguous() for x in tensors]
    if tensors[0].numel():
        native_kernel(op, tensors[0].dtype)(*tensors, tensors[0].shape, *discounts)


def _time_major(rewards: Tensor) -> bool:
    M, T, C = rewards.shape
    return C == 1 and rewards.stride()[:2] == (1, M) and M > 1 and T > 1


def empty_targets(rewards: Tensor) -> Tensor:
    """Memory for an output in the layout of ``rewards``: time-major if they are, else batch-major."""
    if _time_major(rewards):
        return rewards.new_empty(*reversed(rewards.shape)).transpose(0, 2)
    return rewards.new_empty(rewards.shape)


def _validate(
    op: str,
    dim: int,
    flags: dict[str, Tensor],
    reals: dict[str, Tensor],
    fractions: dict[str, float],
) -> Callable[[Tensor], Tensor]:
    """Check the arguments of one op; return what brings each tensor to [M, T, C]."""
    check_tensors(**reals, **flags)
    check_dtypes(op, reals)
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
        math.prod(rewards.shape[:dim]),
        rewards.shape[dim],
        math.prod(rewards.shape[dim + 1 :]),
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
    run = gae_reference if chosen == "reference" else _gae
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
    run = discounted_returns_reference if chosen == "reference" else _discounted_returns
    returns = run(
        canonical(rewards),
        canonical(next_values),
        canonical(terminated),
        canonical(truncated),
        gamma,
    )
    return returns.reshape(rewards.shape)
