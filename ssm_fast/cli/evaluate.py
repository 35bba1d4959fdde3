"""The command `evaluate`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssm_fast
from ssm_fast.checkpoint import load_inner_rates, read_metadata
from ssm_fast.checks import check_spaces
from ssm_fast.cli.environments import (
    FAMILY_OF,
    environment_of,
    longest_evaluation,
    policy_file,
    refuse_import,
    route_mujoco_warnings,
    say_task,
    say_where_trained,
    stored_task,
    task_of,
)
from ssm_fast.cli.messages import check_option, say, say_table
from ssm_fast.cli.options import EVALUATION_EPISODES, EVALUATION_SEED, LARGEST_SEED, Evaluate
from ssm_fast.cli.settings import make_environment, make_trainer, stored_settings
from ssm_fast.env_runner import (
    Environment,
    Evaluation,
    Task,
    TrialEnvironment,
    evaluate,
    get_family,
)
from ssm_fast.env_runner.film import NoOpenGL, check_film, film, usable_backend
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.run import RunDirectory
from ssm_fast.meta_rl.training_state import load_checkpoint
from ssm_fast.policy import Policy, spaces_of


def run_evaluation(options: Evaluate) -> None:
    """Plays a policy and writes its returns."""
    if options.path.is_dir():
        run = RunDirectory(options.path, read_only=True)
        if run.config_path.exists() and run.read_config().get("mode") == "meta_rl":
            _evaluate_meta_rl(options, run)
            return
    path = policy_file(options.path)
    env_id = environment_of(path, options.env)
    say_where_trained(path, env_id)
    route_mujoco_warnings(env_id)
    torch.set_num_threads(1)
    check_option("seed", options.seed, 0, LARGEST_SEED)
    if not options.deterministic:
        torch.manual_seed(options.seed)
    episodes = EVALUATION_EPISODES if options.episodes is None else options.episodes
    task = stored_task(path, env_id)
    if options.task is not None:
        env_id = FAMILY_OF.get(env_id, env_id)
        task = task_of(env_id, options.split, options.task)
    if task is not None:
        say_task(task)
    if options.video is not None:
        _check_film(options.video, env_id)
    policy = ssm_fast.load_policy(path)
    with Environment(env_id, max_episode_steps=options.max_episode_steps) as env:
        check_spaces(env, *spaces_of(policy.model))
        limit = longest_evaluation(env) or options.max_episode_steps
    result = evaluate(
        policy,
        env_id,
        episodes,
        options.seed,
        options.deterministic,
        limit,
        task=task,
    )
    say(describe(env_id, result, options.deterministic))
    if load_inner_rates(path) and "adapted" not in read_metadata(path):
        say(f"this is before any gradient step; after some: {_adapting(options)}")
    if options.video is not None:
        _film(options, policy, env_id, task)


def _adapting(options: Evaluate) -> str:
    """The command that adapts the policy in the same task."""
    command = ["ssm-fast", "adapt", str(options.path)]
    if options.env is not None:
        command += ["--env", options.env]
    if options.task is not None:
        command += ["--task", str(options.task), "--split", options.split]
    return shlex.join(command)


def _check_film(video: Path, env_id: str) -> None:
    """Raises before anything is played where there will be no film; chooses what draws it."""
    try:
        check_film(video)
        backend = usable_backend(env_id)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'ssm_fast[app]'") from None
    except (ValueError, NoOpenGL) as error:
        raise ValueError(f"--video: {error}") from None
    if backend is not None:
        os.environ["MUJOCO_GL"] = backend
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # of CartPole and the like: no window


def _film(options: Evaluate, policy: Policy, env_id: str, task: Task | None) -> None:
    """Plays an episode from the seed of the first and writes its video."""
    assert options.video is not None
    if not options.deterministic:
        torch.manual_seed(options.seed)
    filmed = film(
        policy,
        env_id,
        options.video,
        seed=options.seed,
        deterministic=options.deterministic,
        task=task,
        max_episode_steps=options.max_episode_steps,
    )
    end = "" if filmed.has_ended else ", where the film ends"
    say(f"{options.video}: return {filmed.episode_return:.1f} after {filmed.steps} steps{end}")


def _evaluate_meta_rl(options: Evaluate, run: RunDirectory) -> None:
    """Adapts to held-out tasks with the inner rates of the run, which its policy's file lacks."""
    settings = stored_settings(run)
    if options.env is not None:
        raise ValueError(f"--env must not be given: {run.path} has tasks of {settings['env']}")
    if options.task is not None:
        raise ValueError(
            f"--task must not be given: {run.path} adapts to all held-out tasks; for one of them: "
            f"ssm-fast adapt {run.path} --task {options.task}"
        )
    if options.episodes is not None:
        raise ValueError(f"--episodes must not be given: {run.path} plays one in each of its rows")
    if options.max_episode_steps is not None:
        raise ValueError(f"--max_episode_steps must not be given: {run.path} plays its own rounds")
    if options.video is not None:
        raise ValueError(
            f"--video must not be given: {run.path} has no policy of one task to film; "
            f"ssm-fast adapt {run.path} --task 0 makes one"
        )
    refuse_import(settings["env"], run.config_path)
    check_option("seed", options.seed, 0, LARGEST_SEED)
    route_mujoco_warnings(settings["env"])
    torch.set_num_threads(1)
    with make_environment(settings) as env:
        trainer = trained_meta_rl(run, settings, env)
        for deterministic in (False, True) if options.deterministic else (False,):
            say_adaptation(evaluate_adaptation(trainer, env, options.seed, deterministic), env)


def trained_meta_rl(
    run: RunDirectory, settings: dict[str, Any], env: Environment | TrialEnvironment
) -> MetaRLTrainer:
    """The trainer of a run as its newest checkpoint left it, to adapt in an environment."""
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise ValueError(f"{run.path} has no checkpoint yet")
    trainer = make_trainer(settings | {"device": "cpu"}, env)
    assert isinstance(trainer, MetaRLTrainer)
    load_checkpoint(checkpoint, trainer)
    return trainer


def evaluate_adaptation(
    trainer: MetaRLTrainer,
    env: Environment | TrialEnvironment,
    seed: int = EVALUATION_SEED,
    deterministic: bool = False,
) -> dict[str, Any]:
    """Returns after each gradient step on held-out tasks.

    The mean leaves out tasks whose policy broke down; these have None.
    """
    family = get_family(env.env_name)
    report: dict[str, Any] = {"deterministic": deterministic}
    for what in ("test_tasks", "out_of_range_tasks"):
        tasks = getattr(family, what)
        if not tasks:  # nothing lies outside a family of two directions
            continue
        steps = 3 if trainer.inner_steps else 0
        returns = trainer.evaluate(env, tasks, steps, seed, deterministic)  # [K + 1, M, R, E]
        of_tasks = returns.mean((2, 3))  # [K + 1, M]
        alive = [~np.isnan(row) for row in of_tasks]  # K + 1 of [M]
        report[what] = [
            {
                "gradient_steps": k,
                "mean": float(row[ok].mean()) if ok.any() else None,
                "std_over_tasks": float(row[ok].std()) if ok.any() else None,
                "mean_of_episodes": returns[k][ok].mean((0, 1)).tolist() if ok.any() else None,
                "tasks": [x if fine else None for x, fine in zip(row.tolist(), ok, strict=True)],
            }
            for k, (row, ok) in enumerate(zip(of_tasks, alive, strict=True))
        ]
    return report


def say_adaptation(report: dict[str, Any], env: Environment | TrialEnvironment) -> None:
    """Writes the tables of `evaluate_adaptation`."""
    for what in ("test_tasks", "out_of_range_tasks"):
        if what not in report:
            continue
        steps = report[what]
        tasks = steps[-1]["tasks"]
        kind = what.replace("_tasks", "").replace("_", " ")
        policy = "deterministic" if report["deterministic"] else "stochastic"
        say(f"{policy} return in {len(tasks)} {kind} tasks of {env.env_name}")
        say_table(
            ("after gradient steps", "mean", "deviation over tasks"),
            (
                (str(k), _figure(row["mean"]), _figure(row["std_over_tasks"]))
                for k, row in enumerate(steps)
            ),
        )
        broken = ", ".join(str(i) for i, x in enumerate(tasks) if x is None)
        if broken:
            say(f"left out, as their policies broke down on the way: tasks {broken}")


def _figure(x: float | None) -> str:
    return "none" if x is None else f"{x:.1f}"


def describe(env_id: str, result: Evaluation, deterministic: bool) -> str:
    """An evaluation in one line."""
    kind = "deterministic" if deterministic else "stochastic"
    return (
        f"{kind} evaluation of {len(result.returns)} episodes of {env_id}: "
        f"return {result.mean:.1f} +- {result.std:.1f} "
        f"(min {result.returns.min():.1f}, median {np.median(result.returns):.1f}, "
        f"max {result.returns.max():.1f})"
    )
