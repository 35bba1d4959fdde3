"""Acrobot with other links and another motor in every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gymnasium.envs.classic_control.acrobot import AcrobotEnv
from numpy.typing import NDArray

from ssm_fast.checks import check_number
from ssm_fast.env_runner.classic_families import ClassicVectorEnv, LogUniformFamily, parameters
from ssm_fast.env_runner.same_step import Outcome
from ssm_fast.env_runner.task_families import PlaysTask, Task, register_family

HORIZON = 500


@dataclass(frozen=True)
class AcrobotTask(Task):
    """Lengths and masses of the links, upper one first, and the motor; Acrobot-v1's by default.

    A link's moment of inertia stays Gymnasium's 1 kg m². Parameters lie in [0.25, 4]: far beyond, the
    steps of Gymnasium's integrator are too long, and it takes for ever to wrap the angles.
    """

    link_length_1: float = 1.0  # m, the centre of mass in the middle
    link_length_2: float = 1.0  # m, likewise
    link_mass_1: float = 1.0  # kg
    link_mass_2: float = 1.0  # kg
    torque: float = 1.0  # N m, of action 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.as_dict().items():
            check_number(name, value, at_least=0.25, at_most=4.0)


class AcrobotFamily(LogUniformFamily[AcrobotTask]):
    """Links and motors around those of Acrobot-v1.

    No motor is reversed, unlike in CartPole's family: where all episodes fail alike, no gradient
    tells the side.
    """

    task_type = AcrobotTask
    default_task = AcrobotTask()
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "link_length_1": (0.7, 1.4),
        "link_length_2": (0.7, 1.4),
        "link_mass_1": (0.5, 2.0),
        "link_mass_2": (0.5, 2.0),
        "torque": (0.6, 2.0),
    }
    beyond = 1.3


ACROBOT = AcrobotFamily("ssm_fast/AcrobotFamily-v0")


class AcrobotFamilyEnv(PlaysTask, AcrobotEnv):
    """Acrobot-v1 with the parameters of a task, which the observation does not tell.

    The goal is Gymnasium's, in the angles: the tip as high as that of links of 1 m would be one
    link above the joint.
    """

    family = ACROBOT

    def __init__(self, task: Task | None = None, **kwargs: Any) -> None:
        AcrobotEnv.__init__(self, **kwargs)
        self.start_with(task)

    def begin_task(self, task: AcrobotTask) -> None:
        """Sets the parameters under Gymnasium's names."""
        self.LINK_LENGTH_1, self.LINK_LENGTH_2 = task.link_length_1, task.link_length_2
        self.LINK_COM_POS_1, self.LINK_COM_POS_2 = task.link_length_1 / 2, task.link_length_2 / 2
        self.LINK_MASS_1, self.LINK_MASS_2 = task.link_mass_1, task.link_mass_2
        self.AVAIL_TORQUE = [-task.torque, 0.0, task.torque]


_ENTRY_POINT = f"{AcrobotFamilyEnv.__module__}:{AcrobotFamilyEnv.__name__}"
register_family(ACROBOT, _ENTRY_POINT, HORIZON)


class AcrobotVectorEnv(ClassicVectorEnv):
    """The family's rows as arrays."""

    kind = "family of Acrobots"
    entry_points = frozenset({_ENTRY_POINT})
    num_actions = 3

    def _take_constants(self, base: Any) -> None:
        self._dt, self._moi = base.dt, base.LINK_MOI
        self._fastest = np.array([[base.MAX_VEL_1], [base.MAX_VEL_2]])  # [2, 1]

    def _begin_tasks(self, tasks: tuple[Task, ...]) -> None:
        self._l1, self._torque = parameters(tasks, "link_length_1"), parameters(tasks, "torque")
        self._m1, self._m2 = parameters(tasks, "link_mass_1"), parameters(tasks, "link_mass_2")
        self._lc1, self._lc2 = self._l1 / 2, parameters(tasks, "link_length_2") / 2

    def _draw_state(self, i: int, generator: np.random.Generator) -> None:
        self._state[:, i] = generator.uniform(low=-0.1, high=0.1, size=(4,)).astype(np.float32)

    def _advance(self, actions: NDArray[Any]) -> Outcome:
        """Follows `AcrobotEnv.step` operation by operation; the state is both angles, both velocities."""
        torque = np.where(actions == 1, 0.0, np.where(actions == 2, self._torque, -self._torque))
        y, dt = self._state, self._dt
        dt2 = dt / 2.0
        k1 = self._derivative(y, torque)
        k2 = self._derivative(y + dt2 * k1, torque)
        k3 = self._derivative(y + dt2 * k2, torque)
        k4 = self._derivative(y + dt * k3, torque)
        y = y + dt / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = y[:2]
        while (angles > np.pi).any() or (angles < -np.pi).any():
            angles = np.where(angles > np.pi, angles - 2 * np.pi, angles)
            angles = np.where(angles < -np.pi, angles + 2 * np.pi, angles)
        velocities = np.clip(y[2:], -self._fastest, self._fastest)
        self._state = np.concatenate((angles, velocities))
        terminated = -np.cos(angles[0]) - np.cos(angles[1] + angles[0]) > 1.0  # [B]
        return self._observation(), np.where(terminated, 0.0, -1.0), terminated, {}

    def _derivative(
        self, state: NDArray[np.float64], torque: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Of the state `[4, B]`: the book's equations, as in `AcrobotEnv._dsdt`."""
        m1, m2, l1, lc1, lc2 = self._m1, self._m2, self._l1, self._lc1, self._lc2
        I1, I2, g = self._moi, self._moi, 9.8
        theta1, theta2, dtheta1, dtheta2 = state
        cos2, sin2 = np.cos(theta2), np.sin(theta2)
        d1 = m1 * lc1**2 + m2 * (l1**2 + lc2**2 + 2 * l1 * lc2 * cos2) + I1 + I2
        d2 = m2 * (lc2**2 + l1 * lc2 * cos2) + I2
        phi2 = m2 * lc2 * g * np.cos(theta1 + theta2 - np.pi / 2.0)
        phi1 = (
            -m2 * l1 * lc2 * dtheta2**2 * sin2
            - 2 * m2 * l1 * lc2 * dtheta2 * dtheta1 * sin2
            + (m1 * lc1 + m2 * l1) * g * np.cos(theta1 - np.pi / 2)
            + phi2
        )
        ddtheta2 = (torque + d2 / d1 * phi1 - m2 * l1 * lc2 * dtheta1**2 * sin2 - phi2) / (
            m2 * lc2**2 + I2 - d2**2 / d1
        )
        ddtheta1 = -(d2 * ddtheta2 + phi1) / d1
        return np.stack((dtheta1, dtheta2, ddtheta1, ddtheta2))

    def _observation(self) -> NDArray[np.float32]:
        (theta1, theta2), velocities = self._state[:2], self._state[2:]
        columns = (np.cos(theta1), np.sin(theta1), np.cos(theta2), np.sin(theta2), *velocities)
        return np.stack(columns, 1).astype(np.float32)  # [B, 6]
