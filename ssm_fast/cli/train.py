"""The command `train`."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import ssm_fast
from ssm_fast.checkpoint import write_atomic
from ssm_fast.cli.environments import route_mujoco_warnings
from ssm_fast.cli.evaluate import describe, evaluate_adaptation
from ssm_fast.cli.info import versions
from ssm_fast.cli.messages import check_option, say
from ssm_fast.cli.options import EVALUATION_EPISODES, EVALUATION_SEED, LARGEST_SEED, Train
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
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.meta_rl.run import RunDirectory
from ssm_fast.meta_rl.training_state import load_checkpoint, save_policy

_MOST_THREADS = 1024


def run_training(options: Train) -> None:
    """Trains, or continues to, and evaluates."""
    out = options.out or default_folder(options)
    settings = settings_of(options, out)
    mode, env_id, seed = settings["mode"], settings["env"], settings["seed"]
    route_mujoco_warnings(env_id)
    check_option("threads", settings["threads"], 1, _MOST_THREADS)
    check_option("seed", seed, 0, LARGEST_SEED)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(seed)
    start = time.perf_counter()
    with make_environment(settings) as env:
        try:
            trainer = make_trainer(settings, env)
        except (RuntimeError, OverflowError, MemoryError) as error:  # sizes beyond the memory
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the model of this size cannot be made: {reason}") from error
        total = total_of(settings, env, trainer)
        with RunDirectory(out, resume=options.resume) as run:
            run.write_config({**settings, "versions": versions()})
            say(f"training in {env_id} ({mode}, seed {seed}); run folder {run.path}")
            with _can_be_resumed(run):
                _learn(trainer, env, settings, total, run, options.resume)
            # The weights of the last checkpoint, or newer ones where --episodes ended the run.
            save_policy(run.model_path, trainer, env)
            run.plot_curve(f"{env_id}, {mode}, seed {seed}")
            _report(trainer, env, run, time.perf_counter() - start)


@contextmanager
def _can_be_resumed(run: RunDirectory) -> Iterator[None]:
    """Leaves a run folder that can be used on, whatever ends the training, and says how."""
    try:
        yield
    except ValueError:
        if not run.read_rows():
            run.config_path.unlink()  # nothing was learnt: the folder stays free
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_how_to_resume(run)}") from None
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {_how_to_resume(run)}") from error


def _learn(
    trainer: Trainer,
    env: Environment | TrialEnvironment,
    settings: dict[str, Any],
    total: int,
    run: RunDirectory,
    resume: bool,
) -> None:
    """Runs the trainer up to the limits of the settings."""
    names = [name for name in ("epochs", "episodes", "steps") if settings.get(name) is not None]
    limits = {name: settings[name] for name in names}
    unit, limit = next(iter(limits.items()))
    if isinstance(trainer, PPOTrainer):
        limits.pop("steps", None)  # it stops by itself, after whole rollouts
    done = {"epochs": 0.0, "episodes": 0.0, "steps": 0.0}
    checkpoint = run.latest_checkpoint() if resume else None
    if checkpoint is not None:
        done["episodes"] = _episodes_until(checkpoint.iteration, run)
        load_checkpoint(checkpoint, trainer)
        done["epochs"], done["steps"] = float(trainer.iteration), float(trainer.timesteps)

    def is_done() -> bool:
        return any(done[name] >= limits[name] for name in limits)

    if checkpoint is not None and is_done():
        return
    run.open_tensorboard(purge_step=int(done["steps"]) + 1 if resume else None)
    with show_progress(limit, unit) as show:

        def after_iteration(metrics: dict[str, float]) -> bool:
            done["epochs"] = float(trainer.iteration)
            done["episodes"] += metrics["episodes"]
            done["steps"] = metrics["timesteps"]
            show(done[unit], metrics)
            return not is_done()

        arguments: dict[str, Any] = {"callback": after_iteration, "run": run, "resume": resume}
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
    trainer: Trainer, env: Environment | TrialEnvironment, run: RunDirectory, seconds: float
) -> None:
    """Evaluates what was learnt: for evaluation.json, for TensorBoard, and to be read."""
    if isinstance(trainer, MetaRLTrainer):
        report, lines = evaluate_adaptation(trainer, env)
        means = [row["mean"] for row in report["test_tasks"]]
        scalars = {f"evaluation/return_{k}": x for k, x in enumerate(means) if x is not None}
    else:
        policy = ssm_fast.load_policy(run.model_path)
        result = evaluate(policy, env.env_name, EVALUATION_EPISODES, EVALUATION_SEED)
        report = {
            "deterministic": True,
            "returns": result.returns.tolist(),
            "mean": result.mean,
            "std": result.std,
        }
        scalars = {"evaluation/return": result.mean}
        lines = [describe(env.env_name, result, deterministic=True)]
    run.log_scalars(scalars, trainer.timesteps)
    report |= {
        "env": env.env_name,
        "seed": EVALUATION_SEED,
        "timesteps": trainer.timesteps,
        "seconds": seconds,
    }
    contents = json.dumps(report, indent=2) + "\n"
    write_atomic(run.path / "evaluation.json", lambda path: path.write_text(contents))
    say(f"{trainer.timesteps:,} steps in {seconds:.0f} s; policy {run.model_path}")
    for line in lines:
        say(line)


def _how_to_resume(run: RunDirectory) -> str:
    command = f"ssm-fast train --resume --out {shlex.quote(str(run.path))}"
    env_id = run.read_config()["env"]
    if ":" in env_id:  # never imported on the word of config.json
        command += f" --env {shlex.quote(env_id)}"
    return f"the last checkpoint is intact, continue with: {command}"
