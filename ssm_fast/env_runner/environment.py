"""A batch of Gymnasium environments that are stepped together and restart by themselves."""

from __future__ import annotations

import json
import math
import traceback
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import TimeLimit
from numpy.typing import ArrayLike, NDArray

from ssm_fast.checks import check_count, is_replaced
from ssm_fast.env_runner import vector_physics
from ssm_fast.env_runner.acrobot_family import AcrobotVectorEnv
from ssm_fast.env_runner.cartpole_family import CartPoleVectorEnv
from ssm_fast.env_runner.classic_families import ClassicVectorEnv
from ssm_fast.env_runner.same_step import SameStepVectorEnv, check_elapsed
from ssm_fast.env_runner.task_families import Task, TaskFamily, get_family
from ssm_fast.env_runner.vector_physics import MujocoVectorEnv

if TYPE_CHECKING:
    from typing_extensions import Self

_Step = tuple[
    NDArray[np.float32],
    NDArray[np.float64],
    NDArray[np.bool_],
    NDArray[np.bool_],
    dict[str, Any],
]


class Environment:
    """`batch_size` copies of a Gymnasium environment with same-step autoreset.

    Row `i` is seeded `seed + i` and runs exactly as `gymnasium.make(env_name)` does when it is
    stepped by hand. Where an episode ends, `step` resets that row at once: the returned observation
    is the first one of the next episode, and the last one of the ended episode stands in
    `info["final_obs"]`. No row of a rollout is ever a filler.

    Observations are flattened to `[B, input_dim]` float32. Continuous actions are clipped to their
    bounds here and nowhere else, so that a caller's log-probabilities belong to the raw actions.

    An error that an environment raises passes through as it is, with a note (`__notes__`) that
    names the environment, row and step. The rows then stand at different steps, and `step` asks for
    a `reset`. A warning tells of an observation whose changes float32 rounds away.

    Attribute `physics` and `repr` tell which of the two ways to step the rows is in use; both give
    the same numbers:

    - `"vector"`: all rows at once, on C++ threads (`MujocoVectorEnv`: HalfCheetah, Hopper,
      Walker2d, Swimmer, Ant and Humanoid v5 and their task families, from mujoco 3.17 on) or as
      arrays (`CartPoleVectorEnv`, `AcrobotVectorEnv`: the families of classic control). It does
      not render.
    - `"gymnasium"`: Gymnasium's own environments, one after the other. Every id has it.

    Args:
        env_name: A registered Gymnasium id.
        batch_size: Number of copies `B`.
        max_episode_steps: Truncate episodes here; `None` keeps the limit of the registration.
        seed: Seed of the first `reset` and of `sample_action`.
        physics: `"vector"`, `"gymnasium"`, or `"auto"`: the first where the id and the `env_kwargs`
            allow it, else the second.
        num_threads: Threads of the vector physics; `None` takes as many as torch. Results are the
            same for any number.
        tasks: One task a row, for the id of a `TaskFamily`; `None` is its default task in every
            row. See `set_tasks`.
        **env_kwargs: Handed to `gymnasium.make`, for example `render_mode="rgb_array"`.

    Raises:
        ValueError: The id cannot be made, its spaces are not a Box observation with a
            one-dimensional floating Box or a Discrete action, or `physics="vector"` was asked for
            and cannot be had.
        TypeError: A count is no integer.
    """

    def __init__(
        self,
        env_name: str,
        batch_size: int = 1,
        max_episode_steps: int | None = None,
        seed: int | None = None,
        physics: Literal["auto", "vector", "gymnasium"] = "auto",
        num_threads: int | None = None,
        tasks: Sequence[Task] | None = None,
        **env_kwargs: Any,
    ) -> None:
        check_count("batch_size", batch_size)
        if max_episode_steps is not None:
            check_count("max_episode_steps", max_episode_steps)
        if num_threads is not None:
            check_count("num_threads", num_threads)
        if physics not in ("auto", "vector", "gymnasium"):
            raise ValueError(
                f"unknown physics {physics!r}; expected one of 'auto', 'vector', 'gymnasium'"
            )
        reason = _unsupported(env_name, **env_kwargs)
        if physics == "vector" and reason is not None:
            raise ValueError(f"physics='vector' cannot run env_name {env_name!r}: {reason}")
        if max_episode_steps is not None:
            env_kwargs["max_episode_steps"] = max_episode_steps
        with ExitStack() as undo:
            envs: list[gymnasium.Env[Any, Any]] = []
            vector: SameStepVectorEnv | None = None
            try:
                if physics != "gymnasium" and reason is None:
                    in_arrays = _class_in_arrays(env_name)
                    if in_arrays is not None:
                        vector = in_arrays(env_name, batch_size, **env_kwargs)
                    else:
                        vector = MujocoVectorEnv(
                            env_name, batch_size, num_threads=num_threads, **env_kwargs
                        )
                    undo.callback(vector.close)
                for _ in range(batch_size if vector is None else 0):
                    envs.append(gymnasium.make(env_name, **env_kwargs))
                    undo.callback(envs[-1].close)
            except Exception as error:
                # Gymnasium reports an unknown name, version, namespace or module, and a missing
                # extra, through these two families.
                is_known = isinstance(error, (gymnasium.error.Error, ImportError))
                if not is_known and _last_frame(error).name != "load_env_creator":
                    _add_note(error, f"in the making of {env_name}")
                    raise
                is_lost = isinstance(error, ModuleNotFoundError) and ":" in env_name
                hint = " PYTHONPATH names the folders that have modules." if is_lost else ""
                if not is_known:
                    hint = " (its registration must have an entry_point 'module:class')"
                raise ValueError(f"env_name {env_name!r} cannot be made: {error}{hint}") from error
            source: Any = envs[0] if vector is None else vector
            self._setup(env_name, envs, vector, source.spec, seed)
            if tasks is not None:
                self.set_tasks(tasks)
            undo.pop_all()

    @classmethod
    def wrap(
        cls,
        env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any],
        seed: int | None = None,
    ) -> Self:
        """Makes an `Environment` of an existing environment, which it closes in its turn.

        Args:
            env: An environment (`B` = 1), a `SyncVectorEnv` (its environments are stepped one by
                one, whatever its autoreset mode), or another vector environment whose autoreset
                mode is same-step: a `SyncVectorEnv` with a `step` or `reset` of its own, too.
            seed: Seed of the first `reset` and of `sample_action`.

        Raises:
            ValueError: Its spaces do not fit, or its autoreset mode is another.
            TypeError: `env` is not an environment.
        """
        if not isinstance(env, (gymnasium.Env, VectorEnv)):
            raise TypeError(
                f"env must be a gymnasium.Env or gymnasium.vector.VectorEnv, got {type(env)}"
            )
        self = cls.__new__(cls)
        spec = env.spec
        if spec is None and isinstance(env, SyncVectorEnv):
            spec = env.envs[0].spec
        name = spec.id if spec is not None else type(env.unwrapped).__name__
        if isinstance(env, SyncVectorEnv) and not is_replaced(env, SyncVectorEnv, _SYNC_METHODS):
            self._setup(name, list(env.envs), env, spec, seed)
        elif isinstance(env, VectorEnv):
            _check_same_step(env)
            self._setup(name, [], env, spec, seed)
        else:
            self._setup(name, [env], None, spec, seed)
        return self

    def _setup(
        self,
        env_name: str,
        envs: list[gymnasium.Env[Any, Any]],
        vector: VectorEnv[Any, Any, Any] | None,
        spec: EnvSpec | None,
        seed: int | None,
    ) -> None:
        self.max_episode_steps: int | None = spec.max_episode_steps if spec is not None else None
        self.env_name = env_name
        self._envs = envs
        self._vector = vector
        self.physics = "vector" if isinstance(vector, SameStepVectorEnv) else "gymnasium"
        if vector is not None and not envs:
            self.batch_size = vector.num_envs
            observation_space = vector.single_observation_space
            action_space = vector.single_action_space
        else:
            self.batch_size = len(envs)
            observation_space = envs[0].observation_space
            action_space = envs[0].action_space
        self.single_observation_space = _check_observation_space(env_name, observation_space)
        self.single_action_space = _check_action_space(env_name, action_space)
        self.observation_space = batch_space(observation_space, self.batch_size)
        self.action_space = batch_space(action_space, self.batch_size)
        self.input_dim = math.prod(self.single_observation_space.shape)
        self.discrete = isinstance(self.single_action_space, spaces.Discrete)
        self.action_low: NDArray[Any] | None = None
        self.action_high: NDArray[Any] | None = None
        if isinstance(self.single_action_space, spaces.Discrete):
            self.action_dim = int(self.single_action_space.n)
            self._action_shape: tuple[int, ...] = (self.batch_size,)
        else:
            self.action_dim = self.single_action_space.shape[0]
            self.action_low = self.single_action_space.low
            self.action_high = self.single_action_space.high
            self._action_shape = (self.batch_size, self.action_dim)
            shape = self._action_shape  # clipping to whole arrays takes a third of the time
            self._low_rows = np.broadcast_to(self.action_low, shape).copy()
            self._high_rows = np.broadcast_to(self.action_high, shape).copy()

        source: Any = envs[0].unwrapped if envs else vector
        self.family: TaskFamily[Any] | None = getattr(source, "family", None)
        self._next_tasks: tuple[Task, ...] | None = None
        self._seed: int | None = None if seed is None else _check_seed(seed)
        self.action_space.seed(self._seed)
        self._is_reset = False
        self._closed = False
        self._steps = 0
        self._returns = np.zeros(self.batch_size)  # [B], of the episodes under way
        self._no_returns = np.full(self.batch_size, np.nan)  # [B]
        self._lengths = np.zeros(self.batch_size, dtype=np.int64)  # [B]
        self._episodes = 0
        self._last_returns: deque[float] = deque(maxlen=100)
        self._last_lengths: deque[int] = deque(maxlen=100)
        # Observations are gathered in float64 where float32 could round their changes away.
        is_wide = observation_space.dtype in _WIDE_DTYPES
        self._gathered: type[np.floating[Any]] = np.float64 if is_wide else np.float32
        self._may_round = is_wide
        self._large: NDArray[np.intp] | None = None  # components that are watched
        self._before: NDArray[np.float64] = np.empty(0)  # [B, len(large)], as of the last step
        self._may_warn_of_spaces = True

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the rows play, or will start with; empty where there are none."""
        if self._next_tasks is not None and not self._is_reset:
            return self._next_tasks
        if self._envs and self.family is not None:
            return tuple(cast(Any, env.unwrapped).task for env in self._envs)
        return getattr(self._vector, "tasks", ())

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Gives every row a task of its own, from the next `reset` on.

        Until then the rows play on, and restart, with the tasks that they have.

        Raises:
            ValueError: The environment has no tasks, or these are not one a row.
            TypeError: These are no tasks of the environment's family.
        """
        self._check_open()
        if self.family is None:
            get_family(self.env_name)
            raise ValueError(f"{self!r} has no tasks")
        checked = self.family.check_tasks(tasks, self.batch_size)
        if isinstance(self._vector, SameStepVectorEnv):
            self._vector.set_tasks(checked)
        else:
            self._next_tasks = checked

    def reset(
        self,
        seed: int | Sequence[int] | NDArray[np.integer] | None = None,
        *,
        elapsed: ArrayLike | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts a new episode in every row.

        Args:
            seed: Row `i` is seeded `seed + i`, or `seed[i]` of a sequence. `None` takes the
                constructor's seed the first time and lets the generators run on after that.
            elapsed: Steps `[B]` that the time limit counts as taken already. Such a first episode
                is truncated that much sooner, so that rows may restart at different times. Wrappers
                that count steps themselves, as `TimeAwareObservation` does, count from zero.
            options: Handed to the `reset` of every row, for these first episodes alone. The vector
                physics takes none.

        Returns:
            The observations `[B, input_dim]` and a dict with `"env_info"`, what the environments
            themselves reported.

        Raises:
            ValueError: `seed` or `elapsed` is not one a row, a seed is negative, `elapsed` lies
                outside `[0, max_episode_steps)`, there is no `TimeLimit`, or `options` cannot be
                handed on.
            TypeError: A seed or `elapsed` is no integer.
        """
        self._check_open()
        if options and self.physics == "vector":
            raise ValueError(
                f"options must be None for {self!r}, got {sorted(options)}: "
                "physics='gymnasium' hands them on"
            )
        if options and "reset_mask" in options:
            raise ValueError(
                f"options must not have 'reset_mask': reset() of {self!r} restarts all rows"
            )
        if elapsed is not None:
            if not self._envs and self.physics != "vector":
                raise ValueError(
                    f"elapsed needs a time limit of Gymnasium's, which {self!r} has not"
                )
            limits: list[Any] = [_time_limit(env) for env in self._envs]
            of_rows: list[int] = [limit._max_episode_steps for limit in limits]
            elapsed = check_elapsed(elapsed, self.batch_size, of_rows or self.max_episode_steps)
        if seed is None:
            seed = self._seed
        seeds: list[int | None]
        given: Any = None  # to a vector environment: Gymnasium's own signature has no sequence
        if seed is None:
            seeds = [None] * self.batch_size
        elif isinstance(seed, (Sequence, np.ndarray)):
            if len(seed) != self.batch_size:
                raise ValueError(f"seed must have {self.batch_size} entries, got {len(seed)}")
            given = seeds = [_check_seed(s) for s in seed]
        else:
            given = _check_seed(seed)
            seeds = [given + i for i in range(self.batch_size)]
        self._is_reset = False  # whatever interrupts the rows, they have to start together
        self._returns[:] = 0.0
        self._lengths[:] = 0

        raw: NDArray[Any]
        env_info: Any = []
        if self._envs:
            raw = np.empty((self.batch_size, self.input_dim), self._gathered)  # [B, input_dim]
            for i, (env, env_seed) in enumerate(zip(self._envs, seeds, strict=True)):
                if self._next_tasks is not None:
                    env.get_wrapper_attr("set_task")(self._next_tasks[i])
                row, row_info = self._call(i, "reset", seed=env_seed, options=options)
                self._store(raw, i, row)
                env_info.append(_own(row_info))
                if elapsed is not None:
                    limits[i]._elapsed_steps = int(elapsed[i])
            self._next_tasks = None
        else:
            assert self._vector is not None
            if self.physics == "vector" and elapsed is not None:
                options = {"elapsed": elapsed}
            try:
                result = self._vector.reset(seed=given, options=options)
            except Exception as error:
                _add_note(error, f"in the reset of {self.env_name}")
                raise
            rows, env_info = self._checked_tuple("reset", result)
            raw = self._rows_of("observations", rows, self.single_observation_space.shape)
            if self.physics == "vector":
                env_info = RowInfo(env_info, self.batch_size)
        obs = self._cast(raw)
        self._check_finite("observation", obs)
        self._watch(raw)
        self._seed = None
        self._is_reset = True
        return obs, {"env_info": env_info}

    def step(self, actions: ArrayLike) -> _Step:
        """Steps every row and restarts those whose episode ended.

        Args:
            actions: `[B, action_dim]` floating for a Box, `[B]` integers for a Discrete space.

        Returns:
            Gymnasium's five: the observations to act on next `[B, input_dim]`, the rewards `[B]`,
            `terminated` `[B]`, `truncated` `[B]`, and a dict with

            - `final_obs` `[B, input_dim]`: the observation that this very step led to, in every
                row. It differs from the first result only where an episode ended.
            - `episode_return` `[B]`, `episode_length` `[B]`: of the episodes that ended in this
                step; NaN and 0 in the other rows.
            - `env_info`: what the environments reported, a sequence of `B` dicts (the terminal
                step's where an episode ended), or the dict of a wrapped vector environment.

        Raises:
            FloatingPointError: An environment returned NaN or infinity. The message names the row.
            ValueError: An environment broke Gymnasium's interface, or the actions do not fit (no
                environment has moved then).
            RuntimeError: There was no `reset` yet, or an error ended the last `step`.
        """
        self._check_open()
        if not self._is_reset:
            raise RuntimeError(
                "call reset() before step(): there was none, or an error ended the last step"
            )
        checked = self._check_actions(actions)
        self._is_reset = False  # whatever interrupts the rows, they have to start together
        self._steps += 1
        self._lengths += 1
        step = self._step_rows if self._envs else self._step_vector
        raw, raw_final, rewards, terminated, truncated, env_info = step(checked)
        final_obs, obs = self._cast(raw_final), self._cast(raw)  # [B, input_dim]
        with np.errstate(over="ignore"):  # of a reward that is large for what learns from it
            self._check_finite("reward", rewards.astype(np.float32))
        self._check_finite("observation", final_obs)
        if raw is not raw_final:
            self._check_finite("first observation", obs)
        if self._large is not None:
            self._warn_of_rounding(raw_final)
            self._watch(raw)
        self._is_reset = True

        self._returns += rewards
        done = terminated | truncated  # [B]
        episode_return = self._no_returns.copy()  # [B]
        episode_length = np.zeros(self.batch_size, dtype=np.int64)  # [B]
        if np.count_nonzero(done):
            episode_return[done] = self._returns[done]
            episode_length[done] = self._lengths[done]
            self._returns[done] = 0.0
            self._lengths[done] = 0
            self._episodes += int(done.sum())
            self._last_returns.extend(episode_return[done].tolist())
            self._last_lengths.extend(episode_length[done].tolist())
        info = {
            "final_obs": final_obs,
            "episode_return": episode_return,
            "episode_length": episode_length,
            "env_info": env_info,
        }
        return obs, rewards, terminated, truncated, info

    def _step_rows(self, actions: NDArray[Any]) -> tuple[Any, ...]:
        """Steps the environments one after the other.

        A `SyncVectorEnv` does the same and takes about a sixth longer for it: it merges the info
        dicts key by key and deep-copies the observations.
        """
        B = self.batch_size
        final = np.empty((B, self.input_dim), self._gathered)  # [B, input_dim]
        rewards = np.empty(B)  # [B]
        terminated = np.empty(B, dtype=np.bool_)  # [B]
        truncated = np.empty(B, dtype=np.bool_)  # [B]
        env_info = []
        first: list[tuple[int, Any]] = []
        for i in range(B):
            row, reward, ended, cut, row_info = self._call(i, "step", actions[i])
            self._store(final, i, row)
            try:
                rewards[i], terminated[i], truncated[i] = reward, ended, cut
            except (TypeError, ValueError) as error:
                raise ValueError(self._no_scalars(i, reward, ended, cut)) from error
            env_info.append(_own(row_info))
            if ended or cut:
                # a copy: the environment may share the memory of its observations with others
                first.append((i, np.array(self._call(i, "reset")[0])))
        obs = final
        if first:
            obs = final.copy()  # [B, input_dim]
            for i, row in first:
                self._store(obs, i, row)
        return obs, final, rewards, terminated, truncated, env_info

    def _call(self, i: int, call: Literal["step", "reset"], *args: Any, **kwargs: Any) -> Any:
        """Steps or resets one environment; an error tells which one raised it."""
        try:
            result = getattr(self._envs[i], call)(*args, **kwargs)
        except Exception as error:
            if _is_of_unpacking(error):  # a wrapper of Gymnasium's met the wrong tuple first
                raise ValueError(self._wrong_tuple(call, str(error), i)) from error
            when = f"step {self._lengths[i]} of its episode" if call == "step" else "its reset"
            _add_note(error, f"in environment {i} of {self.env_name}, at {when}")
            raise
        return self._checked_tuple(call, result, i)

    def _checked_tuple(
        self, call: Literal["step", "reset"], result: Any, i: int | None = None
    ) -> Any:
        """Returns what `call` of environment `i`, or of all at once, returned."""
        if isinstance(result, tuple) and len(result) == len(_RETURNED[call]):
            return result
        got = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        raise ValueError(self._wrong_tuple(call, f"got {got}", i))

    def _wrong_tuple(self, call: Literal["step", "reset"], got: str, i: int | None) -> str:
        who = self.env_name if i is None else f"{self.env_name}: environment {i}"
        old = "; Gym's old step returned done in the place of terminated and truncated"
        names = ", ".join(_RETURNED[call])
        return f"{who}: {call} must return ({names}), {got}{old if call == 'step' else ''}"

    def _no_scalars(self, i: int, *values: Any) -> str:
        names = _RETURNED["step"][1:4]
        got = ", ".join(f"{name} {value!r}" for name, value in zip(names, values, strict=True))
        return (
            f"{self.env_name}: environment {i} must return a number as reward, and a bool each as "
            f"terminated and truncated, not arrays: got {got}; float(...) makes a number of an array "
            "of one"
        )

    def _step_vector(self, actions: NDArray[Any]) -> tuple[Any, ...]:
        """Steps a vector environment that restarts its rows in the same step."""
        assert self._vector is not None
        try:
            result = self._vector.step(actions)
        except Exception as error:
            _add_note(error, f"in step {self._steps} of {self.env_name}")
            raise
        rows, *scalars, info = self._checked_tuple("step", result)
        obs = self._rows_of("observations", rows, self.single_observation_space.shape)
        rewards = self._rows_of("rewards", scalars[0], ()).astype(np.float64)
        terminated = self._rows_of("terminated", scalars[1], ()).astype(np.bool_)
        truncated = self._rows_of("truncated", scalars[2], ()).astype(np.bool_)
        final = obs
        ended = terminated | truncated  # [B]
        if np.count_nonzero(ended):
            if "final_obs" not in info:
                raise ValueError(
                    f"{self.env_name}: info must have 'final_obs' where episodes end, as "
                    f"AutoresetMode.SAME_STEP has it, got {sorted(info)}"
                )
            final = obs.copy()  # [B, input_dim]
            for i in np.flatnonzero(ended).tolist():
                self._store(final, i, info["final_obs"][i])
        env_info = RowInfo(info, self.batch_size) if self.physics == "vector" else info
        return obs, final, rewards, terminated, truncated, env_info

    def _rows_of(self, what: str, values: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """What a vector environment returned, a row each, checked and flattened."""
        array = np.asarray(values)
        expected = (self.batch_size, *shape)
        if array.shape != expected:
            raise ValueError(
                f"{self.env_name}: {what} must have shape {list(expected)}, got {list(array.shape)}"
            )
        return array.reshape(self.batch_size, -1) if shape else array

    def _cast(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """The observations as they are handed out, in memory of their own."""
        with np.errstate(over="ignore"):  # _check_finite reports a value beyond float32
            obs: NDArray[np.float32] = raw.astype(np.float32)
        return obs  # [B, input_dim]

    def _watch(self, raw: NDArray[Any]) -> None:
        """Remembers the components that are so large that float32 may round their changes away."""
        if not self._may_round:
            return
        if self._large is None:
            large = np.flatnonzero((np.abs(raw) >= _LARGE).any(axis=0))
            self._large = large if large.size else None
        if self._large is not None:
            self._before = raw[:, self._large].astype(np.float64)

    def _warn_of_rounding(self, raw: NDArray[Any]) -> None:
        """Warns once where a component that is watched changed, and its float32 did not."""
        assert self._large is not None
        now, before = raw[:, self._large].astype(np.float64), self._before
        lost = (now != before) & (now.astype(np.float32) == before.astype(np.float32))
        if not lost.any():
            return
        row, k = np.argwhere(lost)[0].tolist()
        index = np.unravel_index(self._large[k], self.single_observation_space.shape)
        self._large, self._may_round = None, False
        warnings.warn(
            f"{self.env_name}: component {list(map(int, index))} of the observations went from "
            f"{before[row, k]} to {now[row, k]} in environment {row}, which are the same number in "
            "float32, what policies see: subtract a constant of that size by "
            "gymnasium.wrappers.TransformObservation",
            stacklevel=3,
        )

    def sample_action(self) -> NDArray[Any]:
        """Draws a random action for every row, reproducible by the constructor's seed."""
        action: NDArray[Any] = self.action_space.sample()
        return action

    def render(self) -> tuple[Any, ...]:
        """Returns one frame per row; needs `render_mode` among the `env_kwargs`."""
        self._check_open()
        source = self._envs[0] if self._envs else self._vector
        assert source is not None
        if source.render_mode is None:
            raise RuntimeError("render() needs Environment(..., render_mode='rgb_array')")
        if self._envs:
            return tuple(env.render() for env in self._envs)
        assert self._vector is not None
        frames = self._vector.render()
        return tuple(frames) if frames is not None else ()

    def get_episode_statistics(self) -> dict[str, float]:
        """Returns the number of ended episodes and figures of the last 100 (NaN before the first).

        The keys are `episodes`, `mean_return`, `std_return`, `min_return`, `max_return` and
        `mean_length`.
        """
        returns = np.array(self._last_returns if self._last_returns else [np.nan])
        lengths = np.array(self._last_lengths if self._last_lengths else [np.nan])
        return {
            "episodes": float(self._episodes),
            "mean_return": float(returns.mean()),
            "std_return": float(returns.std()),
            "min_return": float(returns.min()),
            "max_return": float(returns.max()),
            "mean_length": float(lengths.mean()),
        }

    def policy_metadata(self) -> dict[str, str]:
        """What the file of a policy should say of the environment that it was trained in.

        The keys are `env_id` and, for continuous actions, `action_low` and `action_high` (JSON), as
        `ssm_fast.load_policy` reads them.
        """
        metadata = {"env_id": self.env_name}
        if self.action_low is not None and self.action_high is not None:
            metadata["action_low"] = json.dumps(self.action_low.tolist())
            metadata["action_high"] = json.dumps(self.action_high.tolist())
        return metadata

    def warn_of_spaces(self) -> None:
        """Warns, once, of spaces in which a policy can hardly learn; trainers call it as they begin.

        These are pictures, which are flattened to many inputs, and bounds of actions far from [-1, 1].
        """
        if not self._may_warn_of_spaces:
            return
        self._may_warn_of_spaces = False
        shape = self.single_observation_space.shape
        if len(shape) > 1 and self.input_dim > _MANY_INPUTS:
            warnings.warn(
                f"{self.env_name}: observations of shape {list(shape)} are flattened to "
                f"{self.input_dim:,} inputs, and no layer is made for pictures: shrink them by "
                "gymnasium.wrappers.GrayscaleObservation and ResizeObservation, or turn them into "
                "features in an ObservationWrapper",
                stacklevel=3,
            )
        if self.action_low is None or self.action_high is None:
            return
        low, high = (x.astype(np.float64) for x in (self.action_low, self.action_high))
        half = high / 2 - low / 2  # [action_dim]
        is_far = (low > 1) | (high < -1) | (half > _FAR) | (half < 0.5 / _FAR)
        is_far &= np.isfinite(half)
        if is_far.any():
            i = int(np.flatnonzero(is_far)[0])
            warnings.warn(
                f"{self.env_name}: component {i} of the actions lies in [{low[i]:g}, {high[i]:g}], but "
                "a policy starts with actions around 0 of a deviation below 1, which are clipped and "
                "not rescaled: wrap the environment in gymnasium.wrappers.RescaleAction(env, -1, 1)",
                stacklevel=3,
            )

    def close(self) -> None:
        """Closes the environments; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._vector is not None:
            self._vector.close()
        else:
            for env in self._envs:
                env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Environment({self.env_name!r}, batch_size={self.batch_size}, "
            f"physics={self.physics!r})"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")

    def _check_actions(self, actions: ArrayLike) -> NDArray[Any]:
        """Checks shape, dtype and range before any environment moves; clips to the bounds."""
        array = np.asarray(actions)
        if array.shape != self._action_shape:
            names = "[B]" if self.discrete else "[B, action_dim]"
            raise ValueError(
                f"actions must have shape {names} = {list(self._action_shape)}, "
                f"got {list(array.shape)}"
            )
        if self.discrete:
            if array.dtype.kind not in "iu":
                raise TypeError(f"actions must be integers for Discrete, got {array.dtype}")
            if (array < 0).any() or (array >= self.action_dim).any():
                raise ValueError(
                    f"actions must lie in [0, {self.action_dim}), got {array.tolist()}"
                )
            return array.astype(np.int64)
        if array.dtype.kind != "f":
            raise TypeError(f"actions must be floating for Box, got {array.dtype}")
        if np.count_nonzero(np.isfinite(array)) < array.size:
            row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
            raise ValueError(f"actions must be finite, got {array[row].tolist()} in row {row}")
        array = np.minimum(np.maximum(array, self._low_rows), self._high_rows)
        clipped: NDArray[Any] = array.astype(self.single_action_space.dtype)
        return clipped

    def _store(self, into: NDArray[Any], i: int, row: Any) -> None:
        array = np.asarray(row)
        if array.shape != self.single_observation_space.shape:
            raise ValueError(
                f"{self.env_name}: environment {i} must return an observation of shape "
                f"{list(self.single_observation_space.shape)}, got {list(array.shape)}"
            )
        with np.errstate(over="ignore"):  # _check_finite reports a value beyond float32
            into[i] = array.reshape(-1)

    def _check_finite(self, what: str, values: NDArray[Any]) -> None:
        finite = np.isfinite(values)
        if np.count_nonzero(finite) == finite.size:  # half the time of finite.all()
            return
        i = int(np.flatnonzero(~finite.reshape(self.batch_size, -1).all(axis=1))[0])
        self._is_reset = False
        raise FloatingPointError(
            f"{self.env_name}: environment {i} returned a non-finite {what} at step "
            f"{self._steps} (step {self._lengths[i]} of its episode): {values[i].tolist()}"
        )


class MetaEnvironment(Environment):
    """An `Environment` of a task family, with a set of tasks to learn from.

    Args:
        env_name: The id of a `TaskFamily`.
        num_tasks: Number of different tasks that `tasks_to_learn` holds; `None` is the family's
            training set. A number draws that many from the family by `seed`; none of them is held
            out for tests.
        batch_size: Number of rows `B`.
        max_episode_steps: Truncate episodes here; `None` keeps the horizon of the family.
        seed: Seed of the tasks, of the order in which they are drawn, of the first `reset` and of
            `sample_action`.
        **kwargs: As for `Environment`.

    Raises:
        ValueError: The id has no family, or the family has fewer tasks.
    """

    def __init__(
        self,
        env_name: str,
        num_tasks: int | None = None,
        batch_size: int = 1,
        max_episode_steps: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        family = get_family(env_name)
        if num_tasks is not None:
            check_count("num_tasks", num_tasks)
        entropy = None if seed is None else _check_seed(seed)
        super().__init__(env_name, batch_size, max_episode_steps, seed, **kwargs)
        self._task_generator = np.random.default_rng(entropy)
        if num_tasks is None:
            self.tasks_to_learn: tuple[Task, ...] = family.train_tasks
        else:
            task_seed = int(self._task_generator.integers(2**32))
            self.tasks_to_learn = tuple(dict.fromkeys(family.sample(num_tasks + 64, task_seed)))
            if len(self.tasks_to_learn) < num_tasks:
                self.close()
                raise ValueError(
                    f"num_tasks must be at most {len(self.tasks_to_learn)} for {env_name}, "
                    f"got {num_tasks}"
                )
            self.tasks_to_learn = self.tasks_to_learn[:num_tasks]

    def sample_task(self) -> Task:
        """Draws one of `tasks_to_learn`, which every row plays from the next `reset` on."""
        task = self.tasks_to_learn[self._task_generator.integers(len(self.tasks_to_learn))]
        self.set_tasks([task] * self.batch_size)
        return task

    def sample_tasks(self) -> tuple[Task, ...]:
        """Draws a task for every row, from the next `reset` on; all differ where there are enough.

        The rows' tasks are returned in the order of the rows.
        """
        count = len(self.tasks_to_learn)
        chosen = self._task_generator.choice(count, self.batch_size, count < self.batch_size)
        tasks = tuple(self.tasks_to_learn[i] for i in chosen)
        self.set_tasks(tasks)
        return tasks


class RowInfo(Sequence[dict[str, Any]]):
    """What the rows of a `SameStepVectorEnv` reported, a dict a row that is made when it is read."""

    def __init__(self, info: dict[str, Any], batch_size: int) -> None:
        self._info = info
        self._batch_size = batch_size

    def __len__(self) -> int:
        return self._batch_size

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        info, all_rows = self._info, [True] * len(self)  # a subclass may report without masks
        if "final_info" in info and info["_final_info"][i]:
            info = info["final_info"]
        return {
            key: value[i]
            for key, value in info.items()
            if not key.startswith(("_", "final_")) and info.get(f"_{key}", all_rows)[i]
        }


_RETURNED = {
    "step": ("observation", "reward", "terminated", "truncated", "info"),
    "reset": ("observation", "info"),
}
_SYNC_METHODS = ("reset", "step", "render", "_add_info")  # what stepping row by row replaces
_WIDE_DTYPES = tuple(map(np.dtype, ("float64", "int64", "uint64", "int32", "uint32")))
_LARGE = 2.0**16  # where neighbours in float32 are 2**-7 apart
_MANY_INPUTS = 1000
_FAR = 10.0  # half a range of actions that a deviation below 1 hardly explores

AnyEnvironment: TypeAlias = (
    Environment | gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any]
)


_IN_ARRAYS: tuple[type[ClassicVectorEnv], ...] = (CartPoleVectorEnv, AcrobotVectorEnv)


def _class_in_arrays(env_name: str) -> type[ClassicVectorEnv] | None:
    """What steps all rows of a family of classic control at once, if this is one."""
    return next((vector for vector in _IN_ARRAYS if vector.unsupported(env_name) is None), None)


def _unsupported(env_name: str, **env_kwargs: Any) -> str | None:
    """Says why none of the vector environments runs this one; `None` if one does."""
    in_arrays = _class_in_arrays(env_name)
    if in_arrays is not None:
        return in_arrays.unsupported(env_name, **env_kwargs)
    return vector_physics.unsupported(env_name, **env_kwargs)


def _check_same_step(env: VectorEnv[Any, Any, Any]) -> None:
    """Raises where rows do not restart in the step in which their episode ends."""
    mode = env.metadata.get("autoreset_mode")
    if getattr(mode, "value", mode) == "SameStep":
        return
    # Other vector environments, as Gymnasium's CartPoleVectorEnv, need not have the choice.
    remedy = (
        "make it with gymnasium.make_vec(id, num_envs, 'sync', "
        "vector_kwargs={'autoreset_mode': AutoresetMode.SAME_STEP})"
    )
    if isinstance(env, VectorWrapper):
        remedy += (
            "; wrappers of observations refuse that mode, so give make_vec their counterparts for "
            "single environments, such as wrappers=[gymnasium.wrappers.NormalizeObservation]"
        )
    raise ValueError(f"env must have autoreset_mode AutoresetMode.SAME_STEP, got {mode}: {remedy}")


def _is_of_unpacking(error: Exception) -> bool:
    """Whether a wrapper of Gymnasium's could not unpack what an environment returned."""
    file = Path(_last_frame(error).filename)
    of_gymnasium = file.is_relative_to(Path(gymnasium.__file__).parent)
    return isinstance(error, ValueError) and "values to unpack" in str(error) and of_gymnasium


def _last_frame(error: Exception) -> traceback.FrameSummary:
    """Where an error was raised."""
    return traceback.extract_tb(error.__traceback__)[-1]


def _add_note(error: Exception, note: str) -> None:
    """`BaseException.add_note`, which Python 3.10 lacks."""
    cast(Any, error).__notes__ = [*getattr(error, "__notes__", []), note]


def _own(info: Any) -> Any:
    """A copy of what an environment reports, which may go on to use its dict and arrays."""
    if isinstance(info, dict):
        return {key: _own(value) for key, value in info.items()}
    return info.copy() if isinstance(info, np.ndarray) else info


def _time_limit(env: gymnasium.Env[Any, Any]) -> TimeLimit[Any, Any]:
    """The wrapper that counts the steps of an episode."""
    wrapped = env
    while isinstance(wrapped, gymnasium.Wrapper):
        if isinstance(wrapped, TimeLimit):
            return wrapped
        wrapped = wrapped.env
    raise ValueError(f"elapsed needs a time limit of Gymnasium's, which {env} has not")


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer, got {type(seed)}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return int(seed)


def _check_observation_space(env_name: str, space: spaces.Space[Any]) -> spaces.Box:
    if isinstance(space, spaces.Box):
        return space
    raise ValueError(
        f"{env_name}: observation space must be a Box, got {space}; "
        "gymnasium.wrappers.FlattenObservation turns most spaces into one"
    )


def _check_action_space(env_name: str, space: spaces.Space[Any]) -> spaces.Box | spaces.Discrete:
    if isinstance(space, spaces.Discrete) and space.start == 0:
        return space
    if isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f":
        return space
    raise ValueError(
        f"{env_name}: action space must be a one-dimensional floating Box or a Discrete that "
        f"starts at 0, got {space}"
    )
