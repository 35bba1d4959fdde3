"""The tab Watch: a video of the policy at play, rendered off-screen in a child process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

import ssm_fast
from ssm_fast.app.adapting import USUAL_TASK, place
from ssm_fast.app.jobs import Note, Send
from ssm_fast.app.status import Status, View, with_errors_as_sentences
from ssm_fast.app.visitors import StoredPolicy, Visitor
from ssm_fast.cli.environments import FAMILY_OF, route_mujoco_warnings
from ssm_fast.cli.messages import check_option
from ssm_fast.env_runner import Environment, Task, get_family

KIND = "watching"
MOST_STEPS = 1000
NO_OPENGL = (
    "MuJoCo found no OpenGL that draws without a screen. Install EGL or OSMesa and start the app "
    "again: on Debian and Ubuntu `apt-get install libegl1 libgl1-mesa-dri` or `apt-get install "
    "libosmesa6`; MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses one."
)
_FRAMES_BETWEEN_MESSAGES = 10
_SIZE = {"width": 480, "height": 360}  # of MuJoCo's frames


@dataclass(frozen=True)
class WatchView(View):
    """What the tab shows.

    Attributes:
        video: The file.
    """

    video: Path | None = None


@dataclass(frozen=True)
class _NoOpenGL:
    reason: str


@dataclass(frozen=True)
class _Played:
    steps: int
    episode_return: float
    has_ended: bool


@with_errors_as_sentences(WatchView)
def watch(
    visitor: Visitor, name: str | None, task: str, steps: int, seed: int, deterministic: bool
) -> Iterator[WatchView]:
    """Films an episode of a policy of a visitor's.

    Args:
        visitor: Who has the policy.
        name: Of the policy.
        task: One of `adapting.task_choices`.
        steps: The film ends after so many, at the latest.
        seed: Of the environment and the actions.
        deterministic: Play the mode of the policy, not samples.
    """
    policy = visitor.policy(name)
    check_option("steps", steps, 1, MOST_STEPS)
    check_option("seed", seed, 0, 2**31 - 1)
    view = WatchView(Status("Starting ...", "busy", 0.0))
    yield view
    video = visitor.new_folder(KIND) / f"{policy.path.stem}.mp4"
    for backend in _backends(policy.env_id):
        environment = {"SDL_VIDEODRIVER": "dummy"} | ({"MUJOCO_GL": backend} if backend else {})
        job = visitor.start(
            KIND, film, policy, task, steps, seed, deterministic, video, environment=environment
        )
        if job is None:
            yield WatchView(Status("Stopped before it began.", "done"))
            return
        played: _Played | _NoOpenGL | None = None
        notes: list[str] = []
        try:
            for batch in job.batches():
                for message in batch:
                    if isinstance(message, int):
                        text = f"{message} of at most {steps} steps."
                        view = WatchView(Status(text, "busy", message / steps))
                    elif isinstance(message, Note):
                        notes.append(message.text)
                    else:
                        played = message
                yield view
        finally:
            visitor.end(KIND)
        if not isinstance(played, _NoOpenGL):
            break
        missing = played.reason
    else:
        raise ValueError(f"{NO_OPENGL} ({missing})")
    if played is None:
        yield replace(view, status=Status("Stopped.", "done"))
        return
    end = "the whole episode" if played.has_ended else "where the film ends"
    where = place(task, policy.env_id)
    text = f"Return {played.episode_return:.1f} after {played.steps} steps, {end}, in {where}."
    yield WatchView(Status(text, "done", notes=tuple(notes)), video)


def film(
    send: Send,
    policy: StoredPolicy,
    task: str,
    steps: int,
    seed: int,
    deterministic: bool,
    video: Path,
) -> None:
    """Plays an episode and writes its video, in a child process; arguments as for `watch`.

    It sends the number of steps now and then, and at last what came of it.
    """
    import imageio_ffmpeg

    env_id, chosen = _environment_and_task(policy.env_id, task)
    torch.manual_seed(seed)
    player = ssm_fast.load_policy(policy.path)
    single = _drawn(env_id)
    if isinstance(single, _NoOpenGL):
        send(single)
        return
    with Environment.wrap(single) as env:
        if chosen is not None:
            env.set_tasks([chosen])
        observation, _ = env.reset(seed=seed)
        frame = env.render()[0]  # [height, width, 3]
        writer = imageio_ffmpeg.write_frames(
            str(video),
            (frame.shape[1], frame.shape[0]),
            fps=single.metadata.get("render_fps") or 30,
            codec="libx264",
            macro_block_size=2,
            output_params=["-movflags", "+faststart"],  # plays before all of it has come
        )
        with closing(writer):
            writer.send(None)
            writer.send(np.ascontiguousarray(frame))
            state, start, total, ended = None, np.ones(1, dtype=np.bool_), 0.0, False
            for step in range(1, steps + 1):
                action, state = player.predict(observation, state, start, deterministic)
                observation, reward, terminated, truncated, _ = env.step(action)
                total += float(reward[0])
                start = terminated | truncated
                ended = bool(start[0])
                if ended:  # the row is in its next episode already
                    break
                writer.send(np.ascontiguousarray(env.render()[0]))
                if step % _FRAMES_BETWEEN_MESSAGES == 0:
                    send(step)
    send(_Played(step, total, ended))


def _backends(env_id: str) -> list[str | None]:
    """What to try as MUJOCO_GL; None leaves it as it is."""
    if not _is_mujoco(env_id) or "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return [None]
    return ["egl", "osmesa"]


def _is_mujoco(env_id: str) -> bool:
    spec = gymnasium.registry.get(env_id)
    return (
        spec is not None and "mujoco" in str(spec.entry_point) and find_spec("mujoco") is not None
    )


def _environment_and_task(env_id: str, task: str) -> tuple[str, Task | None]:
    if task == USUAL_TASK:
        return env_id, None
    env_id = FAMILY_OF.get(env_id, env_id)
    split, _, number = task.rpartition(" ")
    tasks = getattr(get_family(env_id), f"{split}_tasks", ())
    if not number.isdecimal() or int(number) >= len(tasks):
        raise ValueError(f"there is no task {task!r} in {env_id}")
    chosen: Task = tasks[int(number)]
    return env_id, chosen


def _drawn(env_id: str) -> gymnasium.Env[Any, Any] | _NoOpenGL:
    """The environment, once it has drawn a frame."""
    is_mujoco = _is_mujoco(env_id)
    arguments: dict[str, Any] = _SIZE if is_mujoco else {}
    try:
        route_mujoco_warnings(env_id)
        env = gymnasium.make(env_id, render_mode="rgb_array", **arguments)
        if is_mujoco:
            _set_camera(env.unwrapped)
        env.reset()
        env.render()
    except Exception as error:  # a driver that is missing can raise nearly anything
        if is_mujoco:
            return _NoOpenGL(f"{type(error).__name__}: {error}")
        raise ValueError(f"{env_id} cannot be drawn: {error}") from error
    return env


def _set_camera(env: Any) -> None:
    """Follows the robot, where its model has a camera that does, and leaves shadows out."""
    import mujoco

    # Without a graphics card, shadows take two thirds of the time of a frame.
    env.model.vis.quality.shadowsize = 0
    camera = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    if camera != -1:
        env.mujoco_renderer.camera_id = camera
