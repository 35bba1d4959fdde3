"""Meta-RL's families of MuJoCo tasks: directions, goal velocities, bodies.

The environments stand in `mujoco_family_envs`, which imports MuJoCo, and in `vector_physics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ssm_fast.env_runner.task_families import Task, TaskFamily, register_family

if TYPE_CHECKING:
    from mujoco import MjModel

HORIZON = 200


@dataclass(frozen=True)
class HalfCheetahDirTask(Task):
    """Run forward (`direction` 1) or backward (-1)."""

    direction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.direction) != 1:
            raise ValueError(f"direction must be 1 or -1, got {self.direction}")


@dataclass(frozen=True)
class HalfCheetahVelTask(Task):
    """Run at `velocity` (m/s)."""

    velocity: float


@dataclass(frozen=True)
class AntDirTask(Task):
    """Walk into the direction of `angle` (degrees; 0 is along x)."""

    angle: float

    @property
    def direction(self) -> tuple[float, float]:
        """Unit vector."""
        return math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))


@dataclass(frozen=True)
class BodyTask(Task):
    """Factors on the masses and inertias of the bodies, sliding friction, and joint damping."""

    positive: ClassVar[frozenset[str]] = frozenset({"mass", "friction", "damping"})
    sizes: ClassVar[tuple[int, int, int]]

    mass: tuple[float, ...]  # [7], of the bodies but the world
    friction: tuple[float, ...]  # of the geoms, the floor first
    damping: tuple[float, ...]  # [6], of the joints with a motor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in zip(("mass", "friction", "damping"), self.sizes, strict=True):
            if len(getattr(self, name)) != size:
                raise ValueError(f"{name} must have {size} entries, got {len(getattr(self, name))}")


@dataclass(frozen=True)
class HalfCheetahBodyTask(BodyTask):
    """A HalfCheetah of another build: 7 bodies, 9 geoms, 6 joints."""

    sizes: ClassVar[tuple[int, int, int]] = (7, 9, 6)


@dataclass(frozen=True)
class Walker2dBodyTask(BodyTask):
    """A Walker2d of another build: 7 bodies, 8 geoms, 6 joints."""

    sizes: ClassVar[tuple[int, int, int]] = (7, 8, 6)


class HalfCheetahDirFamily(TaskFamily[HalfCheetahDirTask]):
    """Reward `d v_x - 0.05 |a|^2`: MAML's HalfCheetah-Dir (Finn et al. 2017, section 5.3).

    Its two tasks are training and test set at once, as in the paper, and nothing is out of range.
    """

    task_type = HalfCheetahDirTask
    default_task = HalfCheetahDirTask(1.0)

    def draw(self, generator: np.random.Generator) -> HalfCheetahDirTask:
        """Draws a direction."""
        return self.train_tasks[generator.integers(2)]

    def draw_out_of_range(self, generator: np.random.Generator) -> HalfCheetahDirTask:
        """Raises: there is no third direction in a plane."""
        raise ValueError(f"{self.env_name} has no task out of range")

    @cached_property
    def train_tasks(self) -> tuple[HalfCheetahDirTask, ...]:
        """Forward and backward."""
        return HalfCheetahDirTask(1.0), HalfCheetahDirTask(-1.0)

    @cached_property
    def test_tasks(self) -> tuple[HalfCheetahDirTask, ...]:
        """The same two."""
        return self.train_tasks

    @cached_property
    def out_of_range_tasks(self) -> tuple[HalfCheetahDirTask, ...]:
        """Empty."""
        return ()


class HalfCheetahVelFamily(TaskFamily[HalfCheetahVelTask]):
    """Reward `-|v_x - v| - 0.05 |a|^2` with the goal `v` drawn from `[0, highest]`.

    `highest` is 2 in MAML and 3 in ProMP, PEARL and VariBAD. Out of range are goals up to half as
    fast again.
    """

    task_type = HalfCheetahVelTask

    def __init__(self, env_name: str, highest: float) -> None:
        super().__init__(env_name)
        self.highest = highest
        self.default_task = HalfCheetahVelTask(highest / 2)

    def draw(self, generator: np.random.Generator) -> HalfCheetahVelTask:
        """Draws a goal from `[0, highest]`."""
        return HalfCheetahVelTask(generator.uniform(0.0, self.highest))

    def draw_out_of_range(self, generator: np.random.Generator) -> HalfCheetahVelTask:
        """Draws a goal from `[highest, 1.5 highest]`."""
        return HalfCheetahVelTask(generator.uniform(self.highest, 1.5 * self.highest))


class AntDirFamily(TaskFamily[AntDirTask]):
    """Reward `d v_x - 0.005 |a|^2 - 0.0005 |f|^2 + 0.05`: MAML's Ant-Dir, forward or backward.

    `f` are the contact forces, bounded to [-1, 1]. Training and test set are the two directions of
    the paper; out of range are the six between them.
    """

    task_type = AntDirTask
    default_task = AntDirTask(0.0)

    def draw(self, generator: np.random.Generator) -> AntDirTask:
        """Draws forward or backward."""
        return self.train_tasks[generator.integers(2)]

    def draw_out_of_range(self, generator: np.random.Generator) -> AntDirTask:
        """Draws one of the six other directions."""
        return self.out_of_range_tasks[generator.integers(6)]

    @cached_property
    def train_tasks(self) -> tuple[AntDirTask, ...]:
        """Forward and backward."""
        return AntDirTask(0.0), AntDirTask(180.0)

    @cached_property
    def test_tasks(self) -> tuple[AntDirTask, ...]:
        """The same two."""
        return self.train_tasks

    @cached_property
    def out_of_range_tasks(self) -> tuple[AntDirTask, ...]:
        """The other multiples of 45 degrees."""
        return tuple(AntDirTask(angle) for angle in (45.0, 90.0, 135.0, 225.0, 270.0, 315.0))


BodyTaskT = TypeVar("BodyTaskT", bound=BodyTask)


class BodyFamily(TaskFamily[BodyTaskT]):
    """The v5 task with a body drawn per task.

    Factors are `1.5^u` for masses and friction and `1.3^u` for damping with `u` uniform in
    [-3, 3], each part its own, as in the random-parameter environments of ProMP (Rothfuss et al.
    2019); out of range, `|u|` is in [3, 4]. Inertias go with the mass: another density.
    """

    def __init__(self, env_name: str, task_type: type[BodyTaskT]) -> None:
        super().__init__(env_name)
        self.task_type = task_type
        self.default_task = task_type(*(tuple([1.0] * size) for size in task_type.sizes))

    def draw(self, generator: np.random.Generator) -> BodyTaskT:
        """Draws factors between `base^-3` and `base^3`."""
        return self._draw(lambda size: generator.uniform(-3.0, 3.0, size))

    def draw_out_of_range(self, generator: np.random.Generator) -> BodyTaskT:
        """Draws factors beyond `base^-3` and `base^3`, up to `base^-4` and `base^4`."""

        def exponents(size: int) -> NDArray[np.float64]:
            return generator.choice([-1.0, 1.0], size) * generator.uniform(3.0, 4.0, size)

        return self._draw(exponents)

    def _draw(self, exponents: Callable[[int], NDArray[np.float64]]) -> BodyTaskT:
        bodies, geoms, joints = self.task_type.sizes
        return self.task_type(
            mass=tuple(1.5 ** exponents(bodies)),
            friction=tuple(1.5 ** exponents(geoms)),
            damping=tuple(1.3 ** exponents(joints)),
        )

    def apply(self, tasks: Sequence[BodyTask], nominal: MjModel, models: Sequence[MjModel]) -> None:
        """Makes the models, which are copies of `nominal`, the bodies of the tasks."""
        import mujoco

        data = mujoco.MjData(nominal)  # for mj_setConst to work in
        for task, model in zip(tasks, models, strict=True):
            mass = np.array(task.mass)
            model.body_mass[1:] = nominal.body_mass[1:] * mass
            model.body_inertia[1:] = nominal.body_inertia[1:] * mass[:, None]
            model.geom_friction[:, 0] = nominal.geom_friction[:, 0] * task.friction
            model.dof_damping[-model.nu :] = nominal.dof_damping[-model.nu :] * task.damping
            mujoco.mj_setConst(model, data)


HALF_CHEETAH_DIR = HalfCheetahDirFamily("ssm_fast/HalfCheetahDir-v0")
HALF_CHEETAH_VEL = HalfCheetahVelFamily("ssm_fast/HalfCheetahVel-v0", 2.0)
HALF_CHEETAH_VEL3 = HalfCheetahVelFamily("ssm_fast/HalfCheetahVel3-v0", 3.0)
ANT_DIR = AntDirFamily("ssm_fast/AntDir-v0")
HALF_CHEETAH_BODY = BodyFamily("ssm_fast/HalfCheetahBody-v0", HalfCheetahBodyTask)
WALKER2D_BODY = BodyFamily("ssm_fast/Walker2dBody-v0", Walker2dBodyTask)

for _family, _class in (
    (HALF_CHEETAH_DIR, "HalfCheetahDirEnv"),
    (HALF_CHEETAH_VEL, "HalfCheetahVelEnv"),
    (HALF_CHEETAH_VEL3, "HalfCheetahVel3Env"),
    (ANT_DIR, "AntDirEnv"),
    (HALF_CHEETAH_BODY, "HalfCheetahBodyEnv"),
    (WALKER2D_BODY, "Walker2dBodyEnv"),
):
    register_family(_family, f"ssm_fast.env_runner.mujoco_family_envs:{_class}", HORIZON)
