"""The command `train`."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import ssm_fast
from ssm_fast.checkpoint import write_atomic
from ssm_fast.cli.environments import longest_evaluation, route_mujoco_warnings
from ssm_fast.cli.evaluate import describe, evaluate_adaptation, say_adaptation
from ssm_fast.cli.info import versions
from ssm_fast.cli.messages import check_option, say, sentence
from ssm_fast.cli.options import (
    EVALUATION_EPISODES,
    EVALUATION_SEED,
    LARGEST_SEED,
    MOST_THREADS,
    Train,
)
from ssm_fast.cli.progress import show_progress
from ssm_fast.cli.settings import (
    Trainer,
    default_folder,
    make_environment,
    make_trainer,
    settings_of,
    total_of,
)
from ssm_fast.env_runner import Environment, TrialEnvironment, evaluate
from ssm_fast.meta_rl.distributed import LostRank, World
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.meta_rl.run import RunDirectory
from ssm_fast.meta_rl.training_state import load_checkpoint, save_policy


def run_training(options: Train, world: World) -> None:
    """Trains, or continues to, and evaluates; rank 0 alone reads and writes the run folder."""
    out = options.out or default_folder(options)
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one of them")
    settings: dict[str, Any] = {}
    with world.share_errors():
        if world.rank == 0:
            settings = settings_of(options, out)
    settings = world.first(settings)
    mode, env_id, seed = settings["mode"], settings["env"], settings["seed"]
    route_mujoco_warnings(env_id)
    check_option("threads", settings["threads"], 1, MOST_THREADS)
    check_option("seed", seed, 0, LARGEST_SEED)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(seed)
    start = time.perf_counter()
    with ExitStack() as open_things:
        with world.share_errors():
            env: Environment | TrialEnvironment = make_environment(settings, world)
            open_things.callback(env.close)
            trainer = make_trainer(settings, env, world)
        total = total_of(settings, env, trainer)
        run: RunDirectory | None = None
        with world.share_errors():
            if world.rank == 0:
                run = open_things.enter_context(
                    RunDirectory(out, resume=options.resume, overwrite=options.overwrite)
                )
                # First, as it may fail (a full disk): config.json makes the folder a run's.
                say(f"training in {env_id} ({mode}, seed {seed}); run folder {run.path}")
                run.write_config({**settings, "versions": versions()})
        with _can_be_resumed(out, env, trainer, run, world):
            _learn(trainer, env, settings, total, run, options.resume, world)
        if run is not None:
            # The weights of the last checkpoint, or newer ones where --episodes ended the run.
            save_policy(run.model_path, trainer, env)
            run.plot_curve(f"{env_id}, {mode}, seed {seed}")
        _report(trainer, env, run, start)


@contextmanager
def _can_be_resumed(
    out: Path,
    env: Environment | TrialEnvironment,
    trainer: Trainer,
    run: RunDirectory | None,
    world: World,
) -> Iterator[None]:
    """Leaves a run folder that can be used on, whatever ends the training, and says how."""
    try:
        yield
    except KeyboardInterrupt:
        if run is not None and not run.model_path.exists():
            save_policy(
                run.model_path, trainer, env
            )  # the little that it has learnt, for `evaluate`
        raise KeyboardInterrupt(
            f"interrupted; {_how_to_resume(out, env.env_name, run, world)}"
        ) from None
    except (FloatingPointError, LostRank) as error:
        raise type(error)(f"{error}; {_how_to_resume(out, env.env_name, run, world)}") from error
    except Exception as error:  # of the environment's code, too
        if run is not None and not run.has_checkpoints() and not run.read_rows():
            run.config_path.unlink(missing_ok=True)  # nothing was learnt: the folder stays free
        elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            how = _how_to_resume(out, env.env_name, run, world)
            raise OSError(f"{sentence(error)}; {how}") from error
        raise


def _learn(
    trainer: Trainer,
    env: Environment | TrialEnvironment,
    settings: dict[str, Any],
    total: int,
    run: RunDirectory | None,
    resume: bool,
    world: World,
) -> None:
    """Runs the trainer up to the limits of the settings."""
    names = [name for name in ("epochs", "episodes", "steps") if settings.get(name) is not None]
    limits = {name: settings[name] for name in names}
    unit, limit = next(iter(limits.items()))
    if run is not None and len(limits) > 1:
        ends = " or ".join(f"{value:,} {name}" for name, value in limits.items())
        say(f"it ends after {ends}, whatever comes first")
    if isinstance(trainer, PPOTrainer):
        limits.pop("steps", None)  # it stops by itself
    done = {"epochs": 0.0, "episodes": 0.0, "steps": 0.0}
    checkpoint = None
    with world.share_errors():
        if run is not None and resume:
            checkpoint = run.latest_checkpoint()
        if run is not None and checkpoint is not None:
            done["episodes"] = _episodes_until(checkpoint.iteration, run)
            load_checkpoint(checkpoint, trainer)
            run.drop_checkpoints_after(checkpoint.iteration)  # damaged ones, which were named once
            done["epochs"], done["steps"] = float(trainer.iteration), float(trainer.timesteps)
    world.synchronize(trainer)
    if isinstance(trainer, PPOTrainer) and settings["steps"] is None:
        assert isinstance(env, Environment)
        ended = int(world.first(done["episodes"]))
        total = trainer.timesteps_for(env, settings["episodes"], ended)

    def reached() -> str | None:
        return next((name for name in limits if done[name] >= limits[name]), None)

    at_end = world.first(None if checkpoint is None else reached())
    if at_end is not None:
        if run is not None:
            _say_nothing_is_left(done[at_end], limits[at_end], at_end)
        return
    arguments: dict[str, Any] = {"run": run, "resume": resume}
    if run is None:  # rank 0 shows the progress, and ends the training
        _train(trainer, env, total, arguments)
        return
    run.open_tensorboard(purge_step=int(done["steps"]) + 1 if resume else None)
    with show_progress(limit, unit) as show:

        def after_iteration(metrics: dict[str, float]) -> bool:
            done["epochs"] = float(trainer.iteration)
            done["episodes"] += metrics["episodes"]
            done["steps"] = metrics["timesteps"]
            show.iteration(done[unit], metrics)
            return reached() is None

        before = trainer.iteration
        shown = {"callback": after_iteration, "on_step": show.steps}
        _train(trainer, env, total, {**shown, **arguments})
    if trainer.iteration == before:  # PPO stops by itself
        _say_nothing_is_left(done["steps"], settings["steps"], "steps")


def _say_nothing_is_left(done: float, limit: int, unit: str) -> None:
    say(f"nothing is left to train: {done:,.0f} of {limit:,} {unit} are done")


def _train(
    trainer: Trainer,
    env: Environment | TrialEnvironment,
    total: int,
    arguments: dict[str, Any],
) -> None:
    if isinstance(trainer, MetaRLTrainer):
        trainer.train(env, total, **arguments)
    else:
        assert isinstance(env, Environment)
        trainer.train(env, total, **arguments)


def _episodes_until(iteration: int, run: RunDirectory) -> float:
    """How many episodes had ended after so many iterations."""
    rows = [row for row in run.read_rows() if row["iteration"] <= iteration]
    if any("episodes" not in row for row in rows):
        raise ValueError(f"{run.curve_path} lacks the column 'episodes'")
    return sum(row["episodes"] for row in rows)


def _report(
    trainer: Trainer, env: Environment | TrialEnvironment, run: RunDirectory | None, start: float
) -> None:
    """Evaluates what was learnt: for evaluation.json, for TensorBoard, and to be read.

    All ranks adapt to the tasks of a `MetaRLTrainer`; rank 0, which has the run, does the rest.
    """
    seconds = time.perf_counter() - start
    if isinstance(trainer, MetaRLTrainer):
        report = evaluate_adaptation(trainer, env)
        means = [row["mean"] for row in report["test_tasks"]]
        scalars = {f"evaluation/return_{k}": x for k, x in enumerate(means) if x is not None}
    if run is None:
        return
    if not isinstance(trainer, MetaRLTrainer):
        policy = ssm_fast.load_policy(run.model_path)
        limit = longest_evaluation(env)
        result = evaluate(
            policy, env.env_name, EVALUATION_EPISODES, EVALUATION_SEED, max_episode_steps=limit
        )
        report = {
            "deterministic": True,
            "returns": result.returns.tolist(),
            "mean": result.mean,
            "std": result.std,
        }
        scalars = {"evaluation/return": result.mean}
    run.log_scalars(scalars, trainer.timesteps)
    report |= {
        "env": env.env_name,
        "seed": EVALUATION_SEED,
        "timesteps": trainer.timesteps,
        "seconds": seconds,
    }
    contents = json.dumps(report, indent=2) + "\n"
    write_atomic(run.evaluation_path, lambda path: path.write_text(contents))
    policy_path = run.path / run.model_path.name
    say(f"{trainer.timesteps:,} steps in {seconds:.0f} s; policy {policy_path}")
    if isinstance(trainer, MetaRLTrainer):
        say_adaptation(report, env)
    else:
        say(describe(env.env_name, result, deterministic=True))


def _how_to_resume(out: Path, env_id: str, run: RunDirectory | None, world: World) -> str:
    # Of several processes rank 0 alone could tell, and all have to say the same.
    if world.size == 1 and run is not None and not run.has_checkpoints():
        return f"there was no checkpoint yet: ssm-fast train --resume --out {shlex.quote(str(out))} starts afresh"
    command = f"ssm-fast train --resume --out {shlex.quote(str(out))}"
    if ":" in env_id:  # never imported on the word of config.json
        command += f" --env {shlex.quote(env_id)}"
    return f"the last checkpoint is intact, continue with: {command}"
