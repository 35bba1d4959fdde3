"""The environments that runs and policies ask for."""

from __future__ import annotations

import json
from pathlib import Path

from ssm_fast.checkpoint import read_metadata
from ssm_fast.cli.messages import note, say, say_table
from ssm_fast.env_runner import Environment, Task, TrialEnvironment, evaluation, get_family
from ssm_fast.env_runner.film import is_mujoco

# Environments of one task that a family varies.
FAMILY_OF = {
    "CartPole-v1": "ssm_fast/CartPoleFamily-v0",
    "Acrobot-v1": "ssm_fast/AcrobotFamily-v0",
    "HalfCheetah-v5": "ssm_fast/HalfCheetahBody-v0",
    "Walker2d-v5": "ssm_fast/Walker2dBody-v0",
    "Ant-v5": "ssm_fast/AntDir-v0",
}


def policy_file(path: Path) -> Path:
    """The file of a policy, which may be named by its run folder."""
    file = path / "policy.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise ValueError(f"{path} is no run folder: it holds no policy.safetensors")
    return file


def environment_of(path: Path, env_id: str | None) -> str:
    """The environment that is asked for, or else the one that the policy was trained in."""
    metadata = read_metadata(path)
    if "trial_episodes" in metadata:
        raise ValueError(
            f"{path} plays trials of {metadata['trial_episodes']} episodes: "
            "evaluate its run folder instead"
        )
    if env_id is not None:
        return env_id
    if "env_id" not in metadata:
        raise ValueError(f"{path} does not say which environment it is for: give --env")
    refuse_import(metadata["env_id"], path)
    return metadata["env_id"]


def say_where_trained(path: Path, env_id: str) -> None:
    """Writes where a policy was trained, if that is neither the environment nor its family."""
    trained = read_metadata(path).get("env_id", env_id)
    if FAMILY_OF.get(trained, trained) != FAMILY_OF.get(env_id, env_id):
        say(f"the policy was trained in {trained}")


def longest_evaluation(env: Environment | TrialEnvironment) -> int | None:
    """What `evaluation.longest_evaluation` returns, with a line where it ends the episodes."""
    limit = evaluation.longest_evaluation(env)
    if limit is not None:
        say(f"{env.env_name} has no time limit: the evaluation ends episodes after {limit:,} steps")
    return limit


def task_of(env_id: str, split: str, number: int) -> Task:
    """A task of the sets of a family, by its number."""
    tasks = getattr(get_family(env_id), f"{split}_tasks")
    if not 0 <= number < len(tasks):
        raise ValueError(f"--task must lie in [0, {len(tasks)}) of the {split} tasks, got {number}")
    chosen: Task = tasks[number]
    return chosen


def stored_task(path: Path, env_id: str) -> Task | None:
    """The task that a policy was adapted to, where it is one of the environment's family."""
    metadata = read_metadata(path)
    if "task" not in metadata or metadata.get("env_id") != env_id:
        return None
    try:
        task: Task = get_family(env_id).task_type(**json.loads(metadata["task"]))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} names a task that is none of {env_id}: {error}") from error
    return task


def say_task(task: Task) -> None:
    """Writes the numbers of a task."""
    say("in the task")
    say_table(
        ("", "value"),
        (
            (name, ", ".join(f"{x:.4g}" for x in (value if isinstance(value, tuple) else [value])))
            for name, value in task.as_dict().items()
        ),
    )


def refuse_import(env_id: str, source: Path) -> None:
    """Gymnasium imports the module of an id like `module:Name-v0`: a file must not ask for it."""
    if ":" in env_id:
        raise ValueError(
            f"{source} names the environment {env_id!r}, which imports a module: "
            "give --env if you trust it"
        )


def route_mujoco_warnings(env_id: str) -> None:
    """Keeps MuJoCo from writing MUJOCO_LOG.TXT and from repeating itself for every environment."""
    if not is_mujoco(env_id):
        return
    import mujoco

    seen: set[str] = set()

    def write_once(text: str) -> None:
        if text not in seen and "deprecated" not in text:
            note(f"MuJoCo: {text}")
        seen.add(text)

    mujoco.set_mju_user_warning(write_once)
