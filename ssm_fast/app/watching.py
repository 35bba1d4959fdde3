"""The tab Watch: a video of the policy at play, rendered off-screen in a child process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import ssm_fast
from ssm_fast.app.adapting import USUAL_TASK, place
from ssm_fast.app.fields import SEED, Count
from ssm_fast.app.jobs import Note, Send
from ssm_fast.app.status import Status, View, with_errors_as_sentences
from ssm_fast.app.visitors import StoredPolicy, Visitor
from ssm_fast.cli.environments import FAMILY_OF, route_mujoco_warnings
from ssm_fast.env_runner import Task, get_family
from ssm_fast.env_runner.film import NO_OPENGL, Film, NoOpenGL, backends, film

KIND = "watching"
STEPS = Count("Steps at most", 1, 1000)
_STEPS_BETWEEN_MESSAGES = 10


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
    steps, seed = STEPS.checked(steps), SEED.checked(seed)
    view = WatchView(Status("Starting ...", "busy", 0.0))
    yield view
    video = visitor.new_folder(KIND) / f"{policy.path.stem}.mp4"
    for backend in backends(policy.env_id):
        environment = {"SDL_VIDEODRIVER": "dummy"} | ({"MUJOCO_GL": backend} if backend else {})
        job = visitor.start(
            KIND, play, policy, task, steps, seed, deterministic, video, environment=environment
        )
        if job is None:
            yield WatchView(Status("Stopped before it began.", "done"))
            return
        played: Film | _NoOpenGL | None = None
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
        raise ValueError(missing)
    if played is None:
        yield replace(view, status=Status("Stopped.", "done"))
        return
    end = "the whole episode" if played.has_ended else "where the film ends"
    where = place(task, policy.env_id)
    text = f"Return {played.episode_return:.1f} after {played.steps} steps, {end}, in {where}."
    if policy.has_steps and not policy.is_adapted:
        text += " This is before any gradient step: Adapt takes them."
    yield WatchView(Status(text, "done", notes=tuple(notes)), video)


def play(
    send: Send,
    policy: StoredPolicy,
    task: str,
    steps: int,
    seed: int,
    deterministic: bool,
    video: Path,
) -> None:
    """Films an episode in a child process; arguments as for `watch`.

    It sends the number of steps now and then, and at last what came of it.
    """
    env_id, chosen = _environment_and_task(policy.env_id, task)
    torch.manual_seed(seed)
    try:
        route_mujoco_warnings(env_id)
    except (AttributeError, ImportError, OSError, RuntimeError) as error:  # of a driver's import
        send(_NoOpenGL(f"{NO_OPENGL} ({type(error).__name__}: {error})"))
        return

    def tell(step: int) -> None:
        if step % _STEPS_BETWEEN_MESSAGES == 0:
            send(step)

    try:
        played: Film | _NoOpenGL = film(
            ssm_fast.load_policy(policy.path),
            env_id,
            video,
            steps=steps,
            seed=seed,
            deterministic=deterministic,
            task=chosen,
            on_step=tell,
        )
    except NoOpenGL as error:
        played = _NoOpenGL(str(error))
    send(played)


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
