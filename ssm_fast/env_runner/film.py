"""Videos of a policy at play, drawn without a screen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator

from ssm_fast.checks import check_count
from ssm_fast.env_runner.environment import Environment
from ssm_fast.env_runner.evaluation import PredictsActions
from ssm_fast.env_runner.task_families import Task

NO_OPENGL = (
    "MuJoCo found no OpenGL that draws without a screen. Install EGL or OSMesa and start again: "
    "on Debian and Ubuntu `apt-get install libegl1 libgl1-mesa-dri` or `apt-get install "
    "libosmesa6`; MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses one."
)
_SIZE = {"width": 480, "height": 360}  # of MuJoCo's frames


class NoOpenGL(RuntimeError):
    """MuJoCo has nothing to draw with."""


@dataclass(frozen=True)
class Film:
    """What was filmed.

    Attributes:
        steps: How many.
        episode_return: The undiscounted rewards of these.
        has_ended: Whether the episode did.
    """

    steps: int
    episode_return: float
    has_ended: bool


def film(
    policy: PredictsActions,
    env_name: str,
    path: Path,
    *,
    steps: int = 1000,
    seed: int = 0,
    deterministic: bool = True,
    task: Task | None = None,
    max_episode_steps: int | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Film:
    """Plays an episode and writes its video, whole or not at all.

    Args:
        policy: Has stable-baselines3's `predict(obs, state, episode_start, deterministic)`.
        env_name: A Gymnasium id with the render mode `rgb_array`.
        path: The MP4 file, ``*.mp4`` in a folder that exists; what is there is replaced.
        steps: The film ends after so many, at the latest.
        seed: Of the environment.
        deterministic: Handed to `predict`.
        task: What is played, for the id of a `TaskFamily`.
        max_episode_steps: Truncate the episode here; by default where the environment does.
        on_step: Called with the number of steps after each that is in the film.

    Raises:
        NoOpenGL: MuJoCo cannot draw here.
        ValueError: The path is no such file, the environment cannot be drawn, or the policy does not
            fit it.
        ModuleNotFoundError: `imageio_ffmpeg` is not installed.
    """
    import imageio_ffmpeg

    check_count("steps", steps)
    check_film(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.mp4")
    single = _drawn(env_name, max_episode_steps)
    with Environment.wrap(single) as env:
        if task is not None:
            env.set_tasks([task])
        observation, _ = env.reset(seed=seed)
        frame = env.render()[0]  # [height, width, 3]
        writer = imageio_ffmpeg.write_frames(
            str(unfinished),
            (frame.shape[1], frame.shape[0]),
            fps=single.metadata.get("render_fps") or 30,
            codec="libx264",
            macro_block_size=2,
            output_params=["-movflags", "+faststart"],  # plays before all of it has come
        )
        try:
            with closing(writer):
                writer.send(None)
                writer.send(np.ascontiguousarray(frame))
                state, start, total, ended = None, np.ones(1, dtype=np.bool_), 0.0, False
                for step in range(1, steps + 1):
                    action, state = policy.predict(
                        observation, state=state, episode_start=start, deterministic=deterministic
                    )
                    observation, reward, terminated, truncated, _ = env.step(action)
                    total += float(reward[0])
                    start = terminated | truncated
                    ended = bool(start[0])
                    if ended:  # the row is in its next episode already
                        break
                    writer.send(np.ascontiguousarray(env.render()[0]))
                    on_step(step)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return Film(step, total, ended)


def check_film(path: Path) -> None:
    """Raises where no film can be written.

    Raises:
        ValueError: The path is no MP4 file in a folder that exists.
        ModuleNotFoundError: What writes it is not installed.
    """
    if path.suffix != ".mp4" or path.is_dir():
        raise ValueError(f"a film must be an .mp4 file, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")
    if find_spec("imageio_ffmpeg") is None:
        raise ModuleNotFoundError("No module named 'imageio_ffmpeg'", name="imageio_ffmpeg")


def usable_backend(env_name: str) -> str | None:
    """What of `backends` draws on this machine, as tried in a process of its own.

    Raises:
        NoOpenGL: Nothing does.
    """
    reason = ""
    for backend in backends(env_name):
        if backend is None:
            return None
        code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
        environment = os.environ | {"MUJOCO_GL": backend}
        tried = subprocess.run(
            [sys.executable, "-I", "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if tried.returncode == 0:
            return backend
        reason = (tried.stderr.strip().splitlines() or [""])[-1]
    raise NoOpenGL(f"{NO_OPENGL} (MUJOCO_GL={backend}: {reason})")


def backends(env_name: str) -> list[str | None]:
    """What to try as MUJOCO_GL, before the first frame of a process; None leaves it as it is.

    Where it is set already, that alone.
    """
    if not is_mujoco(env_name) or sys.platform != "linux":
        return [None]
    chosen = os.environ.get("MUJOCO_GL")
    return ["egl", "osmesa"] if chosen is None else [chosen]


def is_mujoco(env_name: str) -> bool:
    """Whether an environment is one of Gymnasium's MuJoCo tasks, or derived from one."""
    spec = gymnasium.registry.get(env_name)
    if spec is None or spec.entry_point is None or find_spec("mujoco") is None:
        return False
    try:
        made = (
            spec.entry_point if callable(spec.entry_point) else load_env_creator(spec.entry_point)
        )
    except (gymnasium.error.Error, ImportError, AttributeError, ValueError):
        return False  # an extra is missing, or the entry point is mistyped: gymnasium.make says so
    bases = getattr(made, "__mro__", ())
    return any(base.__module__.startswith("gymnasium.envs.mujoco") for base in bases)


def _drawn(env_name: str, max_episode_steps: int | None) -> gymnasium.Env[Any, Any]:
    """The environment, once it has drawn a frame."""
    has_robot = is_mujoco(env_name)
    arguments: dict[str, Any] = dict(_SIZE) if has_robot else {}
    if max_episode_steps is not None:
        arguments["max_episode_steps"] = max_episode_steps
    try:
        env = gymnasium.make(env_name, render_mode="rgb_array", **arguments)
        if has_robot:
            _set_camera(env.unwrapped)
        env.reset()
        env.render()
    except Exception as error:  # a driver that is missing can raise nearly anything
        if has_robot:
            raise NoOpenGL(f"{NO_OPENGL} ({type(error).__name__}: {error})") from error
        raise ValueError(f"{env_name} cannot be drawn: {error}") from error
    return env


def _set_camera(env: Any) -> None:
    """Follows the robot, where its model has a camera that does, and leaves shadows out."""
    import mujoco

    # Without a graphics card, shadows take two thirds of the time of a frame.
    env.model.vis.quality.shadowsize = 0
    camera = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if camera != -1:
        env.mujoco_renderer.camera_id = camera
