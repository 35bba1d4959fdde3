"""Meta-training of a policy that learns a new task from its own episodes."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssm_fast.checkpoint import load_checkpoint as load_model_file
from ssm_fast.checkpoint import load_inner_rates
from ssm_fast.checks import check_count, check_flag, check_number, check_spaces, is_replaced
from ssm_fast.core.functional_call import functional_call
from ssm_fast.core.improved_ssm import ImprovedSSM, gaussian_log_prob
from ssm_fast.core.task_policies import TaskPolicies
from ssm_fast.env_runner.environment import Environment
from ssm_fast.env_runner.task_families import Task
from ssm_fast.env_runner.trial_environment import TrialEnvironment
from ssm_fast.meta_rl.distributed import Rows, World
from ssm_fast.meta_rl.meta_maml import Weights, inner_update, task_losses
from ssm_fast.meta_rl.ppo_trainer import TrainingResult
from ssm_fast.meta_rl.run import RunDirectory
from ssm_fast.meta_rl.training_state import (
    check_model,
    check_parts,
    check_settings,
    check_step,
    check_tensors,
    keep_last_iteration,
    load_adam,
    must_fit,
    read_count,
    save_checkpoint,
    start_run,
)
from ssm_fast.meta_rl.trajectories import Recording, Trajectories, compute_advantages
from ssm_fast.native.impl import Choice, Impl
from ssm_fast.native.plan import Reason
from ssm_fast.native.task_gradients import TaskGradients, policy_task_gradients
from ssm_fast.nn.parameters import RECURRENT_LR_SCALE, learning_rate_scales
from ssm_fast.nn.running_norm import RunningNorm

TaskEnvironment: TypeAlias = Environment | TrialEnvironment

_LOGGER = logging.getLogger(__name__)
_STATE_VERSION = 1
_EVALUATION_SEED = 2**32  # the seeds of training lie below
_LR_SCALES = (1.0, RECURRENT_LR_SCALE)  # of the optimizer's groups
_LARGEST_LOG_RATIO = 20.0  # beyond, the gradient of a clipped ratio is 0 * inf
_SETTINGS = (
    "tasks_per_epoch",
    "inner_lr",
    "outer_lr",
    "inner_steps",
    "gamma",
    "gae_lambda",
    "clip_epsilon",
    "outer_epochs",
    "tasks_per_minibatch",
    "num_steps",
    "first_order",
    "learn_inner_lr",
    "max_grad_norm",
    "anneal_lr",
    "checkpoint_interval",
    "evaluation_interval",
    "evaluation_steps",
    "seed",
)

# What a gradient step depends on beside the weights and the rates; in the header of a policy's file.
_INNER_LOOP = ("inner_steps", "gamma", "gae_lambda", "num_steps", "rows")


@dataclass(frozen=True)
class Adaptation:
    """What `G` tasks made of the shared policy.

    Attributes:
        returns: `[K + 1, G, R, E]`, of the episodes after 0, 1, ... `K` gradient steps; see
            `Trajectories.episode_returns`.
        weights: The weights after the last step, `[G, ...]` by name.
        rounds: What each of the `K + 1` rounds played, as the losses take it.
        breakdowns: Of the tasks whose policies broke down, by number, where `adapt` went on.
    """

    returns: Tensor
    weights: Weights
    rounds: list[dict[str, Tensor]]
    breakdowns: dict[int, PolicyBreakdown]


class PolicyBreakdown(FloatingPointError):
    """A policy, or the weights that an inner step leads to, are not finite.

    Attributes:
        task: Number of the task, among those that are adapted to together.
        reason: What is not finite, and when.
    """

    def __init__(self, task: int, reason: str) -> None:
        super().__init__(f"task {task}: {reason}")
        self.task, self.reason = task, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.task, self.reason)


class MetaRLTrainer:
    """ProMP (Rothfuss et al. 2019, arXiv 1810.06784) and RL² (arXiv 1611.02779), or both at once.

    An epoch draws `G` tasks. It plays a round of episodes of each with the shared weights `θ`, lets
    each task take a policy-gradient step on its own round, and plays the next round with the
    weights of each task, until all `K` = `inner_steps` are taken::

        φ_g^{k+1} = φ_g^k - α ∘ ∇ L_g^k(φ_g^k),    L_g^k(φ) = -mean(π_φ(a|o) / π_{φ_g^k}(a|o) · A)

    The gradient of `L` is the policy gradient, and its second derivative has a low variance (the
    paper's equation 9). Then `θ` takes `outer_epochs` passes of Adam over minibatches of tasks, on
    PPO's clipped surrogate of all `K + 1` rounds, differentiated through the steps. A loss on every
    round and not on the last alone keeps later steps from undoing the first (MAML++, Antoniou et
    al. 2019, arXiv 1810.09502), and lets what tasks share be learnt before the first.

    With `inner_steps=0` and a `TrialEnvironment`, this is RL²: PPO on whole trials, in which the
    policy adapts by its recurrent state. With a `TrialEnvironment` and inner steps, it does both.

    The tasks act in one native call a step, and the outer gradient is another one for a policy on
    the CPU, as it was made; else they are differentiated in one vmapped call, on the grouped
    kernels. Advantages come from a baseline that is fitted to each task, so the model's critic is
    neither used nor trained. The transition matrices, and their inner rates, take steps a
    tenth as long as other weights: a step of all their entries moves their spectral radius `N`
    times as far.

    Every epoch starts from seeds that follow from `seed` and its number alone: a resumed run equals
    the uninterrupted one bitwise on the same machine.

    Several processes train as one would, to rounding: each plays and adapts its share of the tasks,
    and takes an even part of every minibatch; see docs/distributed.md.

    Args:
        model: The policy. It is moved to `device`. Parameters that need no gradient stay as they are.
        inner_lr: `α`; where the rates are learnt, at the start.
        outer_lr: Learning rate of Adam, at the start.
        inner_steps: `K`.
        gamma: Discount factor.
        gae_lambda: Weight of longer returns in the advantages.
        clip_epsilon: PPO's clipping range in the outer surrogate.
        tasks_per_epoch: `G`. The environment has a multiple of it as rows. 20 rows a task are 20
            trajectories a gradient step, or more where episodes end early, as rows play on.
        outer_epochs: Passes over the rounds of an epoch.
        tasks_per_minibatch: Tasks in a minibatch.
        num_steps: Steps of each row in a round; by default the time limit of the environment.
        first_order: Leave out the derivative of the inner gradients.
        learn_inner_lr: Learn a rate for each weight (Meta-SGD, arXiv 1707.09835).
        max_grad_norm: Outer gradients are scaled down to this norm.
        anneal_lr: Decay the outer learning rate linearly to zero.
        checkpoint_interval: Epochs between checkpoints.
        evaluation_interval: Epochs between two evaluations on held-out tasks.
        evaluation_steps: Gradient steps of these; none where `inner_steps` is 0. Where a policy
            breaks down, the metrics of an evaluation are NaN from that step on, with a warning.
        seed: Of the tasks, the environments and the action noise. By default drawn from torch's
            global generator.
        device: Where the model acts and learns.
        world: The processes that train together; see `join_world`. By default this one alone.
        impl: Where gradients come from: ``"native"`` code, ``"autograd"``, or native code where the
            model has a plan (``"auto"``; `ssm_fast.native.plan_of`).

    Attributes:
        rates: The inner rates by the names of the weights.
        gradients: The `Choice` that `impl` makes; its ``path`` is "native", or says why it is not.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A count is no integer, a flag no bool, or the model no `ImprovedSSM`.
    """

    def __init__(
        self,
        model: ImprovedSSM,
        inner_lr: float = 0.3,
        outer_lr: float = 1e-3,
        inner_steps: int = 2,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_epsilon: float = 0.3,
        *,
        tasks_per_epoch: int = 8,
        outer_epochs: int = 5,
        tasks_per_minibatch: int = 2,
        num_steps: int | None = None,
        first_order: bool = False,
        learn_inner_lr: bool = True,
        max_grad_norm: float = 1.0,
        anneal_lr: bool = True,
        checkpoint_interval: int = 10,
        evaluation_interval: int = 10,
        evaluation_steps: int = 3,
        seed: int | None = None,
        device: str | torch.device = "cpu",
        world: World | None = None,
        impl: Impl = "auto",
    ) -> None:
        check_model(model, ImprovedSSM)
        self.gradients = Choice(impl, _LOGGER)
        self.inner_lr = check_number("inner_lr", inner_lr, at_least=0.0)
        self.outer_lr = check_number("outer_lr", outer_lr, above=0.0)
        self.inner_steps = check_count("inner_steps", inner_steps, at_least=0)
        self.gamma = check_number("gamma", gamma, at_least=0.0, at_most=1.0)
        self.gae_lambda = check_number("gae_lambda", gae_lambda, at_least=0.0, at_most=1.0)
        self.clip_epsilon = check_number("clip_epsilon", clip_epsilon, above=0.0)
        self.tasks_per_epoch = check_count("tasks_per_epoch", tasks_per_epoch)
        self.outer_epochs = check_count("outer_epochs", outer_epochs)
        self.tasks_per_minibatch = check_count("tasks_per_minibatch", tasks_per_minibatch)
        self.num_steps = None if num_steps is None else check_count("num_steps", num_steps)
        self.first_order = check_flag("first_order", first_order)
        self.learn_inner_lr = check_flag("learn_inner_lr", learn_inner_lr)
        self.max_grad_norm = check_number("max_grad_norm", max_grad_norm, above=0.0)
        self.anneal_lr = check_flag("anneal_lr", anneal_lr)
        self.checkpoint_interval = check_count("checkpoint_interval", checkpoint_interval)
        self.evaluation_interval = check_count("evaluation_interval", evaluation_interval)
        self.evaluation_steps = check_count("evaluation_steps", evaluation_steps, at_least=0)
        self.world = world or World()
        seed = self.world.first(int(torch.randint(2**31, ()))) if seed is None else seed
        self.seed = check_count("seed", seed, at_least=0)
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self._shared = _trained(self.model)
        scales = learning_rate_scales(self.model)
        self.rates = {
            name: torch.full_like(p, inner_lr * scales[name]) for name, p in self._shared.items()
        }
        learnt: list[tuple[str, Tensor]] = list(self._shared.items())
        if learn_inner_lr:
            learnt += [(name, rate.requires_grad_()) for name, rate in self.rates.items()]
        self._learnt: list[Tensor] = [p for _, p in learnt]
        groups = self._groups(learnt)
        self.optimizer = torch.optim.Adam(
            [
                {"params": group, "lr": outer_lr * scale}
                for group, scale in zip(groups, _LR_SCALES, strict=True)
            ],
            fused=True,
        )
        self._noise = torch.Generator(self.device).manual_seed(self.seed)
        self._shuffle = self._noise
        if self.device.type != "cpu":
            self._shuffle = torch.Generator().manual_seed(self.seed)
        self.iteration = 0
        self.timesteps = 0
        self._first_iteration = 0  # of the call to train that is under way
        self._batch_size = 0  # of that call
        self._env = ("", 1)  # of that call: its id and the episodes of a trial
        self._seconds = 0.0
        self._on_step: Callable[[int], None] | None = None  # of that call

    @classmethod
    def from_policy(cls, path: str | os.PathLike[str]) -> MetaRLTrainer:
        """The trainer of a policy's file: to `adapt` by the gradient steps that were learnt.

        It has the weights, the inner rates and all settings of these steps, and nothing else of the
        run.

        Args:
            path: A file that this trainer's run or `ssm-fast adapt` has written.

        Raises:
            ValueError: The file is not sound, or holds no inner rates.
        """
        model, metadata = load_model_file(path)
        rates = load_inner_rates(path)
        if not isinstance(model, ImprovedSSM) or not rates or "inner_loop" not in metadata:
            raise ValueError(
                f"{os.fspath(path)} must hold inner rates, the lengths of the gradient steps that "
                "meta_rl learns (files of earlier versions lack them: `ssm-fast train --resume` in "
                "the run folder adds them)"
            )
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in rates)
        try:
            settings = {name: json.loads(metadata["inner_loop"])[name] for name in _INNER_LOOP}
            rows = check_count("rows", settings.pop("rows"), at_least=0)
            trainer = cls(model, tasks_per_epoch=1, seed=0, **settings)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: inner_loop in the header: {error!r}") from error
        with torch.no_grad():
            for name, rate in trainer.rates.items():
                rate.copy_(rates[name])
        trainer._batch_size = rows
        return trainer

    @property
    def rows_per_task(self) -> int:
        """The trajectories of a gradient step; 0 before the first training."""
        return self._batch_size // self.tasks_per_epoch

    @property
    def policy_metadata(self) -> dict[str, str]:
        """What a file of the policy says beside the environment."""
        if not self.inner_steps:
            return {"critic": "untrained"}
        settings = self._settings() | {"rows": self.rows_per_task}
        inner_loop = json.dumps({name: settings[name] for name in _INNER_LOOP})
        return {"critic": "untrained", "inner_loop": inner_loop}

    @property
    def policy_rates(self) -> dict[str, Tensor]:
        """The inner rates in a file of the policy; empty if it takes no gradient steps."""
        return self.rates if self.inner_steps else {}

    def train(
        self,
        env: TaskEnvironment,
        total_epochs: int,
        log_interval: int = 10,
        *,
        train_tasks: Sequence[Task] | None = None,
        test_tasks: Sequence[Task] | None = None,
        callback: Callable[[dict[str, float]], bool | None] | None = None,
        on_step: Callable[[int], None] | None = None,
        run: RunDirectory | None = None,
        resume: bool = False,
    ) -> TrainingResult:
        """Learns for `total_epochs` epochs.

        Args:
            env: The environment of a task family, with `R` rows for each of `tasks_per_epoch`
                tasks; of several processes, for each of this one's share of them.
            total_epochs: Epochs. A second call adds as many, with a learning-rate schedule of its
                own.
            log_interval: Epochs between lines of the log (logger
                `ssm_fast.meta_rl.meta_rl_trainer`, level INFO).
            train_tasks: Tasks to learn from; by default the family's.
            test_tasks: Tasks to evaluate on; by default the family's, as many as are played at
                once. An empty sequence leaves evaluations out.
            callback: Called with the metrics after each epoch; training stops after the one for
                which it returns False, on rank 0.
            on_step: Called in a rollout, after each step of all environments, with how many environment
                steps are taken so far.
            run: Where checkpoints, the learning curve and TensorBoard events go; of several
                processes, rank 0 alone has it.
            resume: Continue from the newest intact checkpoint of `run`, where it has one;
                `total_epochs` then counts from the start of the run.

        Returns:
            The returns of the adapted policies, an entry for each row (and no lengths), and the
            metrics of this call. In these, `return_0` is the return before the first step and
            `episode_return` the one after the last, both on training tasks; `test_return_k` is the
            one after `k` steps on held-out tasks, NaN where there was no evaluation. Of a trial, it
            is the mean over its episodes.

        Raises:
            FloatingPointError: NaN or infinity in an observation, a reward, a policy, an inner step
                or a gradient. The last checkpoint is intact.
            ValueError: The environment does not fit the model or the settings, or the checkpoint
                these settings.
            LostRank: Another process has died or does not answer. The last checkpoint is intact.
        """
        check_count("total_epochs", total_epochs)
        check_count("log_interval", log_interval)
        self._on_step = on_step
        train_tasks, test_tasks = self._choose_tasks(env, train_tasks, test_tasks)
        self._first_iteration = self.iteration
        self._batch_size = self._rows(env).total
        self._env = (env.env_name, _episodes_of(env))
        start_run(self.world, run, self, resume)
        last = self._first_iteration + total_epochs
        metrics: list[dict[str, float]] = []
        episode_returns: list[float] = []
        with keep_last_iteration(run, self, env) as keep:
            while self.iteration < last:
                try:
                    row, returns = self._iterate(env, last, train_tasks, test_tasks)
                except FloatingPointError as error:
                    raise FloatingPointError(f"epoch {self.iteration}: {error}") from error
                metrics.append(row)
                episode_returns += returns
                due = self.iteration % log_interval == 0 or self.iteration == last
                if due and self.world.rank == 0:
                    _LOGGER.info(
                        "%d epochs, return %.1f before and %.1f after adapting, %.0f steps/s",
                        self.iteration,
                        row["return_0"],
                        row["episode_return"],
                        row["steps_per_second"],
                    )
                stop = False
                with self.world.share_errors():
                    is_due = (
                        self.iteration % self.checkpoint_interval == 0 or self.iteration == last
                    )
                    if run is not None:
                        self._record(run, env, row, is_due)
                    keep()
                    stop = callback is not None and callback(dict(row)) is False
                    if run is not None and stop and not is_due:
                        save_checkpoint(run, self, env)
                if self.world.first(stop):
                    break
        self._on_step = None
        return TrainingResult(self.timesteps, self.iteration, episode_returns, [], metrics)

    def _choose_tasks(
        self,
        env: TaskEnvironment,
        train_tasks: Sequence[Task] | None,
        test_tasks: Sequence[Task] | None,
    ) -> tuple[Sequence[Task], Sequence[Task]]:
        """The tasks to learn from and to evaluate on, of an environment that fits."""
        with self.world.share_errors():
            self._check_env(env)
            self._check_parts()
            self._rows(env)
            assert env.family is not None
            train_tasks = env.family.train_tasks if train_tasks is None else tuple(train_tasks)
            if test_tasks is None:
                test_tasks = env.family.test_tasks[: self.tasks_per_epoch]
            if not train_tasks:
                raise ValueError("train_tasks must not be empty")
        return train_tasks, test_tasks

    def _record(
        self, run: RunDirectory, env: TaskEnvironment, row: dict[str, float], is_due: bool
    ) -> None:
        """Writes the metrics of an epoch, and a checkpoint where one is due."""
        run.note("gradients", self.gradients.path)
        run.append_row(row)
        run.log_scalars({f"train/{name}": value for name, value in row.items()}, self.timesteps)
        if is_due:
            save_checkpoint(run, self, env)

    def _iterate(
        self,
        env: TaskEnvironment,
        last: int,
        train_tasks: Sequence[Task],
        test_tasks: Sequence[Task],
    ) -> tuple[dict[str, float], list[float]]:
        """Rounds of one epoch, its update, and an evaluation where one is due.

        Returns:
            The metrics, and the returns of the rows after the last inner step.
        """
        start, timesteps = time.perf_counter(), self.timesteps
        draws = np.random.default_rng((self.seed, self.iteration))
        self._seed_generators(int(draws.integers(2**31)))
        # Different tasks as far as there are enough of them.
        G = self.tasks_per_epoch
        order = np.concatenate([draws.permutation(len(train_tasks)) for _ in range(G)])
        tasks = [train_tasks[i] for i in order[:G]]
        learning_rate = self._set_learning_rate(last)
        norm = self.model.obs_norm
        if norm is not None and float(norm.count) == 0:
            self._warm_up(env, tasks, norm, int(draws.integers(2**31)))
        adaptation = self._adapt_all(
            env, tasks, self.inner_steps, int(draws.integers(2**31)), self._noise
        )
        played = time.perf_counter()
        losses = self.update(adaptation.rounds)
        if norm is not None:
            norm.update(adaptation.rounds[-1]["observations"].flatten(0, 2))
        self.iteration += 1
        seconds = time.perf_counter() - start
        self._seconds += seconds
        steps = self.timesteps - timesteps
        due = self.iteration % self.evaluation_interval == 0 or self.iteration == last
        test_returns = self._test_returns(env, test_tasks if due else ())
        returns = adaptation.returns.mean(-1)  # [K + 1, G, R]
        ends = sum(int(r["reset"].sum()) for r in adaptation.rounds)
        metrics = {
            "iteration": float(self.iteration),
            "timesteps": float(self.timesteps),
            "episode_return": float(returns[-1].mean()),
            "return_0": float(returns[0].mean()),
            **{f"test_return_{k}": float(x) for k, x in enumerate(test_returns)},
            "episodes": float(ends),
            **losses,
            "learning_rate": learning_rate,
            "seconds": self._seconds,
            "playing": (played - start) / seconds,
            "steps_per_second": steps / seconds,
        }
        return metrics, returns[-1].flatten().tolist()

    def _set_learning_rate(self, last: int) -> float:
        """That of the epoch; a call ends with epoch `last`."""
        learning_rate = self.outer_lr
        if self.anneal_lr:
            learning_rate *= (last - self.iteration) / (last - self._first_iteration)
        for group, scale in zip(self.optimizer.param_groups, _LR_SCALES, strict=True):
            group["lr"] = learning_rate * scale
        return learning_rate

    def _warm_up(
        self, env: TaskEnvironment, tasks: Sequence[Task], norm: RunningNorm, seed: int
    ) -> None:
        """Gives `obs_norm` its first statistics, from a round that is not learnt from."""
        with self.world.share_errors():
            own = self._own(tasks)
            self._set_tasks(env, own)
            weights, rows = self.shared_weights(len(own)), self._rows(env)
            played = self.collect(env, weights, seed, rows=rows, generator=self._noise)
        self.world.update(norm, played.observations.flatten(0, 2))

    def _adapt_all(
        self,
        env: TaskEnvironment,
        tasks: Sequence[Task],
        steps: int,
        seed: int,
        generator: torch.Generator,
        deterministic: bool = False,
        keep_going: bool = False,
    ) -> Adaptation:
        """Takes gradient steps in each of `tasks_per_epoch` tasks: every rank in its share of them.

        Returns:
            What all ranks played, with the weights of this one's tasks.
        """
        world, share = self.world, self.world.share(len(tasks))
        own_tasks = self._own(tasks)
        with world.share_errors():
            rows = self._rows(env)
            options = (deterministic, keep_going, rows, generator)
            try:
                own = self.adapt(env, own_tasks, steps, seed, *options)
            except PolicyBreakdown as error:
                raise FloatingPointError(f"{own_tasks[error.task]}: {error.reason}") from error
        rounds = [{name: world.gather(x) for name, x in batch.items()} for batch in own.rounds]
        broken = [(share[g], error.reason) for g, error in own.breakdowns.items()]
        breakdowns = {
            g: PolicyBreakdown(g, reason) for part in world.exchange(broken) for g, reason in part
        }
        return Adaptation(world.gather(own.returns, 1), own.weights, rounds, breakdowns)

    def _own(self, tasks: Sequence[Task]) -> list[Task]:
        """This rank's share of the tasks."""
        return [tasks[g] for g in self.world.share(len(tasks))]

    def _rows(self, env: TaskEnvironment) -> Rows:
        """The rows of the environment, a share of the tasks, among those of all the tasks."""
        share = self.world.share(self.tasks_per_epoch)
        if not share:
            raise ValueError(
                f"tasks_per_epoch must be at least {self.world.size}, the number of processes, "
                f"got {self.tasks_per_epoch}"
            )
        self._check_rows(env, len(share))
        R = env.batch_size // len(share)
        return Rows(share.start * R, env.batch_size, self.tasks_per_epoch * R)

    def _test_returns(self, env: TaskEnvironment, tasks: Sequence[Task]) -> NDArray[np.float64]:
        """Returns on held-out tasks after each step, NaN where they are not known."""
        steps = self.evaluation_steps if self.inner_steps else 0  # only what is trained for
        if not tasks:
            return np.full(steps + 1, np.nan)
        returns: NDArray[np.float64] = self.evaluate(env, tasks, steps).mean((1, 2, 3))
        return returns

    # Playing

    def evaluate(
        self,
        env: TaskEnvironment,
        tasks: Sequence[Task],
        steps: int = 3,
        seed: int = _EVALUATION_SEED,
        deterministic: bool = False,
    ) -> NDArray[np.float64]:
        """Adapts to tasks of any number, and plays after each gradient step.

        Args:
            env: The environment, of `R` rows for each of `tasks_per_epoch` tasks, as in `train`. All
                processes make the call.
            tasks: The tasks, `M`.
            steps: Gradient steps `K`, each on a round of `R` trajectories.
            seed: Of the environments and of the actions.
            deterministic: Measure the modes of the policies, in rounds of their own, and not the
                samples from which they learn.

        Returns:
            `[K + 1, M, R, E]`; see `Adaptation.returns`. They are NaN, with a warning, from the
            step on after which the policy of a task is not finite.

        Raises:
            FloatingPointError: An observation or a reward is not finite, or the policy before the
                first step.
        """
        if not tasks:
            raise ValueError("tasks must not be empty")
        timesteps, G = self.timesteps, self.tasks_per_epoch
        returns, broken = [], []
        generator = torch.Generator(self.device).manual_seed(seed)
        try:
            for first in range(0, len(tasks), G):
                chunk = list(tasks[first : first + G])
                filled = (chunk * G)[:G]  # every row plays
                adaptation = self._adapt_all(
                    env, filled, steps, seed, generator, deterministic, keep_going=True
                )
                returns.append(adaptation.returns[:, : len(chunk)])
                breakdowns = sorted(adaptation.breakdowns.items())
                broken += [
                    f"task {first + g}: {error.reason}" for g, error in breakdowns if g < len(chunk)
                ]
        finally:
            self.timesteps = timesteps
        if broken and self.world.rank == 0:
            warnings.warn(
                f"{len(broken)} of {len(tasks)} tasks broke down, their returns are NaN from there "
                f"on; the first is {broken[0]}",
                stacklevel=2,
            )
        return torch.cat(returns, 1).double().cpu().numpy()

    def adapt(
        self,
        env: TaskEnvironment,
        tasks: Sequence[Task] | None,
        steps: int,
        seed: int,
        deterministic: bool = False,
        keep_going: bool = False,
        rows: Rows | None = None,
        generator: torch.Generator | None = None,
    ) -> Adaptation:
        """Takes gradient steps in each of some tasks.

        Args:
            env: The environment, with as many rows for each task.
            tasks: The tasks, `G` of them, of the family of `env`; or None for one task, that which
                `env` plays in all of its rows, be it of a family or not.
            steps: `K`, each on a round played with the weights before it.
            seed: Of the first row of the first round; the other rows and rounds count up.
            deterministic: Return what the modes of the policies earn, in rounds of their own.
            keep_going: Where the policy of a task breaks down, go on with the shared weights there;
                its returns are NaN from then on.
            rows: Where the rows of `env` are the part of a larger number: they start and act as they
                would in an environment of all of these.
            generator: Of the action noise; by default one that starts from `seed`.

        Raises:
            PolicyBreakdown: An inner step leads to weights, or a policy to actions, that are not
                finite, and `keep_going` is not set or the policy is the shared one.
            FloatingPointError: An observation or a reward is not finite.
            ValueError: `steps` is negative, or the environment does not fit.
        """
        check_count("steps", steps, at_least=0)
        self._check_env(env)
        if tasks is not None:
            self._set_tasks(env, tasks)
        rates = {name: rate.detach() for name, rate in self.rates.items()}
        weights = self.shared_weights(1 if tasks is None else len(tasks))
        rows = rows or Rows(0, env.batch_size, env.batch_size)
        generator = generator or torch.Generator(self.device).manual_seed(seed)
        returns: list[Tensor] = []
        rounds: list[dict[str, Tensor]] = []
        breakdowns: dict[int, PolicyBreakdown] = {}
        for k in range(steps + 1):
            if k > 0:
                with torch.no_grad():
                    weights, _ = inner_update(self._inner_loss, weights, rounds[-1], rates)
            first_seed = seed + k * rows.total  # no round starts where another one did
            noted = breakdowns if keep_going and k > 0 else None
            played, measured = self._play(
                env, weights, k, first_seed, deterministic, noted, rows, generator
            )
            earned = measured.episode_returns.clone()  # [G, R, E]
            earned[list(breakdowns)] = math.nan
            returns.append(earned)
            rounds.append(self._batch(played))
        return Adaptation(torch.stack(returns), weights, rounds, breakdowns)

    def _play(
        self,
        env: TaskEnvironment,
        weights: Weights,
        step: int,
        seed: int,
        deterministic: bool,
        breakdowns: dict[int, PolicyBreakdown] | None,
        rows: Rows,
        generator: torch.Generator,
    ) -> tuple[Trajectories, Trajectories]:
        """What the policies play after `step` inner steps, and what is measured of it.

        Where `breakdowns` is given, a policy that is not finite is noted there, and the shared one
        takes its place in `weights`.
        """
        replaced = set()
        random_state = generator.get_state()
        while True:
            try:
                _check_weights(weights, step)
                played = self.collect(env, weights, seed, False, rows, generator)
                if not deterministic:
                    return played, played
                return played, self.collect(env, weights, seed, True, rows, generator)
            except PolicyBreakdown as error:
                if breakdowns is None or error.task in replaced:
                    raise
                replaced.add(error.task)
                generator.set_state(random_state)  # the other tasks play the same once more
                breakdowns.setdefault(error.task, error)
                for name, shared in self._shared.items():
                    weights[name][error.task] = shared.detach()

    def adapted_model(self, weights: Weights, task: int = 0) -> ImprovedSSM:
        """A copy of the model with the weights of one task of an `Adaptation`."""
        model = copy.deepcopy(self.model)
        model.load_state_dict({name: w[task] for name, w in weights.items()}, strict=False)
        return model

    def shared_weights(self, tasks: int) -> Weights:
        """The shared weights, once for each task: `[G, ...]` by name."""
        return {name: p.detach().expand(tasks, *p.shape) for name, p in self._shared.items()}

    def collect(
        self,
        env: TaskEnvironment,
        weights: Weights,
        seed: int,
        deterministic: bool = False,
        rows: Rows | None = None,
        generator: torch.Generator | None = None,
    ) -> Trajectories:
        """Plays a round from a reset on: `R` rows of each task, with the weights of the task.

        Args:
            env: The environment; row `g R + r` belongs to task `g`.
            weights: `[G, ...]` by name.
            seed: Of the environments.
            deterministic: Take the mode of the policy.
            rows: As in `adapt`.
            generator: As in `adapt`.

        Raises:
            FloatingPointError: A policy, an observation or a reward is not finite.
        """
        policies = TaskPolicies(self.model, weights)
        G, R = policies.tasks, env.batch_size // policies.tasks
        dtype = next(self.model.parameters()).dtype
        recording = Recording(
            env.batch_size,
            self._steps_of(env),
            env.input_dim,
            _episodes_of(env),
            env.max_episode_steps,
        )
        rows = rows or Rows(0, env.batch_size, env.batch_size)
        generator = generator or torch.Generator(self.device).manual_seed(seed)
        observation, _ = env.reset(seed=seed + rows.first)
        first = np.ones(env.batch_size, dtype=np.bool_)  # [B]
        state = None
        for t in range(recording.steps):
            x = torch.from_numpy(observation).to(self.device, dtype).view(G, R, -1)
            starts = torch.from_numpy(first).to(self.device).view(G, R)
            noise = None
            if not deterministic:
                noise = rows.of(self.model.draw_noise(rows.total, generator=generator))
            action, log_prob, _, state = policies.get_action(x, state, deterministic, starts, noise)
            if not bool(torch.isfinite(log_prob).all()):
                g, r = torch.isfinite(log_prob).logical_not().nonzero()[0].tolist()
                raise PolicyBreakdown(
                    g, f"the policy is not finite at step {t} of {env.env_name}, in its row {r}"
                )
            try:
                step = env.step(action.flatten(0, 1).cpu().numpy())
            except FloatingPointError as error:
                raise FloatingPointError(f"step {t}: {error}") from error
            recording.add(observation, first, action, log_prob, step)
            if self._on_step is not None:
                self._on_step(self.timesteps + rows.total * (t + 1))
            observation, first = step[0], step[2] | step[3]
        self.timesteps += rows.total * recording.steps
        return recording.trajectories(G, dtype, self.device)

    # Learning

    def update(self, rounds: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Moves the shared weights by the rounds of an `Adaptation`.

        Args:
            rounds: The rounds of `tasks_per_epoch` tasks, the same on all ranks.

        Returns:
            `meta_loss` and `grad_norm`, means over the minibatches.

        Raises:
            FloatingPointError: A gradient is not finite, or a weight after a step. The weights are as
                before the minibatch.
        """
        self._check_model()
        metrics, weights = [], []
        for _ in range(self.outer_epochs):
            order = torch.randperm(len(rounds[0]["rewards"]), generator=self._shuffle, device="cpu")
            for minibatch in order.split(self.tasks_per_minibatch):  # type: ignore[no-untyped-call]
                tasks, weight = self.world.split(minibatch)
                batches = [{name: x[tasks] for name, x in batch.items()} for batch in rounds]
                loss, gradients = self._gradients(batches)
                gradients = self.world.average_all(gradients, weight)
                for p, gradient in zip(self._learnt, gradients, strict=True):
                    p.grad = gradient
                norm = nn.utils.clip_grad_norm_(self._learnt, self.max_grad_norm)
                if not bool(torch.isfinite(norm)):
                    raise FloatingPointError(
                        f"meta-loss {float(loss.detach())}, gradient norm {float(norm)}"
                    )
                before = [p.detach().clone() for p in self._learnt]
                self.optimizer.step()
                check_step(self._learnt, before)
                metrics.append(torch.stack([loss.detach(), norm]))
                weights.append(weight)
        if self.learn_inner_lr:
            with torch.no_grad():
                for rate in self.rates.values():
                    rate.clamp_(min=0.0)  # a step uphill is never meant
        stacked = torch.stack(metrics)  # [M, 2]
        share = stacked.new_tensor(weights).unsqueeze(1)  # [M, 1]
        means = self.world.average(stacked, share).mean(0).tolist()
        return dict(zip(("meta_loss", "grad_norm"), means, strict=True))

    def _gradients(self, rounds: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Sequence[Tensor]]:
        """The outer loss, and its gradients with respect to what is learnt."""
        found = self.gradients.of(lambda: self._native_gradients(rounds))
        if found is None:
            loss = self._outer_loss(rounds)
            return loss, torch.autograd.grad(
                loss, self._learnt, allow_unused=True, materialize_grads=True
            )
        count = len(rounds) * len(found.outer_losses)
        gradients = [found.weights[name] for name in self._shared]
        if self.learn_inner_lr:
            gradients += [found.rates[name] for name in self.rates]
        return found.outer_losses.sum() / count, [g.sum(0).div_(count) for g in gradients]

    def _native_gradients(self, rounds: Sequence[Mapping[str, Tensor]]) -> TaskGradients | Reason:
        losses = ("_outer_loss", "_surrogate", "_inner_loss", "_ratio", "_log_prob")
        if is_replaced(self, MetaRLTrainer, losses):
            return Reason("the trainer overrides a loss")
        return policy_task_gradients(
            self.model,
            self._shared,
            rounds,
            self.rates,
            self.first_order,
            self.clip_epsilon,
            _LARGEST_LOG_RATIO,
            self.learn_inner_lr,
        )

    def _outer_loss(self, rounds: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The mean surrogate of the rounds before and after each inner step."""
        G, K = len(rounds[0]["rewards"]), len(rounds) - 1
        weights: Weights = {name: p.expand(G, *p.shape) for name, p in self._shared.items()}
        losses = []
        for k, batch in enumerate(rounds):
            losses.append(task_losses(self._surrogate, weights, batch))  # [G]
            if k < K:
                weights, _ = inner_update(
                    self._inner_loss, weights, batch, self.rates, self.first_order
                )
        return torch.stack(losses).mean()

    def _batch(self, played: Trajectories) -> dict[str, Tensor]:
        return {
            "observations": played.observations,
            "actions": played.actions,
            "log_probs": played.log_probs,
            "reset": played.reset,
            "rewards": played.rewards,
            "advantages": compute_advantages(played, self.gamma, self.gae_lambda),
        }

    def _log_prob(self, weights: Weights, batch: Mapping[str, Tensor]) -> Tensor:
        """`[R, T]` of one task."""
        inputs = batch["observations"], None, batch["reset"]
        mean, log_std, _, _ = functional_call(self.model, weights, inputs)
        if log_std is None:
            actions = batch["actions"].unsqueeze(-1)  # [R, T, 1]
            return mean.log_softmax(-1).gather(-1, actions).squeeze(-1)  # type: ignore[no-any-return]
        return gaussian_log_prob(batch["actions"], mean, log_std)

    def _ratio(self, weights: Weights, batch: Mapping[str, Tensor]) -> Tensor:
        """Probabilities of the actions over those when they were taken, `[R, T]`."""
        log_ratio = self._log_prob(weights, batch) - batch["log_probs"]
        return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()

    def _inner_loss(self, weights: Weights, batch: Mapping[str, Tensor]) -> Tensor:
        return -(self._ratio(weights, batch) * batch["advantages"]).mean()

    def _surrogate(self, weights: Weights, batch: Mapping[str, Tensor]) -> Tensor:
        """PPO's clipped surrogate of one task's policy, to be minimised."""
        ratio = self._ratio(weights, batch)  # [R, T]
        clipped = ratio.clamp(1.0 - self.clip_epsilon, 1.0 + self.clip_epsilon)
        advantages = batch["advantages"]
        return -torch.minimum(ratio * advantages, clipped * advantages).mean()

    # Checks and saving

    def _groups(self, learnt: Sequence[tuple[str, Tensor]]) -> list[list[Tensor]]:
        """What the optimizer moves at the full rate, and at that of transition matrices."""
        scales = learning_rate_scales(self.model)
        return [[p for name, p in learnt if scales[name] == scale] for scale in _LR_SCALES]

    def _check_parts(self) -> None:
        rates = list(self.rates.items()) if self.learn_inner_lr else []
        check_parts(self.optimizer, self._groups([*self._shared.items(), *rates]))

    def _check_env(self, env: TaskEnvironment) -> None:
        if not isinstance(env, (Environment, TrialEnvironment)):
            raise TypeError(
                f"env must be an Environment or a TrialEnvironment, got {type(env).__name__}"
            )
        self._steps_of(env)
        self._check_model()
        model = self.model
        check_spaces(env, model.input_dim, model.action_dim, model.discrete)

    def _check_model(self) -> None:
        """Raise where the model trains other parameters than those of the optimizer."""
        trained = _trained(self.model)
        for name in {**self._shared, **trained}:
            if trained.get(name) is not self._shared.get(name):
                raise ValueError(
                    f"{name} of the model must be trained exactly if it was when the trainer was "
                    "made, and stay the same parameter: make a new trainer after freezing, "
                    "unfreezing or replacing it"
                )
        for name, rate in self.rates.items():
            own = trained[name]
            if own.dtype != rate.dtype or own.device != rate.device:
                raise TypeError(
                    f"the model must stay {rate.dtype} on {rate.device}, as the trainer was made "
                    f"with, got {name} of {own.dtype} on {own.device}"
                )

    def _check_rows(self, env: TaskEnvironment, tasks: int) -> None:
        if env.family is None:
            raise ValueError(f"{env.env_name} must have tasks: it is no task family")
        if env.batch_size % tasks:
            raise ValueError(
                f"env must have as many rows for each of {tasks} tasks, got {env.batch_size}"
            )

    def _set_tasks(self, env: TaskEnvironment, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("tasks must not be empty")
        self._check_rows(env, len(tasks))
        rows = env.batch_size // len(tasks)
        env.set_tasks([task for task in tasks for _ in range(rows)])

    def _steps_of(self, env: TaskEnvironment) -> int:
        steps = self.num_steps or env.max_episode_steps
        if steps is None:
            raise ValueError(f"num_steps is needed: {env.env_name} has no time limit")
        return steps

    def _seed_generators(self, seed: int) -> None:
        """Those of the action noise and of the minibatches, which is one on the CPU."""
        self._noise.manual_seed(seed)
        self._shuffle.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of a run depends on."""
        return {
            "version": _STATE_VERSION,
            "settings": self._settings(),
            **self._settings_of_env(),
            "model": self.model.state_dict(),
            "rates": {name: rate.detach() for name, rate in self.rates.items()},
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "timesteps": self.timesteps,
            "first_iteration": self._first_iteration,
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
                current |= self._settings_of_env()
            check_settings(state, _STATE_VERSION, current)
            weights = check_tensors("model", state["model"], self.model.state_dict())
            rates = check_tensors("rate", state["rates"], self.rates)
            names = ("iteration", "timesteps", "first_iteration", "batch_size", "trial_episodes")
            counts = [read_count(state, name) for name in names]
            seconds, env_name = float(state["seconds"]), str(state["env_name"])
            load_adam(self.optimizer, state["optimizer"])
        self.model.load_state_dict(weights)
        with torch.no_grad():
            for name, rate in self.rates.items():
                rate.copy_(rates[name])
        self.iteration, self.timesteps, self._first_iteration, self._batch_size, episodes = counts
        self._env = env_name, episodes
        self._seconds = seconds

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def _settings_of_env(self) -> dict[str, Any]:
        name, episodes = self._env
        return {"batch_size": self._batch_size, "env_name": name, "trial_episodes": episodes}


def _episodes_of(env: TaskEnvironment) -> int:
    return env.episodes if isinstance(env, TrialEnvironment) else 1


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What tasks adapt and the outer steps train: all that requires gradients but the critic."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("critic")
    }


def _check_weights(weights: Weights, step: int) -> None:
    """Raises for the first task whose weights are not finite after so many inner steps."""
    for name, weight in weights.items():
        bad = (~torch.isfinite(weight)).flatten(1).any(1).nonzero()
        if len(bad) > 0:
            raise PolicyBreakdown(
                int(bad[0]), f"inner step {step - 1} leads to a {name} that is not finite"
            )
