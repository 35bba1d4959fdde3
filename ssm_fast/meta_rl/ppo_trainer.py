"""Proximal policy optimisation over whole sequences of a recurrent actor-critic."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssm_fast import ops
from ssm_fast.checks import check_count, check_flag, check_number, check_spaces, is_replaced
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.rollout_policy import RolloutPolicy
from ssm_fast.core.sequence_gradient import sequence_gradient
from ssm_fast.env_runner.environment import AnyEnvironment, Environment
from ssm_fast.meta_rl.distributed import Part, Rows, World
from ssm_fast.meta_rl.flat_adam import FlatAdam
from ssm_fast.meta_rl.flat_parameters import FlatParameters
from ssm_fast.meta_rl.ppo_epoch import METRICS, Objective, PpoEpoch
from ssm_fast.meta_rl.rollout import Rollout, RolloutRecording
from ssm_fast.meta_rl.run import RunDirectory, read_state, write_state
from ssm_fast.meta_rl.training_state import (
    check_model,
    check_parts,
    check_settings,
    check_tensors,
    check_weights,
    keep_last_iteration,
    load_adam,
    must_fit,
    read_count,
    save_checkpoint,
    start_run,
)
from ssm_fast.native.gradient import SequenceGradient
from ssm_fast.native.impl import Choice, Impl
from ssm_fast.native.plan import Reason
from ssm_fast.nn.running_norm import RunningNorm

_LOGGER = logging.getLogger(__name__)
_STEPS_PER_ITERATION = 2048  # over all environments, where num_steps is not given
_LONGEST_SEQUENCE = 8  # where sequence_length is not given
_WARM_UP_STEPS = (
    2048  # over all environments, before the first iteration; at most a rollout, or half of all
)
_REWARD_CLIP = 10.0  # of the scaled reward
_EPISODES_PER_INTERVAL = 5  # of the time limit, at least, between two resets of all environments
_EPISODE_WINDOW = 20  # episodes in the reported mean
_KL_BAND, _RATE_FACTOR = 1.5, 1.3  # of the KL divergence around desired_kl, of the answer to it
_RATE_RANGE = 100.0  # how far it goes from the start, either way
_LAST_KL = 0.1  # of desired_kl, that annealing comes to
_STATE_VERSION = 3
_SETTINGS = (
    "learning_rate",
    "gamma",
    "gae_lambda",
    "clip_epsilon",
    "value_coef",
    "entropy_coef",
    "max_grad_norm",
    "ppo_epochs",
    "mini_batch_size",
    "num_steps",
    "sequence_length",
    "anneal_lr",
    "recompute_advantages",
    "scale_rewards",
    "clip_value_loss",
    "target_kl",
    "desired_kl",
    "recurrent_lr_scale",
    "staggered_resets",
    "checkpoint_interval",
    "seed",
)


class _Minibatch(NamedTuple):
    """`S` sequences of `L` steps, as far as this rank has them."""

    observations: Tensor  # [S, L, input_dim], normalised
    actions: Tensor  # [S, L, ...]
    log_probs: Tensor  # [S, L], of the policy that acted
    reset: Tensor  # [S, L]
    values: Tensor  # [S, L], before the update
    returns: Tensor  # [S, L]
    advantages: Tensor  # [S, L], standardized
    states: Tensor  # [num_layers, S, N], before each sequence
    weight: float  # of these sequences in the minibatch


@dataclass(frozen=True)
class TrainingResult:
    """What `PPOTrainer.train` did.

    Attributes:
        timesteps: Environment steps taken so far, over all calls and before a resume.
        iterations: Rollouts and updates done so far.
        episode_returns: Of every episode that ended in this call, in order.
        episode_lengths: Of the same episodes.
        metrics: One dict an iteration of this call; the keys are those of the learning curve.
    """

    timesteps: int
    iterations: int
    episode_returns: list[float]
    episode_lengths: list[int]
    metrics: list[dict[str, float]]


class PPOTrainer:
    """Recurrent PPO (Schulman et al. 2017, arXiv 1707.06347) with GAE (arXiv 1506.02438).

    An iteration collects `num_steps` steps of every environment and passes over them `ppo_epochs`
    times. Each epoch first runs the current weights over the rollout once, which gives the states
    that its sequences start from, the values, and with them the advantages; then it shuffles the
    sequences of `sequence_length` steps into minibatches. Episodes may end anywhere in a sequence.
    A truncated episode is bootstrapped with the value of its true last observation, a terminated
    one is cut.

    Rewards are divided by the running standard deviation of the discounted return. Where the model
    has an `obs_norm`, its statistics move between iterations only, so that a rollout and its update
    see the same inputs. Both statistics travel in the checkpoint.

    Every `checkpoint_interval` iterations all environments are reset with a seed that follows from
    `seed` and the iteration. A checkpoint thus needs no simulator state, and a resumed run equals
    the uninterrupted one bitwise on the same machine. A reset cuts episodes off, so where the
    environment has a time limit, at least five times as many steps lie between two of them. A
    checkpoint that is written in between, after Ctrl-C for instance, holds the actions since the
    last reset, which a resume plays again without learning; of several processes it does not, and
    all environments are reset there.

    Several processes train as one with all of their environments would, to rounding, where each
    makes the trainer and calls `train` with its own environments; see docs/distributed.md.

    Args:
        model: The policy. It is moved to `device`.
        learning_rate: Of Adam, at the start.
        gamma: Discount factor, for GAE and for the reward scaling.
        gae_lambda: Weight of longer returns in GAE.
        clip_epsilon: The ratio of probabilities is clipped to `1 +- clip_epsilon`.
        value_coef: Weight of the mean squared error of the value.
        entropy_coef: Weight of the entropy bonus.
        max_grad_norm: Gradients are scaled down to this norm.
        ppo_epochs: Passes over each rollout.
        mini_batch_size: Steps in a minibatch, rounded to whole sequences.
        device: Where the model acts and learns.
        num_steps: Steps of each environment in a rollout. By default at most 2048 over all of them,
            in whole sequences.
        sequence_length: Steps of a sequence; must divide `num_steps`. By default the largest
            divisor that is at most 8 and at most `mini_batch_size`.
        anneal_lr: Decay the learning rate linearly to zero; with `desired_kl` that one instead, to a
            tenth.
        recompute_advantages: Refresh values, advantages and initial states in every epoch, not only
            in the first.
        scale_rewards: Divide rewards by the running standard deviation of the discounted return.
        clip_value_loss: Also clip the change of the value since the rollout by `clip_epsilon`.
        target_kl: End an update after the epoch whose mean KL divergence is above this.
        desired_kl: Let the learning rate follow the mean KL divergence of the updates: an update
            well above this lowers it, one well below raises it, by a factor of at most 100 from the
            start (Heess et al. 2017, arXiv 1707.02286, do so with the weight of a penalty).
        recurrent_lr_scale: The part of the learning rate at which the weights learn that lead into the
            states of the layers, through them and out of them. A state sums up many steps: a step of
            these weights changes the policy several times as much as one of the others.
        staggered_resets: Cut the first episodes short, each row's by another part of the time limit,
            so that rows do not restart together and every rollout has beginnings of episodes
            (Bharthulwar et al. 2025, arXiv 2511.21011). The environment must have a time limit;
            returns of such episodes are those of fewer steps.
        checkpoint_interval: Iterations between checkpoints; more where five episodes of the
            environment's time limit take more.
        num_threads: Of torch while training, which share each minibatch; None leaves them as they
            are. Where the cores are free, two make an update 1.7 times as fast; where one waits for
            a busy core, it takes many times as long. The last bits depend on their number.
        seed: Of the environments, the action noise and the shuffling. By default drawn from torch's
            global generator.
        world: The processes that train together; see `join_world`. By default this one alone.
        impl: Where gradients come from: ``"native"`` code, ``"autograd"``, or native code where the
            model has a plan (``"auto"``; `ssm_fast.native.plan_of`).

    Attributes:
        gradients: The `Choice` that `impl` makes; its ``path`` is "native", or says why it is not.
        epochs: The same for whole epochs, which can be one native call if the gradients are native.

    Raises:
        ValueError: A number is out of its range, or no parameter of the model is trainable.
        TypeError: A count is no integer, a flag no bool, or the model in half precision.
    """

    policy_metadata: ClassVar[dict[str, str]] = {}
    policy_rates: ClassVar[dict[str, Tensor]] = {}

    def __init__(
        self,
        model: ImprovedSSM,
        learning_rate: float = 2e-4,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_epsilon: float = 0.2,
        value_coef: float = 0.5,
        entropy_coef: float = 0.0,
        max_grad_norm: float = 0.5,
        ppo_epochs: int = 10,
        mini_batch_size: int = 128,
        device: str | torch.device = "cpu",
        *,
        num_steps: int | None = None,
        sequence_length: int | None = None,
        anneal_lr: bool = True,
        recompute_advantages: bool = True,
        scale_rewards: bool = True,
        clip_value_loss: bool = False,
        target_kl: float | None = None,
        desired_kl: float | None = None,
        recurrent_lr_scale: float = 0.1,
        staggered_resets: bool = False,
        checkpoint_interval: int = 20,
        num_threads: int | None = 1,
        seed: int | None = None,
        world: World | None = None,
        impl: Impl = "auto",
    ) -> None:
        check_model(model, ImprovedSSM)
        self.gradients = Choice(impl, _LOGGER)
        self.epochs = Choice("auto", _LOGGER, "epochs", "minibatch by minibatch")
        self.learning_rate = check_number("learning_rate", learning_rate, above=0.0)
        self.gamma = check_number("gamma", gamma, at_least=0.0, at_most=1.0)
        self.gae_lambda = check_number("gae_lambda", gae_lambda, at_least=0.0, at_most=1.0)
        self.clip_epsilon = check_number("clip_epsilon", clip_epsilon, above=0.0)
        self.value_coef = check_number("value_coef", value_coef, at_least=0.0)
        self.entropy_coef = check_number("entropy_coef", entropy_coef, at_least=0.0)
        self.max_grad_norm = check_number("max_grad_norm", max_grad_norm, above=0.0)
        self.ppo_epochs = check_count("ppo_epochs", ppo_epochs)
        self.mini_batch_size = check_count("mini_batch_size", mini_batch_size)
        self.num_steps = None if num_steps is None else check_count("num_steps", num_steps)
        self.sequence_length = (
            None if sequence_length is None else check_count("sequence_length", sequence_length)
        )
        self.anneal_lr = check_flag("anneal_lr", anneal_lr)
        self.recompute_advantages = check_flag("recompute_advantages", recompute_advantages)
        self.scale_rewards = check_flag("scale_rewards", scale_rewards)
        self.clip_value_loss = check_flag("clip_value_loss", clip_value_loss)
        self.target_kl = (
            None if target_kl is None else check_number("target_kl", target_kl, above=0.0)
        )
        self.desired_kl = (
            None if desired_kl is None else check_number("desired_kl", desired_kl, above=0.0)
        )
        self.recurrent_lr_scale = check_number(
            "recurrent_lr_scale", recurrent_lr_scale, at_least=0.0
        )
        self.staggered_resets = check_flag("staggered_resets", staggered_resets)
        self.checkpoint_interval = check_count("checkpoint_interval", checkpoint_interval)
        self.num_threads = None if num_threads is None else check_count("num_threads", num_threads)
        self.world = world or World()
        seed = self.world.first(int(torch.randint(2**31, ()))) if seed is None else seed
        self.seed = check_count("seed", seed, at_least=0)
        self.device = torch.device(device)
        self.model = model.to(self.device)

        self._weights = FlatParameters(self.model, self.world, self.recurrent_lr_scale)
        self._gradient: SequenceGradient | None = None  # of the last update
        self.optimizer = torch.optim.Adam(
            [self._weights.vector], lr=learning_rate, eps=1e-5, fused=True
        )
        self._rate = self.learning_rate  # where the KL divergence has brought it
        self.return_norm = RunningNorm(1)
        self.iteration = 0
        self.timesteps = 0
        self._first_timesteps = 0  # of the call to train that is under way
        self._warm_up_timesteps = 0  # of that call
        self._rollout_steps = 0  # of that call, but for its last rollout
        self._batch_size = 0  # of that call
        self._seconds = 0.0
        self._on_step: Callable[[int], None] | None = None  # of that call
        self._recent_returns: deque[float] = deque(maxlen=_EPISODE_WINDOW)
        self._recent_lengths: deque[int] = deque(maxlen=_EPISODE_WINDOW)
        self._noise = torch.Generator(self.device).manual_seed(self.seed)
        self._shuffle = torch.Generator().manual_seed(self.seed)

        self._rows: tuple[Environment | None, Rows] = (None, Rows(0, 0, 0))  # of the environment

        # Where the environments stand between two rollouts.
        self._env: Environment | None = None
        self._observation: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self._state = torch.empty(0)  # [num_layers, B, N]
        self._reset = np.empty(0, dtype=np.bool_)  # [B]
        self._return = torch.empty(0)  # [B], discounted, of the episodes under way
        self._reset_seed = 0  # of the last reset of all environments
        self._played: list[Tensor] = []  # actions since then [B, T, ...]
        self._under_way: dict[str, Any] | None = (
            None  # of a state that was read: `_episodes_under_way`
        )

    def __getstate__(self) -> dict[str, Any]:
        # Addresses, which the next update makes anew, and what only the call under way is for.
        return {**vars(self), "_gradient": None, "_on_step": None}

    def train(
        self,
        env: AnyEnvironment,
        total_timesteps: int,
        log_interval: int = 10,
        *,
        callback: Callable[[dict[str, float]], bool | None] | None = None,
        on_step: Callable[[int], None] | None = None,
        run: RunDirectory | None = None,
        resume: bool = False,
    ) -> TrainingResult:
        """Collects and learns until `total_timesteps` environment steps are taken.

        Args:
            env: The environments, of several processes those of this one. A single one is stepped
                alone; a batch learns faster.
            total_timesteps: Steps over all environments, rounded up to whole steps of all of them;
                the last rollout is as long as what is left. The first up to 2048 of them, half of
                all at most, give `obs_norm` its first statistics and are not learnt from. A second
                call adds as many, with a learning-rate schedule of its own.
            log_interval: Iterations between lines of the log (logger `ssm_fast.meta_rl.ppo_trainer`,
                level INFO).
            callback: Called with the metrics after each iteration; training stops after the one for
                which it returns False, on rank 0.
            on_step: Called in a rollout, after each step of all environments, with how many environment
                steps are taken so far.
            run: Where checkpoints, the learning curve and TensorBoard events go; of several
                processes, rank 0 alone has it.
            resume: Continue from the newest intact checkpoint of `run`, where it has one;
                `total_timesteps` then counts from the start of the run.

        Returns:
            The episodes and metrics of this call.

        Raises:
            FloatingPointError: NaN or infinity in an observation, a reward, a gradient or a weight.
                The last checkpoint is intact.
            ValueError: The environment does not fit the model, or the checkpoint these settings.
            LostRank: Another process has died or does not answer. The last checkpoint is intact.
        """
        check_number("total_timesteps", total_timesteps, at_least=1)
        check_count("log_interval", log_interval)
        self._on_step = on_step
        env = self._prepare(env)
        if self.world.rank == 0:
            env.warn_of_spaces()
        self._first_timesteps, self._warm_up_timesteps = self.timesteps, 0
        self._rollout_steps = self._steps_of(env)
        self._batch_size = self._rows_of(env).total
        start_run(self.world, run, self, resume)
        total_timesteps = math.ceil(total_timesteps / self._batch_size) * self._batch_size
        last = self._first_timesteps + total_timesteps
        interval = self.reset_interval(env)
        result = TrainingResult(0, 0, [], [], [])
        self._env = None
        if not resume:
            self._under_way = None
        with (
            torch.enable_grad(),
            _threads(self.num_threads),
            keep_last_iteration(run, self, env) as keep,
        ):
            while self.timesteps < last:
                metrics = self._iterate(env, total_timesteps, result)
                due = self.iteration % log_interval == 0 or self.timesteps >= last
                if due and self.world.rank == 0:
                    _LOGGER.info(
                        "%d steps, return %.1f, KL %.4f, %.0f steps/s",
                        self.timesteps,
                        metrics["episode_return"],
                        metrics["approx_kl"],
                        metrics["steps_per_second"],
                    )
                stop = False
                with self.world.share_errors():
                    is_due = self.iteration % interval == 0 or self.timesteps >= last
                    if run is not None:
                        self._record(run, env, metrics, is_due)
                    keep()
                    if callback is not None:
                        stop = callback(dict(metrics)) is False
                    if run is not None and stop and not is_due:
                        save_checkpoint(run, self, env)
                if self.world.first(stop):
                    break
        self._rollout_steps, self._on_step = 0, None
        return TrainingResult(
            self.timesteps,
            self.iteration,
            result.episode_returns,
            result.episode_lengths,
            result.metrics,
        )

    def reset_interval(self, env: Environment) -> int:
        """Iterations between two checkpoints, and so between two resets of all environments.

        `checkpoint_interval`, or what `_EPISODES_PER_INTERVAL` episodes of the time limit take.
        """
        if env.max_episode_steps is None:
            return self.checkpoint_interval
        steps = _EPISODES_PER_INTERVAL * env.max_episode_steps
        return max(self.checkpoint_interval, math.ceil(steps / self._steps_of(env)))

    def timesteps_for(self, env: Environment, episodes: int, ended: int | None = None) -> int:
        """Environment steps within which `episodes` episodes end, however long they are.

        A reset of all environments throws away the episodes under way. This is the exact number
        where every episode reaches the time limit; shorter ones end earlier.

        Args:
            env: The environments.
            episodes: From a start of training on, as the steps.
            ended: Of a run that is resumed, how many of them have ended.

        Raises:
            ValueError: The environment has no time limit.
        """
        limit, B, T = env.max_episode_steps, self._rows_of(env).total, self._steps_of(env)
        if limit is None:
            raise ValueError(f"the episodes of {env.env_name} have no time limit")
        interval = self.reset_interval(env)

        def end(iteration: int, missing: int) -> int:
            reset = iteration + interval - iteration % interval  # the next one
            before = B * ((reset - iteration) * T // limit)  # episodes
            if missing <= before:
                return iteration + math.ceil(math.ceil(missing / B) * limit / T)
            intervals, left = divmod(missing - before - 1, B * (interval * T // limit))
            return reset + intervals * interval + math.ceil((left // B + 1) * limit / T)

        last = end(0, episodes)
        if ended is not None and self._under_way is None:  # episodes were cut off where it ended
            last = max(last, end(self.iteration, episodes - ended))
        warm_up = B * self._warm_up_steps(env) or self._warm_up_timesteps
        return last * B * T + warm_up

    def _record(
        self, run: RunDirectory, env: Environment, metrics: dict[str, float], is_due: bool
    ) -> None:
        """Writes the metrics of an iteration, and a checkpoint where one is due."""
        run.note("gradients", self.gradients.path)
        run.note("epochs", self.epochs.path)
        run.append_row(metrics)
        run.log_scalars({f"train/{name}": value for name, value in metrics.items()}, self.timesteps)
        if is_due:
            save_checkpoint(run, self, env)

    def _iterate(self, env: Environment, total: int, result: TrainingResult) -> dict[str, float]:
        """One rollout and update, of those that `total` steps have room for."""
        start = time.perf_counter()
        timesteps = self.timesteps
        try:
            if self._env is None and self._under_way is not None:
                self._go_on(env, self._under_way)
            elif self._env is None or self.iteration % self.reset_interval(env) == 0:
                self._warm_up(env, total)
                self._begin(env, self._episode_seed(self.iteration))
            B, T = self._batch_size, self._steps_of(env)
            steps = self._first_timesteps + total - self.timesteps
            # In rollouts, as if the warm-up came on top.
            left = math.ceil((steps + self._warm_up_timesteps) / (B * T)) / math.ceil(
                total / (B * T)
            )
            learning_rate = self.learning_rate if self.desired_kl is None else self._rate
            if self.anneal_lr and self.desired_kl is None:
                learning_rate *= left
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            with self.world.share_errors():
                rollout = self.collect_rollout(env, min(T, max(1, steps // B)))
            losses = self.update(rollout)
            self._follow_kl(losses["approx_kl"], left)
        except FloatingPointError as error:
            raise FloatingPointError(f"iteration {self.iteration}: {error}") from error
        self.iteration += 1

        returns, lengths = self._ended_episodes(rollout, self._rows_of(env))
        result.episode_returns.extend(returns)
        result.episode_lengths.extend(lengths)
        self._recent_returns.extend(returns)
        self._recent_lengths.extend(lengths)
        seconds = time.perf_counter() - start
        self._seconds += seconds
        metrics = {
            "iteration": float(self.iteration),
            "timesteps": float(self.timesteps),
            "episode_return": _mean(self._recent_returns),
            "episode_length": _mean(self._recent_lengths),
            "episodes": float(len(returns)),
            **losses,
            "learning_rate": learning_rate,
            "seconds": self._seconds,
            "steps_per_second": (self.timesteps - timesteps) / seconds,
        }
        result.metrics.append(metrics)
        return metrics

    def _follow_kl(self, kl: float, left: float) -> None:
        """Moves the learning rate by the KL divergence of an update."""
        if self.desired_kl is None:
            return
        desired = self.desired_kl
        if self.anneal_lr:
            desired *= _LAST_KL + (1.0 - _LAST_KL) * left
        if kl > desired * _KL_BAND:
            self._rate = max(self._rate / _RATE_FACTOR, self.learning_rate / _RATE_RANGE)
        elif kl < desired / _KL_BAND:
            self._rate = min(self._rate * _RATE_FACTOR, self.learning_rate * _RATE_RANGE)

    def _ended_episodes(self, rollout: Rollout, rows: Rows) -> tuple[list[float], list[int]]:
        """Returns and lengths of the episodes that ended on all ranks, in one process's order."""
        step, row = (rollout.terminated | rollout.truncated).cpu().T.nonzero().unbind(1)  # [E]
        place = step * rows.total + rows.first + row  # [E]
        columns = (place, rollout.episode_returns, rollout.episode_lengths)
        table = torch.stack(
            [torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in columns], dim=1
        )
        table = self.world.gather(table)  # [E, 3]
        _, returns, lengths = table[table[:, 0].argsort()].unbind(1)
        return returns.tolist(), lengths.long().tolist()

    # Collecting

    def collect_rollout(self, env: Environment, num_steps: int | None = None) -> Rollout:
        """Plays `num_steps` steps of every environment with the current policy.

        The rollout goes on where the last one of the same `env` stopped; the first one resets it.

        Args:
            env: The environments.
            num_steps: `T`; by default the trainer's.

        Returns:
            The rollout, on the trainer's device.
        """
        if self._env is not env:
            self._begin(env, self.seed)
        model, rows = self.model, self._rows_of(env)
        T = num_steps or self._steps_of(env)
        dtype = next(model.parameters()).dtype
        recording = RolloutRecording(env.batch_size, T, env.input_dim)
        initial_state = self._state
        observation, first = self._observation, self._reset
        with torch.no_grad():
            x = torch.from_numpy(observation).to(self.device, dtype)  # [B, input_dim]
            policy, noise = RolloutPolicy.of(model, x, initial_state, T), None
            for t in range(T):
                noise = model.draw_noise(rows.total, noise, self._noise)
                action, is_finite = policy.act(x, rows.of(noise))
                if not is_finite:
                    self._env = None
                    self._raise_for_policy(env, policy, t)
                try:
                    step = env.step(action)
                except FloatingPointError as error:
                    self._env = None
                    raise FloatingPointError(f"rollout step {t}: {error}") from error
                first, any_ended = recording.add(observation, first, step)
                observation = step[0]
                if self._on_step is not None:
                    self._on_step(self.timesteps + rows.total * (t + 1))
                x = torch.from_numpy(observation).to(self.device, dtype)
                if any_ended:
                    policy.end_episodes(torch.from_numpy(first).to(self.device))
        self._observation, self._state, self._reset = observation, policy.state, first
        self.timesteps += rows.total * T
        actions, log_probs, _ = policy.recorded()
        self._played.append(actions)
        return recording.rollout(actions, log_probs, initial_state)

    @staticmethod
    def _raise_for_policy(env: Environment, policy: RolloutPolicy, step: int) -> NoReturn:
        """Names the environment in which the policy's last step is not finite."""
        _, log_probs, values = policy.recorded()
        log_prob, value = log_probs[:, -1], values[:, -1]  # [B]
        row = int(torch.isfinite(log_prob + value).logical_not().nonzero()[0])
        raise FloatingPointError(
            f"rollout step {step}: {env.env_name}: the policy of environment {row} is not finite: "
            f"log-probability {float(log_prob[row])}, value {float(value[row])}"
        )

    def _prepare(self, source: AnyEnvironment) -> Environment:
        """Wraps a Gymnasium environment and checks that it fits the model."""
        with self.world.share_errors():
            env = source if isinstance(source, Environment) else Environment.wrap(source)
            model = self.model
            check_spaces(env, model.input_dim, model.action_dim, model.discrete)
            self._check_parts()
        self._check_minibatches(self._steps_of(env), env)
        return env

    def _check_parts(self) -> None:
        vector = [] if self.model is not self._weights.model else [self._weights.vector]
        check_parts(self.optimizer, [vector])

    def _check_minibatches(self, T: int, env: Environment) -> None:
        """Advantages are standardized: the only one of a minibatch would be zero."""
        steps = self._rows_of(env).total * T
        longest = max(self._sequence_length_for(T), self.mini_batch_size)
        if min(steps, longest) < 2:
            raise ValueError(
                "a minibatch must have 2 steps or more, over which advantages are standardized, got "
                f"mini_batch_size {self.mini_batch_size} and {steps} steps in a rollout"
            )

    def _steps_of(self, env: Environment) -> int:
        steps = self.num_steps or _usual_steps(self._rows_of(env).total, self.sequence_length)
        if self.sequence_length is not None and steps % self.sequence_length:
            raise ValueError(
                f"num_steps must be a multiple of sequence_length = {self.sequence_length}, got {steps}"
            )
        return steps

    def _rows_of(self, env: Environment) -> Rows:
        """The rows of the environment among those of all ranks."""
        if self._rows[0] is not env:
            self._rows = env, self.world.rows(env.batch_size)
        return self._rows[1]

    def _begin(self, env: Environment, seed: int) -> None:
        """Resets the environments, their states and their running returns."""
        rows = self._rows_of(env)
        elapsed = None
        if self.staggered_resets:
            if env.max_episode_steps is None:
                raise ValueError(f"staggered_resets needs a time limit, which {env!r} has not")
            elapsed = (rows.first + np.arange(rows.count)) * env.max_episode_steps // rows.total
        with self.world.share_errors():
            self._observation, _ = env.reset(seed=seed + rows.first, elapsed=elapsed)
        self._state = self.model.init_hidden(env.batch_size)
        self._reset = np.ones(env.batch_size, dtype=np.bool_)
        self._return = torch.zeros(env.batch_size, dtype=torch.float64, device="cpu")
        self._reset_seed, self._played, self._under_way = seed, [], None
        self._env = env

    def _episodes_under_way(self) -> dict[str, Any] | None:
        """What brings simulators, which cannot be saved, back to where they stand; None at a reset."""
        if self._under_way is not None:
            return self._under_way
        at_reset = self._env is None or self.iteration % self.reset_interval(self._env) == 0
        if at_reset or not self._played or self.world.size > 1:
            return None
        return {
            "seed": self._reset_seed,
            "actions": torch.cat(self._played, 1).cpu(),  # [B, T, ...]
            "state": self._state.cpu(),
            "reset": torch.from_numpy(self._reset),
            "return": self._return,
        }

    def _go_on(self, env: Environment, under_way: dict[str, Any]) -> None:
        """Brings the environments to where `_episodes_under_way` found them."""
        actions = under_way["actions"]
        self._begin(env, under_way["seed"])
        for action in actions.unbind(1):
            self._observation, *_ = env.step(action.contiguous().numpy())
        self._played = [actions]
        self._state = under_way["state"].to(self.device)
        self._reset, self._return = under_way["reset"].numpy(), under_way["return"]

    def _episode_seed(self, iteration: int) -> int:
        """The seed of the environments that start at `iteration`."""
        return int(np.random.SeedSequence((self.seed, iteration)).generate_state(1)[0] >> 1)

    def _warm_up(self, env: Environment, total: int) -> None:
        """Gives `obs_norm` its first statistics, from steps that are counted and not learnt from."""
        norm = self.model.obs_norm
        steps = min(self._warm_up_steps(env), total // self._batch_size // 2)
        if norm is None or steps == 0:
            return
        self._begin(env, self._episode_seed(2**32 - 1))
        with self.world.share_errors():
            rollout = self.collect_rollout(env, steps)
        self._warm_up_timesteps = self._batch_size * steps
        self.world.update(norm, rollout.observations.flatten(0, 1))

    def _warm_up_steps(self, env: Environment) -> int:
        """Steps of each environment that give `obs_norm` its first statistics, if it has none yet."""
        norm = self.model.obs_norm
        if norm is None or float(norm.count) > 0:
            return 0
        return min(self._steps_of(env), max(1, _WARM_UP_STEPS // self._rows_of(env).total))

    # Learning

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learns from a rollout, then moves the observation statistics.

        Args:
            rollout: The rollout, of several processes that of this one.

        Returns:
            The means over the minibatches of `policy_loss`, `value_loss`, `entropy`, `approx_kl`
            (Schulman's `r - 1 - log r`), `clip_fraction` and `grad_norm`, and
            `explained_variance`, of the values before the update.
        """
        B, T = rollout.rewards.shape
        L = self._sequence_length_for(T)
        rows, each = self.world.rows(B), T // L  # each row has so many sequences
        learnt = each * L  # of a last, shorter rollout, all but what is left of a sequence
        rewards = self._scaled_rewards(rollout)  # [B, T]
        inputs = self.model.normalize(rollout.observations)  # [B, T, input_dim]
        fixed = (inputs, rollout.actions, rollout.log_probs, rollout.reset)
        explained_variance = math.nan
        sums: list[Tensor] = []
        weights: list[list[float]] = []
        self._check_parts()
        self._weights.read()
        self._gradient = self.gradients.of(
            lambda: sequence_gradient(self.model, inputs, rollout.initial_state)
        )
        native = self.epochs.of(self._native_epoch)
        for epoch in range(self.ppo_epochs):
            if epoch == 0 or self.recompute_advantages:
                states, values, next_values = self._evaluate(rollout, inputs, L)
                advantages, returns = self.compute_gae(
                    rewards, values, next_values, rollout.terminated, rollout.truncated
                )
                if epoch == 0:
                    explained_variance = self._explained_variance(values, returns)
                    old_values = values
            parts = [rows.part(i, each) for i in self._minibatches(rows.total * each, L)]
            weights.append([part.weight for part in parts])
            columns = (*fixed, old_values, returns, advantages)
            sequences = [_sequences(x[:, :learnt], L) for x in columns]
            if native is not None:
                order = torch.cat([items for items, _ in parts])
                metrics = native(sequences, states, order, len(parts[0].items))
                self._check_gradient(metrics[-1], f"epoch {epoch}")
            else:
                batches = self._gather(sequences, states, parts)
                metrics = torch.stack([self._step(batch, f"epoch {epoch}") for batch in batches])
            sums.append(metrics)  # [M, 6]
            of_epoch = partial(self._means, sums[-1:], weights[-1:])
            if self.target_kl is not None and of_epoch()["approx_kl"] > self.target_kl:
                break
        check_weights(self.model)
        if self.model.obs_norm is not None:
            self.world.update(self.model.obs_norm, rollout.observations.flatten(0, 1))
        return {**self._means(sums, weights), "explained_variance": explained_variance}

    def compute_gae(
        self,
        rewards: Tensor,
        values: Tensor,
        next_values: Tensor,
        terminated: Tensor,
        truncated: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns with the trainer's discount and lambda.

        Args:
            rewards: `[B, T]`.
            values: `[B, T]`, of the observations.
            next_values: `[B, T]`, of the observations that the steps led to: at a truncation that of
                the episode's last one. Not used where `terminated`.
            terminated: `[B, T]`.
            truncated: `[B, T]`.

        Returns:
            Advantages and `advantages + values`, both `[B, T]`.
        """
        return ops.gae(
            rewards, values, next_values, terminated, truncated, self.gamma, self.gae_lambda
        )

    @torch.no_grad()
    def _evaluate(self, rollout: Rollout, inputs: Tensor, L: int) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the current weights over a rollout, whose normalised observations are given.

        Returns:
            The state before each sequence `[num_layers, S, N]`, the values `[B, T]`, and the values
            of what the steps led to `[B, T]`.
        """
        values, states = self.model.unroll(
            inputs, rollout.initial_state, rollout.reset, normalized=True
        )  # [B, T], [num_layers, B, T, N]
        next_values = torch.empty_like(values)
        next_values[:, :-1] = values[:, 1:]
        next_values[:, -1] = 0.0  # where the last step ended an episode; no boundary then
        rows, steps = rollout.boundary_rows, rollout.boundary_steps  # [M]
        _, _, beyond, _ = self.model(rollout.boundary_observations, states[:, rows, steps])
        next_values[rows, steps] = beyond
        starts = torch.cat(
            (rollout.initial_state.unsqueeze(2), states[:, :, L - 1 : -L : L]), dim=2
        )  # [num_layers, B, T // L, N]
        return starts.flatten(1, 2), values, next_values

    def _gather(
        self, sequences: list[Tensor], states: Tensor, parts: list[Part]
    ) -> Iterator[_Minibatch]:
        """What this rank has of each minibatch, advantages standardized.

        Args:
            sequences: The first fields of `_Minibatch`, `[S, L, ...]`, of all sequences.
            states: `[num_layers, S, N]`.
            parts: Of the minibatches.
        """
        order = torch.cat([items for items, _ in parts]).to(self.device)  # all at once is faster
        sizes, weights = [len(items) for items, _ in parts], [weight for _, weight in parts]
        columns = [torch.split(x[order], sizes) for x in sequences]
        columns[-1] = tuple(self.world.standardize(columns[-1], weights))
        columns.append(torch.split(states[:, order], sizes, dim=1))
        for *tensors, weight in zip(*columns, weights, strict=True):
            yield _Minibatch._make((*tensors, weight))

    def _step(self, batch: _Minibatch, where: str) -> Tensor:
        """One gradient step on a minibatch of sequences; returns its metrics `[6]`."""
        inputs = batch.observations, batch.actions, batch.states, batch.reset
        if self._gradient is not None:
            metrics = self._gradient(*inputs, partial(self._objective, batch))
            grad_norm = self._weights.use_gradient(
                self._gradient.vector, self.max_grad_norm, batch.weight
            )
        else:
            outputs = self.model.evaluate_actions(*inputs, normalized=True)
            metrics, gradients = self._objective(batch, *outputs)
            grad_norm = self._weights.backward(
                outputs[: len(gradients)], self.max_grad_norm, batch.weight, gradients
            )
        metrics = torch.cat((metrics, grad_norm.reshape(1)))
        self._check_gradient(metrics, where)
        FlatAdam(self._weights, self.optimizer).step()
        return metrics

    def _native_epoch(self) -> PpoEpoch | Reason:
        """What learns from all minibatches of an epoch in one call, or why there is none."""
        if self.world.size > 1:
            return Reason("several processes average their gradients")
        for method in ("_step", "_objective", "_gather"):
            if is_replaced(self, PPOTrainer, (method,)):
                return Reason(f"the trainer overrides {method}()")
        objective = Objective(
            self.clip_epsilon,
            self.value_coef,
            self.entropy_coef,
            self.clip_value_loss,
            self.max_grad_norm,
        )
        return PpoEpoch.of(self._gradient, FlatAdam(self._weights, self.optimizer), objective)

    def _check_gradient(self, metrics: Tensor, where: str) -> None:
        """Raises where the metrics `[6]` of a minibatch tell of a gradient that is not finite."""
        policy_loss, value_loss, entropy, _, _, grad_norm = metrics.tolist()
        if not math.isfinite(grad_norm):
            loss = policy_loss + self.value_coef * value_loss - self.entropy_coef * entropy
            raise FloatingPointError(f"{where}: loss {loss}, gradient norm {grad_norm}")

    @torch.no_grad()
    def _objective(
        self, batch: _Minibatch, log_probs: Tensor, values: Tensor, entropies: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The clipped loss of what the model says `[S, L]` in closed form, without a graph.

        Returns:
            The mean of the policy loss, the value loss, the entropy, the KL divergence and the
            fraction of clipped ratios `[5]`, and the gradient of the loss with respect to the
            log-probabilities, the values and, where they have a weight, the entropies.
        """
        log_ratio = log_probs - batch.log_probs
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1.0 - self.clip_epsilon, 1.0 + self.clip_epsilon)
        surrogate, bound = ratio * batch.advantages, clipped * batch.advantages
        follows = surrogate <= bound  # elsewhere the loss is constant
        errors = values - batch.returns
        squares = errors.square()
        if self.clip_value_loss:
            change = values - batch.values
            bounded = change.clamp(-self.clip_epsilon, self.clip_epsilon)
            other = batch.values + bounded - batch.returns
            errors = torch.where(other.square() > squares, other * (change == bounded), errors)
            squares = torch.maximum(squares, other.square())
        per_step = 1.0 / values.numel()
        gradients = [surrogate * follows * -per_step, errors * (2.0 * self.value_coef * per_step)]
        if self.entropy_coef:
            gradients.append(torch.full_like(entropies, -self.entropy_coef * per_step))
        terms = (
            -torch.minimum(surrogate, bound),
            squares,
            entropies,
            ratio - 1.0 - log_ratio,
            (ratio != clipped).to(ratio.dtype),
        )
        return torch.stack(terms).mean((1, 2)), gradients

    def _means(self, metrics: list[Tensor], weights: list[list[float]]) -> dict[str, float]:
        """The means over minibatches of the metrics of each, those of an epoch `[M, 6]`, over all ranks."""
        stacked = torch.cat(metrics)
        share = stacked.new_tensor([weight for epoch in weights for weight in epoch]).unsqueeze(1)
        means = self.world.average(stacked, share).mean(0).tolist()
        return dict(zip(METRICS, means, strict=True))

    def _explained_variance(self, values: Tensor, returns: Tensor) -> float:
        variance, residual = self.world.variances(returns, returns - values)
        return math.nan if variance == 0.0 else 1.0 - residual / variance

    def _minibatches(self, S: int, L: int) -> Iterator[Tensor]:
        """Shuffles `S` sequences into minibatches of about `mini_batch_size` steps."""
        order = torch.randperm(S, generator=self._shuffle, device="cpu")
        yield from torch.split(order, max(1, self.mini_batch_size // L))

    def _sequence_length_for(self, T: int) -> int:
        if self._rollout_steps > T:  # the last of a call to train: as those before it
            return min(self._sequence_length_for(self._rollout_steps), T)
        if self.sequence_length is not None:
            if T % self.sequence_length:
                raise ValueError(
                    f"rollout must have a multiple of sequence_length = {self.sequence_length} "
                    f"steps, got {T}"
                )
            return self.sequence_length
        longest = min(_LONGEST_SEQUENCE, self.mini_batch_size, T)
        return next(L for L in range(longest, 0, -1) if T % L == 0)

    def _scaled_rewards(self, rollout: Rollout) -> Tensor:
        """Takes the rollout's discounted returns into the statistics and scales its rewards."""
        if not self.scale_rewards:
            return rollout.rewards
        rewards = rollout.rewards.to("cpu", torch.float64)  # [B, T]
        if self._return.shape != rewards.shape[:1]:
            self._return = rewards.new_zeros(len(rewards))
        keep = self.gamma * (~rollout.reset.cpu()).to(torch.float64)  # [B, T]
        discounted = ops.linear_scan(keep, rewards, self._return)  # [B, T]
        self._return = discounted[:, -1]
        self.world.update(self.return_norm, discounted.reshape(-1, 1))
        deviation = float((self.return_norm.var + 1e-8).sqrt())
        return (rollout.rewards / deviation).clamp(-_REWARD_CLIP, _REWARD_CLIP)

    # Saving

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the training state to a file: weights, optimizer, statistics, generators."""
        write_state(path, self.state_dict())

    def load(self, path: str | PathLike[str]) -> None:
        """Reads a file of `save`.

        Raises:
            ValueError: It is missing, damaged, or of other settings or another model.
        """
        state = read_state(path)
        self._batch_size = 0  # any number of environments may go on from a file
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of a run depends on, at a checkpoint's boundary."""
        return {
            "version": _STATE_VERSION,
            "settings": self._settings(),
            "batch_size": self._batch_size,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "return_norm": self.return_norm.state_dict(),
            **self._random_states(),
            "shuffle": self._shuffle.get_state(),
            "iteration": self.iteration,
            "timesteps": self.timesteps,
            "first_timesteps": self._first_timesteps,
            "warm_up_timesteps": self._warm_up_timesteps,
            "under_way": self._episodes_under_way(),
            "rate": self._rate,
            "seconds": self._seconds,
            "recent_returns": list(self._recent_returns),
            "recent_lengths": list(self._recent_lengths),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state of `state_dict`.

        Raises:
            ValueError: It belongs to other settings or another model, or is incomplete.
        """
        with must_fit():
            # What files of older versions lack.
            settings = {"staggered_resets": False, **state["settings"]}
            known = {"batch_size": 0, "under_way": None, **state, "settings": settings}
            if "first_timesteps" not in known:
                known |= self._counts_of_older_versions(known)
            current = self._settings()
            if self._batch_size and known["batch_size"]:
                current["batch_size"] = self._batch_size
            check_settings(known, _STATE_VERSION, current)
            weights = check_tensors("model", state["model"], self.model.state_dict())
            statistics = check_tensors(
                "return_norm", state["return_norm"], self.return_norm.state_dict()
            )
            under_way = self._read_under_way(known)
            load_adam(self.optimizer, state["optimizer"])
            self.model.load_state_dict(weights)
            self.return_norm.load_state_dict(statistics)
            self._shuffle.set_state(state["shuffle"])
            self._set_random_state(state["random_state"], state["cuda_random_state"])
            self.iteration = read_count(state, "iteration")
            self.timesteps = read_count(state, "timesteps")
            self._first_timesteps = read_count(known, "first_timesteps")
            self._warm_up_timesteps = read_count(known, "warm_up_timesteps")
            self._batch_size = read_count(known, "batch_size") or self._batch_size
            self._rate = check_number("rate", state["rate"], above=0.0)
            self._seconds = float(state["seconds"])
            self._recent_returns.clear()
            self._recent_lengths.clear()
            self._recent_returns.extend(float(x) for x in state["recent_returns"])
            self._recent_lengths.extend(int(x) for x in state["recent_lengths"])
        self._env, self._under_way = None, under_way

    def _counts_of_older_versions(self, state: Mapping[str, Any]) -> dict[str, int]:
        """What a state lacks in which all rollouts are whole ones, after a warm-up on top."""
        first, B = read_count(state, "first_iteration"), read_count(state, "batch_size") or 1
        T = self.num_steps or _usual_steps(B, self.sequence_length)
        learnt = (read_count(state, "iteration") - first) * B * T
        before = max(0, read_count(state, "timesteps") - learnt)
        names = ("first_timesteps", "warm_up_timesteps")
        return dict(zip(names, (before, 0) if first else (0, before), strict=True))

    def _read_under_way(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """`_episodes_under_way` of a state, checked."""
        stored = state["under_way"]
        if stored is None:
            return None
        model, like = self.model, self._weights.vector.detach()
        B, steps = stored["actions"].shape[:2]
        actions = (B, steps) if model.discrete else (B, steps, model.action_dim)
        flags = torch.empty(B, dtype=torch.bool, device="meta")
        expected = {
            "actions": like.new_empty(
                actions, dtype=torch.int64 if model.discrete else None, device="meta"
            ),
            "state": like.new_empty(model.num_layers, B, model.state_dim, device="meta"),
            "reset": flags,
            "return": torch.empty(B, dtype=torch.float64, device="meta"),
        }
        tensors = {name: x for name, x in stored.items() if name != "seed"}
        checked = check_tensors("under_way", tensors, expected)
        if model.discrete and bool(
            ((x := checked["actions"]) < 0).any() | (x >= model.action_dim).any()
        ):
            raise ValueError(f"under_way actions must lie in [0, {model.action_dim})")
        return {"seed": read_count(stored, "seed"), **checked}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def _random_states(self) -> dict[str, Tensor | None]:
        """That of the action noise; a state of the other kind of device is where a run would start."""
        if self.device.type == "cuda":
            start = torch.Generator().manual_seed(self.seed).get_state()
            return {"random_state": start, "cuda_random_state": self._noise.get_state()}
        return {"random_state": self._noise.get_state(), "cuda_random_state": None}

    def _set_random_state(self, state: Tensor, cuda_state: Tensor | None) -> None:
        if self.device.type != "cuda":
            self._noise.set_state(state)
        elif cuda_state is not None:
            self._noise.set_state(cuda_state)
        else:
            self._noise.manual_seed(self.seed)


def _usual_steps(rows: int, sequence_length: int | None) -> int:
    """Steps of a rollout where nobody says: whole sequences, if there is room for one."""
    steps = max(1, _STEPS_PER_ITERATION // rows)
    length = sequence_length or _LONGEST_SEQUENCE
    return steps - steps % length if steps >= length else sequence_length or steps


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sequences(x: Tensor, L: int) -> Tensor:
    """`[B, T, ...]` as `[B * (T / L), L, ...]`."""
    return x.reshape(-1, L, *x.shape[2:])


def _mean(values: deque[float] | deque[int]) -> float:
    return sum(values) / len(values) if values else math.nan
