"""What a policy did, the advantages of it, and the clipped surrogate that learns from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_fast import ops
from ssm_fast.checks import check_kind, check_number
from ssm_fast.core.improved_ssm import ImprovedSSM, gaussian_log_prob

_LARGEST_RATIO = 20.0  # of log-probabilities far apart, so that none overflows
SMALLEST_DEVIATION = 1e-3  # in largest values: what deviates less is rounding


@dataclass(frozen=True)
class ActionDistribution:
    """The distribution of actions at every step.

    Attributes:
        mean: Mean of a diagonal Gaussian, or the logits of a categorical one, ``[..., K]``.
        log_std: ``[..., K]``; None of a categorical distribution.
    """

    mean: Tensor
    log_std: Tensor | None

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probabilities ``[...]`` of actions ``[..., K]``, or of integers ``[...]``."""
        if self.log_std is not None:
            return gaussian_log_prob(actions, self.mean, self.log_std)
        log_probs = F.log_softmax(self.mean, dim=-1)  # [..., K]
        return log_probs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy ``[...]``."""
        if self.log_std is not None:
            return (self.log_std + 0.5 * (1.0 + math.log(2.0 * math.pi))).sum(-1)
        log_probs = F.log_softmax(self.mean, dim=-1)  # [..., K]
        return -(log_probs.exp() * log_probs).sum(-1)

    def kl(self, other: ActionDistribution) -> Tensor:
        """``KL(self || other)`` ``[...]``."""
        if self.log_std is None or other.log_std is None:
            p, q = F.log_softmax(self.mean, dim=-1), F.log_softmax(other.mean, dim=-1)
            return (p.exp() * (p - q)).sum(-1)
        ratio = (2.0 * (self.log_std - other.log_std)).exp()  # [..., K], of the variances
        shift = ((self.mean - other.mean) / other.log_std.exp()).square()  # [..., K]
        return 0.5 * (ratio + shift - 1.0 - ratio.log()).sum(-1)

    def detach(self) -> ActionDistribution:
        """The same numbers without their graph."""
        log_std = None if self.log_std is None else self.log_std.detach()
        return ActionDistribution(self.mean.detach(), log_std)

    def tempered(self, temperature: Tensor) -> ActionDistribution:
        """With every standard deviation times ``temperature [...]``, or the logits over it."""
        factor = temperature.unsqueeze(-1)  # [..., 1]
        if self.log_std is None:
            return ActionDistribution(self.mean / factor, None)
        return ActionDistribution(self.mean, self.log_std + factor.log())


@dataclass(frozen=True)
class Experience:
    """``T`` steps that each of ``B`` rows took one after the other, episodes ending anywhere.

    Attributes:
        observations: ``[B, T, I]``, not normalised.
        actions: ``[B, T, K]``, not clipped; ``[B, T]`` int64 of a discrete policy.
        log_probs: ``[B, T]``, of the policy that acted, at the temperature that it acted with.
        rewards: ``[B, T]``.
        terminated: ``[B, T]`` bool, the episode ended in a terminal state.
        truncated: ``[B, T]`` bool, the episode was cut short.
        reset: ``[B, T]`` bool, the observation is the first of an episode.
        next_observations: ``[B, T, I]``, what each step led to: at its end the episode's last.
        temperature: ``[B, T]``, see `ActionDistribution.tempered`.
        initial_state: ``[L, B, N]``, the state before step 0.

    Raises:
        ValueError: A shape does not fit, there is no step, or a number is not finite.
        TypeError: A flag is not boolean.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    reset: Tensor
    next_observations: Tensor
    temperature: Tensor
    initial_state: Tensor

    def __post_init__(self) -> None:
        steps = list(self.rewards.shape)
        if len(steps) != 2 or 0 in steps:
            raise ValueError(f"rewards must have shape [B, T] with a step at least, got {steps}")
        for field in fields(self)[:-1]:
            x = getattr(self, field.name)
            if list(x.shape[:2]) != steps:
                raise ValueError(
                    f"{field.name} must have shape [B, T, ...] = {[*steps, '...']}, as rewards, "
                    f"got {list(x.shape)}"
                )
            check_finite(field.name, x, ValueError)
        for name in ("terminated", "truncated", "reset"):
            if getattr(self, name).dtype != torch.bool:
                raise TypeError(f"{name} must be torch.bool, got {getattr(self, name).dtype}")
        if self.initial_state.ndim != 3 or self.initial_state.shape[1] != steps[0]:
            raise ValueError(
                f"initial_state must have shape [L, B, N] with B = {steps[0]}, "
                f"got {list(self.initial_state.shape)}"
            )

    def ends(self) -> Tensor:
        """Where what follows in the row is no part of the step's episode: ``[B, T]``.

        An episode also ends where the next step is the first of another: the row of a replayed
        sequence may leave one before it was over.
        """
        ends = self.terminated | self.truncated
        ends[:, :-1] |= self.reset[:, 1:]
        return ends

    def states_before(self, states: Tensor) -> Tensor:
        """The state before each step, from those after each step ``[L, B, T, N]``."""
        return torch.cat([self.initial_state.unsqueeze(2), states[:, :, :-1]], 2)


class PolicyObjective:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), as a ``loss_fn``.

    ``-p mean min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â) + c mean (V - R)²`` with ``ρ`` the probability of
    each action over that by which it was taken, whoever took it: of replayed steps it is their
    importance ratio. `policy_batch` makes its ``x``, ``y`` and state.

    Args:
        clip_epsilon: ``ε``.
        value_coef: ``c``.
        policy_coef: ``p``; with 0 the values alone learn.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self, clip_epsilon: float = 0.2, value_coef: float = 0.5, policy_coef: float = 1.0
    ) -> None:
        check_number("clip_epsilon", clip_epsilon, above=0.0)
        check_number("value_coef", value_coef, at_least=0.0)
        check_number("policy_coef", policy_coef, at_least=0.0)
        self.clip_epsilon = clip_epsilon
        self.policy_coef = policy_coef
        self.value_coef = value_coef

    def __call__(self, model: nn.Module, x: Any, y: Any, hidden_state: Tensor | None) -> Tensor:
        """The loss ``[]``.

        Args:
            model: An `ImprovedSSM`.
            x: ``observations`` as ``x`` and ``reset`` by name, and optionally ``temperature``.
            y: ``actions``, ``log_probs``, ``advantages`` and ``returns`` by name.
            hidden_state: ``[L, B, N]``.
        """
        now, values = distribution_of(model, x, hidden_state)
        log_ratio = now.log_prob(y["actions"]) - y["log_probs"]  # [B, T]
        ratio = log_ratio.clamp(max=math.log(_LARGEST_RATIO)).exp()
        clipped = ratio.clamp(1.0 - self.clip_epsilon, 1.0 + self.clip_epsilon)
        surrogate = torch.minimum(ratio * y["advantages"], clipped * y["advantages"])
        loss = -self.policy_coef * surrogate.mean()
        if self.value_coef:
            loss = loss + self.value_coef * (values - y["returns"]).square().mean()
        return loss


def distribution_of(
    model: nn.Module, x: Any, hidden_state: Tensor | None
) -> tuple[ActionDistribution, Tensor]:
    """The distribution of actions of an `ImprovedSSM`, and its values ``[...]``.

    Args:
        model: The policy.
        x: Observations, or ``x``, ``reset`` and ``temperature`` by name.
        hidden_state: ``[L, B, N]``.

    Raises:
        TypeError: The model is another one.
    """
    check_kind(model, ImprovedSSM)
    arguments = dict(x) if isinstance(x, Mapping) else {"x": x}
    temperature = arguments.pop("temperature", None)
    mean, log_std, values, _ = model(**arguments, hidden_state=hidden_state)
    distribution = ActionDistribution(mean, log_std)
    if temperature is not None:
        distribution = distribution.tempered(temperature)
    return distribution, values


@torch.no_grad()
def policy_batch(
    model: ImprovedSSM,
    experience: Experience,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    *,
    reward_scale: float = 1.0,
    normalize: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What `PolicyObjective` learns from, with the advantages under the model's own values.

    Args:
        model: The policy that learns.
        experience: What it did, or another policy: its importance ratios cut the traces.
        gamma: Discount factor.
        gae_lambda: Weight of longer returns.
        reward_scale: Rewards are divided by it; that in which the model's values are given.
        normalize: Shift and scale the advantages to mean 0 and deviation 1.

    Returns:
        ``x``, ``y`` and ``hidden_state`` of ``update_step``.

    Raises:
        FloatingPointError: The model's values or actions are not finite on these steps.
    """
    values, states = model.unroll(
        experience.observations, experience.initial_state, experience.reset
    )  # [B, T], [L, B, T, N]
    next_values = _next_values(model, experience, values, states)
    ratios = importance_ratios(model, experience)
    advantages = traced_advantages(
        experience, values, next_values, ratios, gamma, gae_lambda, reward_scale
    )
    check_finite("the advantages under the model", advantages + values, FloatingPointError)
    x = {
        "x": experience.observations,
        "reset": experience.reset,
        "temperature": experience.temperature,
    }
    y = {
        "actions": experience.actions,
        "log_probs": experience.log_probs,
        "advantages": normalized(advantages, advantages + values) if normalize else advantages,
        "returns": advantages + values,
    }
    return x, y, experience.initial_state


def importance_ratios(model: ImprovedSSM, experience: Experience) -> Tensor:
    """The probability of each action over that by which it was taken, at most 20: ``[B, T]``."""
    x = {
        "x": experience.observations,
        "reset": experience.reset,
        "temperature": experience.temperature,
    }
    now, _ = distribution_of(model, x, experience.initial_state)
    log_ratio = now.log_prob(experience.actions) - experience.log_probs  # [B, T]
    return log_ratio.clamp(max=math.log(_LARGEST_RATIO)).exp()


def traced_advantages(
    experience: Experience,
    values: Tensor,
    next_values: Tensor,
    ratios: Tensor,
    gamma: float,
    gae_lambda: float,
    reward_scale: float = 1.0,
) -> Tensor:
    """GAE with traces that an unlikely action cuts (Retrace, Munos et al. 2016, arXiv 1606.02647).

    ``Â_t = δ_t + γ λ min(1, ρ_{t+1}) Â_{t+1}`` within an episode, with
    ``δ_t = r_t + γ V(s'_t) - V(s_t)``, without the value after a terminal state. On steps
    of the policy itself every ``ρ`` is 1 and it is GAE (arXiv 1506.02438).

    Args:
        experience: The steps.
        values: ``[B, T]``, of the observations.
        next_values: ``[B, T]``, of what the steps led to.
        ratios: ``[B, T]``.
        gamma: Discount factor.
        gae_lambda: Weight of longer returns.
        reward_scale: What rewards are divided by.

    Returns:
        ``[B, T]``.
    """
    alive = (~experience.terminated).to(values.dtype)  # [B, T]
    delta = experience.rewards / reward_scale + gamma * alive * next_values - values
    decay = torch.zeros_like(delta)
    decay[:, :-1] = gamma * gae_lambda * ratios[:, 1:].clamp(max=1.0)
    decay = decay.masked_fill(experience.ends(), 0.0)
    return ops.linear_scan(decay, delta, reverse=True)  # [B, T]


def normalized(advantages: Tensor, returns: Tensor) -> Tensor:
    """With mean 0 and deviation 1 over all steps; close to 0 where all are worth the same.

    A deviation below a thousandth of the largest return is rounding, and is not blown up.
    """
    floor = SMALLEST_DEVIATION * returns.abs().max() + 1e-8
    deviation = torch.maximum(advantages.std(correction=0), floor)
    return (advantages - advantages.mean()) / deviation


def boundaries(experience: Experience) -> tuple[Tensor, Tensor]:
    """Rows and steps ``[M]`` whose next observation is not that of the step after it."""
    last = experience.ends()
    last[:, -1] = True
    rows, steps = (last & ~experience.terminated).nonzero(as_tuple=True)
    return rows, steps


def _next_values(
    model: ImprovedSSM, experience: Experience, values: Tensor, states: Tensor
) -> Tensor:
    """Values ``[B, T]`` of what the steps led to; zero where nothing follows."""
    next_values = torch.zeros_like(values)
    next_values[:, :-1] = values[:, 1:]
    rows, steps = boundaries(experience)
    if len(rows) > 0:
        beyond = experience.next_observations[rows, steps]  # [M, I]
        next_values[rows, steps] = model(beyond, states[:, rows, steps])[2]
    return next_values


def check_finite(name: str, x: Tensor, error: type[Exception]) -> None:
    """Raises an error that names the first place ``[B, T, ...]`` where numbers are not finite."""
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return
    row, step = (~finite).nonzero()[0].tolist()[:2]
    raise error(f"{name} must be finite, got NaN or infinity in row {row}, step {step}")
