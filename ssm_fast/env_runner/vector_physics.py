"""Gymnasium's MuJoCo locomotion tasks with all rows stepped at once, on C++ threads.

`mujoco.batch` keeps every row's integration state, the solver's warm start included, which
`mujoco.rollout` takes but does not return: without it a trajectory leaves Gymnasium's after a step.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from ssm_fast.checks import check_count
from ssm_fast.env_runner.mujoco_families import (
    AntDirTask,
    BodyFamily,
    BodyTask,
    HalfCheetahDirTask,
    HalfCheetahVelTask,
)
from ssm_fast.env_runner.same_step import Info, Outcome, SameStepVectorEnv
from ssm_fast.env_runner.task_families import Task

if TYPE_CHECKING:
    from mujoco import MjModel
    from mujoco.batch import Batch

_Array = NDArray[np.float64]


class MujocoVectorEnv(SameStepVectorEnv, EzPickle):
    """`num_envs` rows of a MuJoCo v5 task, stepped together by `mujoco.batch` on C++ threads.

    Row `i` does what `gymnasium.make(env_name)` does under the same seed and actions, to the last
    bits of the simulation: the same first states, observations, rewards, ends of episodes and
    `info` entries. Rows restart in the step in which their episode ends, as in a `SyncVectorEnv`
    with `AutoresetMode.SAME_STEP`. Results do not depend on the number of threads.

    HalfCheetah, Hopper, Walker2d, Swimmer, Ant and Humanoid v5 are implemented, the task families
    of these robots, and ids that a user registered for these classes; `unsupported` says why
    another id is not.

    As Gymnasium's MuJoCo environments do, one pickles by the arguments that it was made with, its
    models and tasks among them, and not with the states of its rows: a copy has to be reset.

    Args:
        env_name: A registered Gymnasium id.
        num_envs: Number of rows `B`.
        num_threads: Threads of the physics, the caller's among them; `None` takes as many as torch
            (`torch.get_num_threads()`), and more than `B` are never used.
        models: One `mujoco.MjModel` a row, of equal sizes, for rows with bodies of their own; see
            `set_models`.
        tasks: One task a row of the environment's family (`set_tasks`); `None` is its default task
            in every row.
        max_episode_steps: Truncate episodes here; `None` keeps the limit of the registration.
        **env_kwargs: Arguments of the task, for example `forward_reward_weight=2.0`.

    Raises:
        ValueError: `unsupported` gives a reason, or an argument is out of range.
        TypeError: A count is no integer.
    """

    def __init__(
        self,
        env_name: str,
        num_envs: int = 1,
        *,
        num_threads: int | None = None,
        models: Sequence[MjModel] | None = None,
        tasks: Sequence[Task] | None = None,
        max_episode_steps: int | None = None,
        **env_kwargs: Any,
    ) -> None:
        reason = unsupported(env_name, **env_kwargs)
        if reason is not None:
            raise ValueError(f"env_name {env_name!r} has no vector physics: {reason}")
        check_count("num_envs", num_envs)
        if num_threads is None:
            num_threads = torch.get_num_threads()
        check_count("num_threads", num_threads)
        EzPickle.__init__(
            self,
            env_name,
            num_envs,
            num_threads=num_threads,
            models=models,
            tasks=tasks,
            max_episode_steps=max_episode_steps,
            **env_kwargs,
        )
        if max_episode_steps is not None:
            env_kwargs["max_episode_steps"] = max_episode_steps

        # One environment of Gymnasium's tells the model, the spaces and the arguments' defaults.
        env = gymnasium.make(env_name, disable_env_checker=True, **env_kwargs)
        base = cast(Any, env.unwrapped)
        self.model: MjModel = base.model
        self.frame_skip = int(base.frame_skip)
        self.num_threads = min(num_threads, num_envs)
        self._action_shape = (num_envs, *cast(Any, env.action_space).shape)
        self._setup_rows(env, num_envs, tasks)
        assert env.spec is not None
        task = _TASKS[cast(str, env.spec.entry_point)]
        arguments = _arguments(type(base)) | env.spec.kwargs
        env.close()

        from mujoco.batch import Batch

        self._batch: Batch = Batch(
            self.model, num_envs, self.num_threads, persistent=task.reads_contact_forces
        )
        self._ctrl = self._batch.bind("ctrl")  # [B, action_dim], what the simulation reads
        self._task = task(self._batch, self.frame_skip, arguments)
        self._bodies: list[MjModel] | None = None  # what the tasks of a body family edit
        if isinstance(self.family, BodyFamily):
            self._bodies = [copy.copy(self.model) for _ in range(num_envs)]
        if models is not None:
            self.set_models(models)
        else:
            self._give_models([self.model] * num_envs)

    def set_models(self, models: Sequence[MjModel]) -> None:
        """Gives every row a model of its own: masses, friction, actuator gears, time step, ...

        Start from copies of `model` (`copy.copy`) so that all sizes agree. An edited model has to
        be set again. A `reset` is needed before the next `step`.

        Raises:
            ValueError: These are not one model a row, they do not fit, or the tasks of the
                environment's family make the models.
        """
        if self._bodies is not None:
            assert self.family is not None
            raise ValueError(f"the models of {self.family.env_name} follow from its tasks")
        if len(models) != self.num_envs:
            raise ValueError(f"models must have {self.num_envs} entries, got {len(models)}")
        self._give_models(models)
        self._ezpickle_kwargs["models"] = models

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """As in `SameStepVectorEnv`."""
        super().set_tasks(tasks)
        self._ezpickle_kwargs["tasks"] = self._next_tasks

    def _give_models(self, models: Sequence[MjModel]) -> None:
        import mujoco

        try:
            self._batch.set_models(list(models))
        except mujoco.FatalError as error:
            raise ValueError(f"models must have the sizes of `model`: {error}") from error
        self._batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE)
        self._task.set_models(list(models), self._batch.state.copy())
        self._is_reset = False

    def _check_actions(self, actions: NDArray[Any]) -> None:
        if actions.shape != self._action_shape:
            raise ValueError(
                f"actions must have shape [B, action_dim] = {list(self._action_shape)}, "
                f"got {list(actions.shape)}"
            )

    def _advance(self, actions: NDArray[Any]) -> Outcome:
        task = self._task
        task.before_step()
        self._ctrl[:] = actions
        self._batch.step(None, self.frame_skip)
        task.after_step()
        return task.observation(), *task.outcome(actions)

    def _observation(self) -> _Array:
        return self._task.observation()

    def _place(self) -> Info:
        return self._task.place()

    def _draw_state(self, i: int, generator: np.random.Generator) -> None:
        self._task.draw_state(i, generator)

    def _after_restart(self, rows: NDArray[np.intp]) -> None:
        self._batch.forward(rows)
        self._task.after_restart(rows)

    def _begin_tasks(self, tasks: tuple[Task, ...]) -> None:
        if isinstance(self.family, BodyFamily):
            assert self._bodies is not None
            self.family.apply(cast(tuple[BodyTask, ...], tasks), self.model, self._bodies)
            self._give_models(self._bodies)
        else:
            self._task.set_tasks(tasks)

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the threads of the physics."""
        for name in ("_batch", "_task", "_ctrl"):  # the threads end with their last owner
            self.__dict__.pop(name, None)

    def __repr__(self) -> str:
        assert self.spec is not None
        return (
            f"MujocoVectorEnv({self.spec.id!r}, num_envs={self.num_envs}, "
            f"num_threads={self.num_threads})"
        )


def unsupported(env_name: str, **env_kwargs: Any) -> str | None:
    """Says why `MujocoVectorEnv` does not run this environment; `None` if it does."""
    spec = gymnasium.registry.get(env_name)
    if spec is None:
        return "the id is not registered"
    entry_point = spec.entry_point
    if not isinstance(entry_point, str) or entry_point not in _TASKS:
        names = [key.rpartition(":")[2] for key in _TASKS if key.startswith("gymnasium.")]
        names = [name.removesuffix("Env") for name in names]
        return f"only the v5 tasks {', '.join(names)} and their families have it"
    if spec.additional_wrappers:
        return "its registration adds wrappers"
    if not _has_batch():
        return "it needs mujoco.batch, which mujoco 3.17 and later have"
    task_kwargs = {**spec.kwargs, **env_kwargs}
    module, _, name = entry_point.partition(":")
    known = _arguments(getattr(importlib.import_module(module), name))
    foreign = sorted(task_kwargs.keys() - known.keys() - {"max_episode_steps"})
    return f"it does not take {', '.join(foreign)}" if foreign else None


def _has_batch() -> bool:
    try:
        return importlib.util.find_spec("mujoco.batch") is not None
    except ModuleNotFoundError:
        return False


def _arguments(env_class: type) -> dict[str, Any]:
    """The arguments that the task itself defines, with defaults: not those of rendering.

    A family's class hands what it does not name itself on to Gymnasium's.
    """
    from gymnasium.envs.mujoco import MujocoEnv

    arguments: dict[str, Any] = {}
    for cls in env_class.__mro__[: env_class.__mro__.index(MujocoEnv)]:
        if "__init__" in vars(cls):
            for name, parameter in inspect.signature(vars(cls)["__init__"]).parameters.items():
                if parameter.default is not parameter.empty:
                    arguments.setdefault(name, parameter.default)
    arguments.pop("default_camera_config", None)
    return arguments


class _Task(ABC):
    """Observations, rewards and ends of a task, over all rows at once.

    Arithmetic follows the task's class in `gymnasium.envs.mujoco` operation by operation: float32
    actions give a float32 control cost, sums run over the same elements in the same order.
    """

    root_coordinates = 2  # positions that are left out of the observation: x, or x and y
    max_velocity: float | None = None  # bound of the observed velocities
    normal_velocity = False  # first velocities are drawn from a normal distribution
    reads_contact_forces = False

    def __init__(self, batch: Batch, frame_skip: int, arguments: dict[str, Any]) -> None:
        self.batch = batch
        self.frame_skip = frame_skip
        self.arguments = arguments
        self.qpos: _Array = batch.bind("qpos")  # [B, nq], live
        self.qvel: _Array = batch.bind("qvel")  # [B, nv], live
        self.noise = arguments["reset_noise_scale"]
        self.forward_weight = arguments["forward_reward_weight"]
        self.ctrl_weight = arguments["ctrl_cost_weight"]
        hidden = arguments["exclude_current_positions_from_observation"]
        self.observed_qpos = self.qpos[:, self.root_coordinates if hidden else 0 :]

    def set_models(self, models: Sequence[MjModel], initial_state: _Array) -> None:
        self.models = models
        self.initial_state = initial_state  # [B, nstate], after mj_resetData
        self.init_qpos = np.array([model.qpos0 for model in models])  # [B, nq]
        self.dt = np.array([model.opt.timestep for model in models]) * self.frame_skip  # [B]

    def draw_state(self, i: int, generator: np.random.Generator) -> None:
        self.batch.state[i] = self.initial_state[i]
        qpos, qvel = self.qpos[i], self.qvel[i]
        qpos[:] = self.init_qpos[i] + generator.uniform(-self.noise, self.noise, qpos.size)
        if self.normal_velocity:
            qvel += self.noise * generator.standard_normal(qvel.size)
        else:
            qvel += generator.uniform(-self.noise, self.noise, qvel.size)

    def after_restart(self, rows: NDArray[np.intp]) -> None:
        """Called when the rows stand at their first states; most tasks have nothing to do."""
        return

    def set_tasks(self, tasks: Sequence[Any]) -> None:
        """Called before all rows restart with new tasks; reward variants read theirs."""
        return

    def before_step(self) -> None:
        self.position_before = self.position().copy()  # [B] or [B, 2]

    def after_step(self) -> None:
        """Called when the physics has run; most tasks have nothing to do."""
        return

    def position(self) -> _Array:
        """Where the body is, `[B]` (x) or `[B, 2]`: the forward reward is its velocity."""
        return self.qpos[:, 0]

    def observation(self) -> _Array:
        if self.max_velocity is None:
            return np.concatenate((self.observed_qpos, self.qvel), axis=1)
        qvel = np.minimum(np.maximum(self.qvel, -self.max_velocity), self.max_velocity)
        return np.concatenate((self.observed_qpos, qvel), axis=1)

    def ctrl_cost(self, actions: NDArray[Any]) -> NDArray[Any]:
        cost: NDArray[Any] = self.ctrl_weight * np.add.reduce(np.square(actions), axis=1)
        return cost  # [B], of the actions' dtype

    def survival(self, healthy: NDArray[np.bool_]) -> tuple[_Array, NDArray[np.bool_]]:
        """Returns the reward for being healthy `[B]` and `terminated` `[B]`."""
        ends = self.arguments["terminate_when_unhealthy"]
        terminated = ~healthy if ends else np.zeros_like(healthy)
        reward: _Array = healthy * np.float64(self.arguments["healthy_reward"])
        return reward, terminated

    @abstractmethod
    def outcome(self, actions: NDArray[Any]) -> tuple[_Array, NDArray[np.bool_], Info]:
        """Returns the rewards `[B]`, `terminated` `[B]` and the `info` of a step beside `place`."""

    @abstractmethod
    def place(self) -> Info:
        """Returns the `info` of a reset, which is part of the `info` of a step."""


def _between(low: Any, values: _Array, high: Any) -> NDArray[np.bool_]:
    """Which rows of `values` `[B, n]` lie between the bounds in every column."""
    inside: NDArray[np.bool_] = ((low < values) & (values < high)).all(axis=1)
    return inside


class _HalfCheetah(_Task):
    root_coordinates = 1
    normal_velocity = True

    def outcome(self, actions: NDArray[Any]) -> tuple[_Array, NDArray[np.bool_], Info]:
        x_velocity = (self.position() - self.position_before) / self.dt  # [B]
        forward = self.forward_weight * self.progress(x_velocity)
        ctrl_cost = self.ctrl_cost(actions)
        report = {"x_velocity": x_velocity, "reward_forward": forward, "reward_ctrl": -ctrl_cost}
        return forward - ctrl_cost, np.zeros(len(forward), dtype=np.bool_), report

    def progress(self, x_velocity: _Array) -> _Array:
        """What the forward reward weighs, `[B]`."""
        return x_velocity

    def place(self) -> Info:
        return {"x_position": self.qpos[:, 0].copy()}


class _HalfCheetahDir(_HalfCheetah):
    def set_tasks(self, tasks: Sequence[HalfCheetahDirTask]) -> None:
        self.direction = np.array([task.direction for task in tasks])  # [B]

    def progress(self, x_velocity: _Array) -> _Array:
        progress: _Array = self.direction * x_velocity
        return progress


class _HalfCheetahVel(_HalfCheetah):
    def set_tasks(self, tasks: Sequence[HalfCheetahVelTask]) -> None:
        self.velocity = np.array([task.velocity for task in tasks])  # [B]

    def progress(self, x_velocity: _Array) -> _Array:
        progress: _Array = -np.abs(x_velocity - self.velocity)
        return progress


class _Walker2d(_Task):
    root_coordinates = 1
    max_velocity = 10.0

    def __init__(self, batch: Batch, frame_skip: int, arguments: dict[str, Any]) -> None:
        super().__init__(batch, frame_skip, arguments)
        ranges = np.array([arguments["healthy_z_range"], arguments["healthy_angle_range"]])
        self.low, self.high = ranges.T  # [2] each

    def healthy(self) -> NDArray[np.bool_]:
        return _between(self.low, self.qpos[:, 1:3], self.high)

    def outcome(self, actions: NDArray[Any]) -> tuple[_Array, NDArray[np.bool_], Info]:
        x_velocity = (self.position() - self.position_before) / self.dt  # [B]
        forward = self.forward_weight * x_velocity
        survive, terminated = self.survival(self.healthy())
        ctrl_cost = self.ctrl_cost(actions)
        report = {
            "x_velocity": x_velocity,
            "reward_forward": forward,
            "reward_ctrl": -ctrl_cost,
            "reward_survive": survive,
        }
        return forward + survive - ctrl_cost, terminated, report

    def place(self) -> Info:
        return {
            "x_position": self.qpos[:, 0].copy(),
            "z_distance_from_origin": self.qpos[:, 1] - self.init_qpos[:, 1],
        }


class _Hopper(_Walker2d):
    def __init__(self, batch: Batch, frame_skip: int, arguments: dict[str, Any]) -> None:
        super().__init__(batch, frame_skip, arguments)
        low, high = arguments["healthy_state_range"]  # of all but x and z
        others = np.ones(self.qpos.shape[1] + self.qvel.shape[1] - 3)
        self.low = np.append([self.low[0], max(self.low[1], low)], low * others)
        self.high = np.append([self.high[0], min(self.high[1], high)], high * others)

    def healthy(self) -> NDArray[np.bool_]:
        return _between(self.low, np.concatenate((self.qpos[:, 1:], self.qvel), 1), self.high)


class _Swimmer(_Task):
    def position(self) -> _Array:
        return self.qpos[:, :2]

    def velocity(self) -> _Array:
        """Returns the mean velocity over the step `[B, 2]`."""
        velocity: _Array = (self.position() - self.position_before) / self.dt[:, None]
        return velocity

    def outcome(self, actions: NDArray[Any]) -> tuple[_Array, NDArray[np.bool_], Info]:
        velocity = self.velocity()
        forward = self.forward_weight * velocity[:, 0]
        ctrl_cost = self.ctrl_cost(actions)
        report = {
            "x_velocity": velocity[:, 0],
            "y_velocity": velocity[:, 1],
            "reward_forward": forward,
            "reward_ctrl": -ctrl_cost,
        }
        return forward - ctrl_cost, np.zeros(len(forward), dtype=np.bool_), report

    def place(self) -> Info:
        xy = self.qpos[:, :2].copy()  # [B, 2]
        return {
            "x_position": xy[:, 0],
            "y_position": xy[:, 1],
            "distance_from_origin": np.sqrt(xy[:, 0] ** 2 + xy[:, 1] ** 2),
        }


class _Ant(_Swimmer):
    """Contact forces come from `mj_rnePostConstraint`, which a batch does not call by itself.

    Gymnasium calls it after the last substep; a sensor would make MuJoCo call it inside, at the
    first stage of the Runge-Kutta step, with other forces. So every row's data is copied out and
    passed through it: 7 to 10 us a row beside 200 us of physics.
    """

    normal_velocity = True
    reads_contact_forces = True

    def __init__(self, batch: Batch, frame_skip: int, arguments: dict[str, Any]) -> None:
        super().__init__(batch, frame_skip, arguments)
        import mujoco

        self.rne_post_constraint: Callable[..., None] = mujoco.mj_rnePostConstraint
        self.data = mujoco.MjData(batch.model)
        self.contact_forces = np.zeros((batch.nsim, *self.data.cfrc_ext.shape))  # [B, bodies, 6]
        self.bind()

    def bind(self) -> None:
        """Asks the batch for what the task reads beside positions and velocities."""
        body = self.arguments["main_body"]
        xpos: _Array = self.batch.bind("xpos")  # [B, bodies, 3]
        self.main_body = xpos[:, self.batch.model.body(body).id, :2]  # [B, 2]

    def position(self) -> _Array:
        return self.main_body

    def after_restart(self, rows: NDArray[np.intp]) -> None:
        self.contact_forces[rows] = 0.0
        self.bound_contact_forces()

    def after_step(self) -> None:
        forces = self.data.cfrc_ext
        for i, model in enumerate(self.models):
            self.batch.get_data(i, self.data)
            self.rne_post_constraint(model, self.data)
            self.contact_forces[i] = forces
        self.bound_contact_forces()

    def bound_contact_forces(self) -> None:
        low, high = self.arguments["contact_force_range"]
        np.clip(self.contact_forces, low, high, out=self.contact_forces)

    def observation(self) -> _Array:
        parts = [self.observed_qpos, self.qvel]
        if self.arguments["include_cfrc_ext_in_observation"]:
            parts.append(self.contact_forces[:, 1:].reshape(len(self.qpos), -1))
        return np.concatenate(parts, axis=1)

    def healthy(self) -> NDArray[np.bool_]:
        low, high = self.arguments["healthy_z_range"]
        z = self.qpos[:, 2]
        state = np.concatenate((self.qpos, self.qvel), axis=1)
        healthy: NDArray[np.bool_] = np.isfinite(state).all(axis=1) & (low <= z) & (z <= high)
        return healthy

    def progress(self, velocity: _Array) -> _Array:
        """What the forward reward weighs, `[B]`, of the velocity `[B, 2]`."""
        return velocity[:, 0]

    def contact_cost(self) -> _Array:
        forces = self.contact_forces.reshape(len(self.contact_forces), -1)
        cost: _Array = self.arguments["contact_cost_weight"] * np.square(forces).sum(axis=1)
        return cost  # [B]

    def outcome(self, actions: NDArray[Any]) -> tuple[_Array, NDArray[np.bool_], Info]:
        velocity = self.velocity()
        forward = self.progress(velocity) * self.forward_weight
        survive, terminated = self.survival(self.healthy())
        ctrl_cost, contact_cost = self.ctrl_cost(actions), self.contact_cost()
        report = {
            "x_velocity": velocity[:, 0],
            "y_velocity": velocity[:, 1],
            "reward_forward": forward,
            "reward_ctrl": -ctrl_cost,
            "reward_contact": -contact_cost,
            "reward_survive": survive,
        }
        return forward + survive - (ctrl_cost + contact_cost), terminated, report


class _AntDir(_Ant):
    def set_tasks(self, tasks: Sequence[AntDirTask]) -> None:
        self.direction = np.array([task.direction for task in tasks])  # [B, 2]

    def progress(self, velocity: _Array) -> _Array:
        progress: _Array = (velocity * self.direction).sum(axis=1)
        return progress


class _Humanoid(_Ant):
    normal_velocity = False

    def bind(self) -> None:
        bind = self.batch.bind
        self.xipos = bind("xipos")  # [B, bodies, 3]
        self.tendons = {
            "tendon_length": bind("ten_length"),
            "tendon_velocity": bind("ten_velocity"),
        }
        self.parts = [self.observed_qpos, self.qvel]
        for name, first in (("cinert", 1), ("cvel", 1), ("qfrc_actuator", 6)):
            if self.arguments[f"include_{name}_in_observation"] is True:
                self.parts.append(bind(name)[:, first:])
        if self.arguments["include_cfrc_ext_in_observation"] is True:
            self.parts.append(self.contact_forces[:, 1:])

    def set_models(self, models: Sequence[MjModel], initial_state: _Array) -> None:
        super().set_models(models, initial_state)
        self.masses = np.array([model.body_mass for model in models])  # [B, bodies]
        self.total_mass = self.masses.sum(axis=1)[:, None]  # [B, 1]

    def position(self) -> _Array:
        weighted = np.einsum("nb,nbj->nj", self.masses, self.xipos[:, :, :2])
        centre: _Array = weighted / self.total_mass
        return centre  # [B, 2]

    def bound_contact_forces(self) -> None:
        """Humanoid bounds the cost instead."""

    def observation(self) -> _Array:
        B = len(self.qpos)
        return np.concatenate([part.reshape(B, -1) for part in self.parts], axis=1)

    def healthy(self) -> NDArray[np.bool_]:
        low, high = self.arguments["healthy_z_range"]
        return _between(low, self.qpos[:, 2:3], high)

    def ctrl_cost(self, actions: NDArray[Any]) -> NDArray[Any]:
        return super().ctrl_cost(np.asarray(actions, dtype=np.float64))

    def contact_cost(self) -> _Array:
        low, high = self.arguments["contact_cost_range"]
        cost: _Array = np.clip(super().contact_cost(), low, high)
        return cost

    def place(self) -> Info:
        return super().place() | {key: value.copy() for key, value in self.tendons.items()}


class _Positions(_Task):
    """Leaves the velocities out."""

    def observation(self) -> _Array:
        obs: _Array = self.observed_qpos.copy()
        return obs


class _HalfCheetahPositions(_Positions, _HalfCheetah):
    pass


class _Walker2dPositions(_Positions, _Walker2d):
    pass


class _HopperPositions(_Positions, _Hopper):
    pass


_TASKS: dict[str, type[_Task]] = {
    "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv": _HalfCheetah,
    "gymnasium.envs.mujoco.hopper_v5:HopperEnv": _Hopper,
    "gymnasium.envs.mujoco.walker2d_v5:Walker2dEnv": _Walker2d,
    "gymnasium.envs.mujoco.swimmer_v5:SwimmerEnv": _Swimmer,
    "gymnasium.envs.mujoco.ant_v5:AntEnv": _Ant,
    "gymnasium.envs.mujoco.humanoid_v5:HumanoidEnv": _Humanoid,
    "ssm_fast.env_runner.mujoco_family_envs:HalfCheetahDirEnv": _HalfCheetahDir,
    "ssm_fast.env_runner.mujoco_family_envs:HalfCheetahVelEnv": _HalfCheetahVel,
    "ssm_fast.env_runner.mujoco_family_envs:HalfCheetahVel3Env": _HalfCheetahVel,
    "ssm_fast.env_runner.mujoco_family_envs:AntDirEnv": _AntDir,
    "ssm_fast.env_runner.mujoco_family_envs:HalfCheetahBodyEnv": _HalfCheetah,
    "ssm_fast.env_runner.mujoco_family_envs:Walker2dBodyEnv": _Walker2d,
    "ssm_fast.env_runner.positions_envs:HalfCheetahPositionsEnv": _HalfCheetahPositions,
    "ssm_fast.env_runner.positions_envs:HopperPositionsEnv": _HopperPositions,
    "ssm_fast.env_runner.positions_envs:Walker2dPositionsEnv": _Walker2dPositions,
}
