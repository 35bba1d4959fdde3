"""Playing a task while a policy adapts to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssm_fast import ops
from ssm_fast.adaptation.hybrid_adapter import HybridAdaptationConfig, HybridAdapter
from ssm_fast.adaptation.policy_objective import (
    ActionDistribution,
    Experience,
    PolicyObjective,
    check_finite,
    policy_batch,
)
from ssm_fast.adaptation.standard_adapter import StandardAdapter
from ssm_fast.adaptation.value_ensemble import critic_scale, is_constant
from ssm_fast.checks import check_count, check_spaces
from ssm_fast.core.improved_ssm import ImprovedSSM, choose_action

if TYPE_CHECKING:
    from ssm_fast.env_runner.environment import AnyEnvironment

_LEAST_EXPLAINED = 0.01  # of the returns' variance, by a critic that tells its unit
_RECORDED = tuple(field.name for field in fields(Experience) if field.name != "initial_state")

Temperature = Callable[[Tensor], Tensor]
"""Of features ``[B, H]``: the temperature ``[B]`` to act with."""


class Player:
    """Plays ``num_episodes`` episodes in every row of an environment, one stretch after the other.

    Rows whose episodes are over play on until those of all rows are; what they do then is learnt
    from and not counted.

    Args:
        source: The environment; it is reset, and stays open.
        model: What acts first, to check that it fits.
        num_episodes: Episodes of every row.
        seed: Of the environment and of the actions.

    Attributes:
        env: The environment, wrapped.
        returns: Of the counted episodes so far, a list a row.
        lengths: Of the same.

    Raises:
        ValueError: The environment does not fit the model, or a number is too small.
        TypeError: A count or the seed is no integer.
    """

    def __init__(
        self, source: AnyEnvironment, model: ImprovedSSM, num_episodes: int, seed: int
    ) -> None:
        from ssm_fast.env_runner.environment import Environment

        check_count("num_episodes", num_episodes)
        check_count("seed", seed, 0)
        self.env = source if isinstance(source, Environment) else Environment.wrap(source)
        check_spaces(self.env, model.input_dim, model.action_dim, model.discrete)
        B = self.env.batch_size
        self.num_episodes = num_episodes
        self.returns: list[list[float]] = [[] for _ in range(B)]
        self.lengths: list[list[int]] = [[] for _ in range(B)]
        self._generator = torch.Generator().manual_seed(seed)
        self._observation, _ = self.env.reset(seed=seed)
        self._state = model.init_hidden(B)
        self._first = np.ones(B, dtype=np.bool_)  # [B]

    @property
    def is_done(self) -> bool:
        """Whether every row has played its episodes."""
        return all(len(row) >= self.num_episodes for row in self.returns)

    @torch.no_grad()
    def play(
        self,
        model: ImprovedSSM,
        steps: int,
        temperature_of: Temperature | None = None,
        deterministic: bool = False,
    ) -> Experience:
        """Plays until `steps` steps are taken or all episodes are over.

        Args:
            model: What acts.
            steps: Steps of every row, at most.
            temperature_of: Temperature by features; None is 1.
            deterministic: Take the mode of the policy.

        Returns:
            What was done, at least one step.

        Raises:
            FloatingPointError: An observation, reward or action is not finite.
        """
        weight = next(model.parameters())
        start = self._state
        record: list[tuple[Any, ...]] = []
        for t in range(steps):
            x = torch.from_numpy(self._observation).to(weight)  # [B, I]
            features, (mean, log_std, _, state) = features_of(model, x, self._state)
            policy = ActionDistribution(mean, log_std)
            temperature = torch.ones_like(mean[:, 0])  # [B]
            if temperature_of is not None:
                temperature = temperature_of(features)
                policy = policy.tempered(temperature)
            action = self._draw(policy, deterministic)
            log_prob = policy.log_prob(action)  # [B]
            finite = torch.isfinite(log_prob)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                raise FloatingPointError(
                    f"{self.env.env_name}: the policy of environment {row} is not finite at step "
                    f"{t} of a stretch: log-probability {float(log_prob[row])}"
                )
            obs, reward, terminated, truncated, info = self.env.step(action.cpu().numpy())
            record.append(
                (
                    *(x, action, log_prob, torch.from_numpy(reward).to(weight)),
                    *(torch.from_numpy(flag) for flag in (terminated, truncated, self._first)),
                    *(torch.from_numpy(info["final_obs"]).to(weight), temperature),
                )
            )
            self._first = terminated | truncated
            self._observation, self._state = obs, state
            if self._first.any():
                ended = torch.from_numpy(self._first).to(weight.device)
                self._state = state.masked_fill(ended[:, None], 0.0)
                self._count(info)
                if self.is_done:
                    break
        columns = [torch.stack(column, 1).to(weight.device) for column in zip(*record, strict=True)]
        return Experience(**dict(zip(_RECORDED, columns, strict=True)), initial_state=start)

    def _draw(self, policy: ActionDistribution, deterministic: bool) -> Tensor:
        """Actions ``[B, K]``, or ``[B]``, from the player's own generator."""
        if deterministic:
            return (
                policy.mean if policy.log_std is not None else choose_action(policy.mean, True)[0]
            )
        noise = torch.empty(policy.mean.shape, dtype=policy.mean.dtype, device="cpu")
        if policy.log_std is None:
            gumbel = -noise.exponential_(generator=self._generator).log()
            return (policy.mean + gumbel.to(policy.mean)).argmax(-1)
        noise = noise.normal_(generator=self._generator).to(policy.mean)
        return torch.addcmul(policy.mean, noise, policy.log_std.exp())

    def _count(self, info: dict[str, Any]) -> None:
        for row in np.flatnonzero(self._first):
            if len(self.returns[row]) < self.num_episodes:
                self.returns[row].append(float(info["episode_return"][row]))
                self.lengths[row].append(int(info["episode_length"][row]))


def play_episodes(
    model: ImprovedSSM,
    env: AnyEnvironment,
    num_episodes: int,
    seed: int,
    deterministic: bool = False,
) -> list[list[float]]:
    """Returns of ``num_episodes`` episodes a row by a policy that does not adapt.

    From the same seed an adapter sees the same first states and the same noise, so that the
    difference is what adapting does.
    """
    player = Player(env, model, num_episodes, seed)
    while not player.is_done:
        player.play(model, 1000, deterministic=deterministic)
    return player.returns


def adapt_to_environment(
    adapter: StandardAdapter,
    env: AnyEnvironment,
    num_episodes: int = 5,
    adapt_every: int = 1000,
    *,
    gamma: float | None = None,
    gae_lambda: float | None = None,
    objective: PolicyObjective | None = None,
    seed: int = 0,
) -> tuple[list[float], dict[str, Any]]:
    """Let a `StandardAdapter` or `HybridAdapter` learn from a task while it plays it.

    After every stretch of ``adapt_every`` steps first the value function takes the steps of a call,
    then the policy together with it those of another. The experience of a `HybridAdapter` goes to
    its buffer after that.

    Args:
        adapter: Its model is an `ImprovedSSM`.
        env: The task, in any number of rows. It is reset, and stays open.
        num_episodes: Episodes of every row.
        adapt_every: Steps of every row between two calls; a stretch may end in an episode.
        gamma: Discount factor; by default that of a `HybridAdapter`'s config, else 0.99.
        gae_lambda: Weight of longer returns; by default that of the same config, else 0.95.
        objective: The loss; by default `PolicyObjective` with its defaults.
        seed: Of the environment and of the actions.

    Returns:
        Each episode's return, the mean over the rows, and a dict with ``episode_returns`` (a list a
        row), ``episode_lengths``, and of every call ``losses``, ``steps`` and ``reward_scale``.

    Raises:
        ValueError: The environment does not fit the model, or a number is less than 1.
        TypeError: The model is another one.
        FloatingPointError: NaN or infinity, from the environment, the policy or an update. The
            weights are those that played the last whole stretch.
    """
    check_count("adapt_every", adapt_every)
    model = policy_of(adapter)
    config = adapter.config if isinstance(adapter, HybridAdapter) else HybridAdaptationConfig()
    gamma = config.gamma if gamma is None else gamma
    gae_lambda = config.gae_lambda if gae_lambda is None else gae_lambda
    objective = PolicyObjective() if objective is None else objective
    player = Player(env, model, num_episodes, seed)
    stats: dict[str, Any] = {"losses": [], "steps": [], "reward_scale": []}
    scale = config.reward_scale
    good = adapter.snapshot()
    try:
        while not player.is_done:
            experience = player.play(model, adapt_every)
            good = adapter.snapshot()
            if scale is None:
                scale = _reward_scale(model, experience, gamma)
                if isinstance(adapter, HybridAdapter):
                    adapter.reward_scale = scale
            for loss_fn in (PolicyObjective(value_coef=1.0, policy_coef=0.0), objective):
                batch = policy_batch(model, experience, gamma, gae_lambda, reward_scale=scale)
                loss, steps = adapter.update_step(*batch, loss_fn=loss_fn)
            if isinstance(adapter, HybridAdapter):
                adapter.add_experience(experience)
            for name, value in (("losses", loss), ("steps", steps), ("reward_scale", scale)):
                stats[name].append(value)
    except FloatingPointError:
        adapter.restore(good)
        raise
    stats["episode_returns"], stats["episode_lengths"] = player.returns, player.lengths
    return episode_means(player.returns), stats


def features_of(
    model: ImprovedSSM, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """What ``forward`` returns, and what the critic sees: ``[..., H]``, or ``[..., W]`` of its own network."""
    seen: list[Tensor] = []
    handle = model.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        outputs = model(x, state, reset)
    finally:
        handle.remove()
    return seen[0], outputs


def bootstrapped_returns(
    experience: Experience, gamma: float, next_values: Tensor | None = None
) -> Tensor:
    """Discounted returns ``[B, T]``, with a value where an episode goes on beyond what was seen.

    Args:
        experience: The steps.
        gamma: Discount factor.
        next_values: ``[B, T]``, of what the steps led to; by default the mean reward for ever.
    """
    rewards = experience.rewards
    if next_values is None:
        horizon = 1.0 / max(1.0 - gamma, 1e-3)
        next_values = torch.full_like(rewards, float(rewards.mean()) * horizon)
    cut = experience.ends() & ~experience.terminated
    cut[:, -1] |= ~experience.terminated[:, -1]
    return ops.discounted_returns(rewards, experience.terminated, cut, gamma, next_values)


def episode_means(returns: list[list[float]]) -> list[float]:
    """The mean over the rows of each episode."""
    return [math.fsum(episode) / len(episode) for episode in zip(*returns, strict=True)]


def policy_of(adapter: StandardAdapter) -> ImprovedSSM:
    """The model of an adapter.

    Raises:
        TypeError: It is no `ImprovedSSM`.
    """
    if isinstance(adapter.model, ImprovedSSM):
        return adapter.model
    raise TypeError(f"model must be an ImprovedSSM, got {type(adapter.model).__name__}")


@torch.no_grad()
def _reward_scale(model: ImprovedSSM, experience: Experience, gamma: float) -> float:
    """Units of reward in a unit of the model's values, or of returns where those tell nothing."""
    values, _ = model.unroll(experience.observations, experience.initial_state, experience.reset)
    check_finite("the model's values", values, FloatingPointError)
    returns = bootstrapped_returns(experience, gamma)
    scale, explained = critic_scale(values, returns)
    if explained < _LEAST_EXPLAINED:
        flat = is_constant(returns)
        scale = float(returns.abs().max() if flat else returns.std(correction=0)) or 1.0
    if not math.isfinite(scale):
        raise FloatingPointError(f"the returns overflow: their scale is {scale}")
    return scale
