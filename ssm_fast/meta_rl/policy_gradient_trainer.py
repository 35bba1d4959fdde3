"""REINFORCE with a recurrent policy over whole episodes."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_fast import ops
from ssm_fast.checks import check_count, check_flag, check_number, check_spaces
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner.environment import AnyEnvironment, Environment
from ssm_fast.meta_rl.ppo_trainer import TrainingResult
from ssm_fast.meta_rl.run import RunDirectory
from ssm_fast.meta_rl.training_state import (
    check_model,
    check_parts,
    check_settings,
    check_tensors,
    check_weights,
    continue_run,
    keep_last_iteration,
    load_adam,
    must_fit,
    read_count,
    save_checkpoint,
)
from ssm_fast.nn.parameters import learning_rate_scales

_LOGGER = logging.getLogger(__name__)
_STATE_VERSION = 1
_LONGEST_EPISODE = 10_000  # steps, where the environment has no time limit
_SETTINGS = (
    "learning_rate",
    "gamma",
    "entropy_coef",
    "max_grad_norm",
    "recurrent_lr_scale",
    "anneal_lr",
    "seed",
)


@dataclass(frozen=True)
class Episodes:
    """One episode a row, from its reset to its end; `T` is the longest one's length.

    Attributes:
        observations: `[B, T, input_dim]`.
        actions: `[B, T]` int64.
        rewards: `[B, T]`, zero past the end.
        terminated: `[B, T]` bool, set at most once a row.
        truncated: `[B, T]` bool, set at most once a row.
        valid: `[B, T]` bool, the step belongs to the episode.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor


class PolicyGradientTrainer:
    """REINFORCE (Williams 1992) for discrete actions, with a leave-one-out baseline.

    An iteration plays one episode in each of the `B` environments and takes one step of Adam on
    all of them: one pass of the model over the sequences `[B, T]`. The baseline of step `t` is the
    mean return-to-go of the *other* episodes at step `t`. It is independent of the action, so the
    gradient stays unbiased, and it follows the time that is left before a time limit, which the
    policy does not see. Advantages are scaled by the deviation of the returns, not by their own:
    once all episodes are equally good, the gradient vanishes instead of being noise blown up.

    Every iteration starts from seeds that follow from `seed` and its number alone. A checkpoint
    thus needs no state of a simulator or generator, and a resumed run equals the uninterrupted one
    bitwise on the same machine.

    Args:
        model: The policy: its outputs are the logits of the actions. It is moved to `device`.
        learning_rate: Of Adam, at the start.
        gamma: Discount factor. CartPole-v1 needs more than 0.99: the cart leaves its track after
            300 steps, and at 0.99 one run in ten forgets to prevent it.
        entropy_coef: Weight of the entropy bonus.
        max_grad_norm: Gradients are scaled down to this norm.
        recurrent_lr_scale: The transition matrix `A` learns at this fraction of the learning rate.
            Adam moves all its entries by about the learning rate, which moves its spectral radius
            `N` times as far: at the full rate it passes 1 within a few updates, and the policy
            collapses.
        anneal_lr: Decay the learning rate linearly to zero.
        checkpoint_interval: Iterations between checkpoints.
        seed: Of the environments and the sampled actions. By default drawn from torch's global
            generator.
        device: Where the model acts and learns.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A count is no integer, a flag no bool, or the model no `StateSpaceModel`.
    """

    policy_metadata: ClassVar[dict[str, str]] = {}
    policy_rates: ClassVar[dict[str, Tensor]] = {}

    def __init__(
        self,
        model: StateSpaceModel,
        learning_rate: float = 5e-3,
        gamma: float = 0.999,
        *,
        entropy_coef: float = 0.0,
        max_grad_norm: float = 0.5,
        recurrent_lr_scale: float = 0.1,
        anneal_lr: bool = True,
        checkpoint_interval: int = 10,
        seed: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        check_model(model, StateSpaceModel)
        self.learning_rate = check_number("learning_rate", learning_rate, above=0.0)
        self.gamma = check_number("gamma", gamma, at_least=0.0, at_most=1.0)
        self.entropy_coef = check_number("entropy_coef", entropy_coef, at_least=0.0)
        self.max_grad_norm = check_number("max_grad_norm", max_grad_norm, above=0.0)
        self.recurrent_lr_scale = check_number(
            "recurrent_lr_scale", recurrent_lr_scale, at_least=0.0
        )
        self.anneal_lr = check_flag("anneal_lr", anneal_lr)
        self.checkpoint_interval = check_count("checkpoint_interval", checkpoint_interval)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        self.seed = check_count("seed", seed, at_least=0)
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.Adam(
            [{"params": group} for group in self._groups()], lr=learning_rate, fused=True
        )
        self.iteration = 0
        self.episodes = 0
        self.timesteps = 0
        self._first_episode = 0  # of the call to train that is under way
        self._batch_size = 0  # of that call
        self._seconds = 0.0
        self._on_step: Callable[[int], None] | None = None  # of that call

    def train(
        self,
        env: AnyEnvironment,
        total_episodes: int,
        log_interval: int = 10,
        *,
        callback: Callable[[dict[str, float]], bool | None] | None = None,
        on_step: Callable[[int], None] | None = None,
        run: RunDirectory | None = None,
        resume: bool = False,
    ) -> TrainingResult:
        """Plays and learns from `total_episodes` episodes.

        Args:
            env: The environments; as many episodes make an update, and the last one takes what is
                left. A single environment leaves the baseline nothing to compare with.
            total_episodes: Episodes over all environments. A second call adds as many, with a
                learning-rate schedule of its own.
            log_interval: Iterations between lines of the log (logger
                `ssm_fast.meta_rl.policy_gradient_trainer`, level INFO).
            callback: Called with the metrics after each iteration; training stops after the one for
                which it returns False.
            on_step: Called in a rollout, after each step of all environments, with how many environment
                steps are taken so far.
            run: Where checkpoints, the learning curve and TensorBoard events go.
            resume: Continue from the newest intact checkpoint of `run`, where it has one;
                `total_episodes` then counts from the start of the run.

        Returns:
            The episodes and metrics of this call.

        Raises:
            FloatingPointError: NaN or infinity in an observation, a reward, a gradient or a weight.
                The last checkpoint is intact.
            ValueError: The environment does not fit the model, or the checkpoint these settings.
        """
        check_count("total_episodes", total_episodes)
        check_count("log_interval", log_interval)
        self._on_step = on_step
        env = self._prepare(env)
        env.warn_of_spaces()
        self._first_episode = self.episodes
        self._batch_size = env.batch_size
        if resume:
            continue_run(run, self)
        last = self._first_episode + total_episodes
        result = TrainingResult(0, 0, [], [], [])
        with keep_last_iteration(run, self, env) as keep:
            while self.episodes < last:
                metrics = self._iterate(env, last, result)
                if run is not None:
                    run.append_row(metrics)
                    run.log_scalars(
                        {f"train/{name}": value for name, value in metrics.items()}, self.timesteps
                    )
                keep()
                if self.iteration % log_interval == 0 or self.episodes == last:
                    _LOGGER.info(
                        "%d episodes, return %.1f, entropy %.3f, %.0f steps/s",
                        self.episodes,
                        metrics["episode_return"],
                        metrics["entropy"],
                        metrics["steps_per_second"],
                    )
                stop = callback is not None and callback(dict(metrics)) is False
                if run is not None and (
                    stop or self.episodes == last or self.iteration % self.checkpoint_interval == 0
                ):
                    save_checkpoint(run, self, env)
                if stop:
                    break
        self._on_step = None
        return TrainingResult(
            self.timesteps,
            self.iteration,
            result.episode_returns,
            result.episode_lengths,
            result.metrics,
        )

    def _iterate(self, env: Environment, last: int, result: TrainingResult) -> dict[str, float]:
        """One batch of episodes and one update."""
        start = time.perf_counter()
        learning_rate = self.learning_rate
        if self.anneal_lr:
            learning_rate *= (last - self.episodes) / (last - self._first_episode)
        others, transition = self.optimizer.param_groups
        others["lr"] = learning_rate
        transition["lr"] = learning_rate * self.recurrent_lr_scale
        try:
            episodes = self.collect_episodes(env, min(env.batch_size, last - self.episodes))
            losses = self.update(episodes)
        except FloatingPointError as error:
            raise FloatingPointError(f"iteration {self.iteration}: {error}") from error
        returns = episodes.rewards.sum(1).tolist()  # [B]
        lengths = episodes.valid.sum(1).tolist()  # [B]
        self.iteration += 1
        self.episodes += len(returns)
        self.timesteps += sum(lengths)
        result.episode_returns.extend(returns)
        result.episode_lengths.extend(lengths)
        seconds = time.perf_counter() - start
        self._seconds += seconds
        metrics = {
            "iteration": float(self.iteration),
            "timesteps": float(self.timesteps),
            "episode_return": sum(returns) / len(returns),
            "episode_length": sum(lengths) / len(lengths),
            "episodes": float(len(returns)),
            **losses,
            "learning_rate": learning_rate,
            "seconds": self._seconds,
            "steps_per_second": sum(lengths) / seconds,
        }
        result.metrics.append(metrics)
        return metrics

    def collect_episodes(self, env: Environment, count: int | None = None) -> Episodes:
        """Plays one episode in each of the first `count` environments with the current policy.

        The seeds of the environments and of the actions follow from the trainer's seed and
        iteration, so a second call with the same weights returns the same episodes.

        An episode of an environment without a time limit is cut short after 10,000 steps, with a
        warning.

        Args:
            env: The environments.
            count: `B`; all of them by default.

        Returns:
            The episodes, on the trainer's device.
        """
        B = env.batch_size if count is None else count
        env_seed, action_seed = np.random.SeedSequence((self.seed, self.iteration)).generate_state(
            2
        )
        generator = torch.Generator(self.device).manual_seed(int(action_seed))
        dtype = self.model.A.dtype
        steps: list[tuple[Tensor, ...]] = []
        played = 0
        obs, _ = env.reset(seed=int(env_seed >> 1))
        running = np.arange(env.batch_size) < B  # [env.batch_size]
        state = self.model.init_hidden(env.batch_size)  # [env.batch_size, N]
        with torch.no_grad():
            while running.any():
                x = torch.from_numpy(obs).to(self.device, dtype)  # [env.batch_size, input_dim]
                logits, state = self.model(x, state)  # [env.batch_size, action_dim]
                finite = torch.isfinite(logits).all(-1)  # [env.batch_size]
                if not bool(finite.all()):
                    row = int(finite.logical_not().nonzero()[0])
                    raise FloatingPointError(
                        f"step {len(steps)}: {env.env_name}: the logits of environment {row} are "
                        f"not finite: {logits[row].tolist()}"
                    )
                noise = torch.empty_like(logits).exponential_(generator=generator)
                actions = (logits - noise.log()).argmax(-1)  # Gumbel-max
                obs, reward, ended, cut, _ = env.step(actions.cpu().numpy())
                if env.max_episode_steps is None and len(steps) == _LONGEST_EPISODE - 1:
                    cut = cut | ~ended
                    _warn_of_no_limit(env)
                step = (np.where(running, reward, 0.0), ended & running, cut & running, running)
                steps.append((x[:B], actions[:B], *(torch.from_numpy(a[:B]) for a in step)))
                running = running & ~(ended | cut)
                played += int(step[3].sum())
                if self._on_step is not None:
                    self._on_step(self.timesteps + played)
        x, actions, *rest = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
        rewards, terminated, truncated, valid = (column.to(self.device) for column in rest)
        return Episodes(x, actions, rewards.to(dtype), terminated, truncated, valid)

    def update(self, episodes: Episodes) -> dict[str, float]:
        """Takes one step of Adam on a batch of whole episodes.

        Returns:
            `policy_loss`, `entropy` and `grad_norm`.
        """
        self._check_parts()
        advantages = self.compute_advantages(episodes)  # [B, T]
        logits, _ = self.model(episodes.observations)  # [B, T, action_dim]
        log_probs = F.log_softmax(logits, dim=-1)  # [B, T, action_dim]
        chosen = log_probs.gather(-1, episodes.actions.unsqueeze(-1)).squeeze(-1)  # [B, T]
        entropies = -(log_probs.exp() * log_probs).sum(-1)  # [B, T]
        steps = episodes.valid.sum()
        policy_loss = -(chosen * advantages).sum() / steps
        entropy = (entropies * episodes.valid).sum() / steps
        loss = policy_loss - self.entropy_coef * entropy
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if not math.isfinite(float(grad_norm)):
            raise FloatingPointError(
                f"loss {float(loss.detach())}, gradient norm {float(grad_norm)}"
            )
        self.optimizer.step()
        check_weights(self.model)
        return {
            "policy_loss": float(policy_loss.detach()),
            "entropy": float(entropy.detach()),
            "grad_norm": float(grad_norm),
        }

    def compute_advantages(self, episodes: Episodes) -> Tensor:
        """Returns-to-go less their leave-one-out baseline, over the deviation of the returns.

        Where no other episode is as long there is nothing to compare with, and the advantage is
        zero: measured by the mean of the batch, the longest episode would be blamed for the end
        that its time limit brings. A batch of one episode has the mean of its returns as baseline.

        Returns:
            `[B, T]`, zero where an episode has ended.
        """
        valid = episodes.valid.to(episodes.rewards.dtype)  # [B, T]
        returns = valid * ops.discounted_returns(
            episodes.rewards, episodes.terminated, episodes.truncated, self.gamma
        )  # [B, T]
        others = valid.sum(0) - 1.0  # [T]
        lone_baseline = returns if len(returns) > 1 else returns.mean()
        baseline = torch.where(
            others > 0, (returns.sum(0) - returns) / others.clamp(min=1.0), lone_baseline
        )  # [B, T]
        deviation = returns[episodes.valid].std(correction=0)
        return valid * (returns - baseline) / (deviation + 1e-8)

    def _prepare(self, env: AnyEnvironment) -> Environment:
        """Wraps a Gymnasium environment and checks that it fits the model."""
        if not isinstance(env, Environment):
            env = Environment.wrap(env)
        if not env.discrete:
            raise ValueError(
                f"{env.env_name} must have a Discrete action space for REINFORCE, "
                f"got {env.single_action_space}"
            )
        check_spaces(env, self.model.input_dim, self.model.output_dim, discrete=True)
        self._check_parts()
        return env

    def _groups(self) -> list[list[Tensor]]:
        """What learns at the full rate, and the transition matrix."""
        scales = learning_rate_scales(self.model, 0.0)
        named = list(self.model.named_parameters())
        return [[p for name, p in named if scales[name] == scale] for scale in (1.0, 0.0)]

    def _check_parts(self) -> None:
        check_parts(self.optimizer, self._groups())

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of a run depends on."""
        return {
            "version": _STATE_VERSION,
            "settings": self._settings(),
            "batch_size": self._batch_size,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "episodes": self.episodes,
            "timesteps": self.timesteps,
            "first_episode": self._first_episode,
            "seconds": self._seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state of `state_dict`.

        Raises:
            ValueError: It belongs to other settings or another model, or is incomplete.
        """
        with must_fit():
            current = self._settings()
            if self._batch_size:  # an environment is there to compare with
                current["batch_size"] = self._batch_size
            check_settings(state, _STATE_VERSION, current)
            weights = check_tensors("model", state["model"], self.model.state_dict())
            load_adam(self.optimizer, state["optimizer"])
            self.model.load_state_dict(weights)
            self.iteration = read_count(state, "iteration")
            self.episodes = read_count(state, "episodes")
            self.timesteps = read_count(state, "timesteps")
            self._first_episode = read_count(state, "first_episode")
            self._batch_size = read_count(state, "batch_size")
            self._seconds = float(state["seconds"])

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}


def _warn_of_no_limit(env: Environment) -> None:
    warnings.warn(
        f"{env.env_name} has no time limit: episodes end after {_LONGEST_EPISODE:,} steps. For another "
        "number: Environment(..., max_episode_steps=...), or max_episode_steps of gymnasium.register",
        stacklevel=3,
    )
