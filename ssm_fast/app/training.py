"""The tab Train: a policy learns in a child process, the page follows its curve."""

from __future__ import annotations

import functools
import inspect
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

import ssm_fast
from ssm_fast.app.fields import SEED, Count, Fraction
from ssm_fast.app.jobs import JobError, Note, Send, as_sentence
from ssm_fast.app.status import Status, View, with_errors_as_sentences
from ssm_fast.app.visitors import Visitor
from ssm_fast.cli.environments import FAMILY_OF, route_mujoco_warnings
from ssm_fast.cli.evaluate import describe
from ssm_fast.cli.options import DEFAULTS, EVALUATION_EPISODES, EVALUATION_SEED, Train
from ssm_fast.cli.presets import load_preset, preset_names
from ssm_fast.cli.settings import make_environment, make_trainer, settings_of, total_of
from ssm_fast.core import ImprovedSSM, StateSpaceModel
from ssm_fast.env_runner import evaluate
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.policy_gradient_trainer import PolicyGradientTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.meta_rl.run import RunDirectory
from ssm_fast.meta_rl.training_state import save_policy

Point: TypeAlias = tuple[float, float, str]

KIND = "training"
MODES = {
    "improved": "PPO with a recurrent actor-critic; any actions",
    "policy_gradient": "REINFORCE with the small model; discrete actions",
    "meta_rl": "learns to learn the tasks of a family by gradient steps (ProMP)",
}
UNIT_OF = {"improved": "steps", "policy_gradient": "episodes", "meta_rl": "epochs"}
# Minutes at most. A preset may ask for more: its training can be made as long.
AMOUNT_OF = {"improved": 50_000, "policy_gradient": 800, "meta_rl": 10}
_MOST_OF_A_PRESET = {"improved": 300_000, "policy_gradient": 800, "meta_rl": 20}
ENVIRONMENTS = {
    "improved": [
        "CartPole-v1",
        "Pendulum-v1",
        "InvertedPendulum-v5",
        "HalfCheetah-v5",
        "Hopper-v5",
        "Walker2d-v5",
        "Swimmer-v5",
        "Ant-v5",
    ],
    "policy_gradient": ["CartPole-v1", "Acrobot-v1"],
    "meta_rl": [
        "ssm_fast/CartPoleFamily-v0",
        "ssm_fast/AcrobotFamily-v0",
        "ssm_fast/HalfCheetahDir-v0",
        "ssm_fast/HalfCheetahVel-v0",
        "ssm_fast/HalfCheetahBody-v0",
        "ssm_fast/Walker2dBody-v0",
        "ssm_fast/AntDir-v0",
    ],
}
# With what a visitor may ask of the machine that everybody shares.
AMOUNTS = {
    "steps": Count("Environment steps", 1, 20_000_000),
    "episodes": Count("Episodes", 1, 1_000_000),
    "epochs": Count("Epochs", 1, 10_000),
}
OPTIONS: dict[str, Count | Fraction] = {
    "lr": Fraction("Learning rate", above=0.0),
    "gamma": Fraction("Discount factor", at_least=0.0, at_most=1.0),
    "batch_size": Count("Environments side by side", 1, 64),
    "seed": SEED,
    "state_dim": Count("State size", 1, 256),
    "hidden_dim": Count("Hidden size", 1, 512),
    "num_layers": Count("Layers", 1, 4),
    "tasks_per_epoch": Count("Tasks in an epoch", 1, 16),
    "inner_steps": Count("Gradient steps in a task", 1, 3),
    "inner_lr": Fraction("Their length at the start", at_least=0.0),
}
_MADE_IN: dict[str, tuple[type, type]] = {
    "improved": (PPOTrainer, ImprovedSSM),
    "policy_gradient": (PolicyGradientTrainer, StateSpaceModel),
    "meta_rl": (MetaRLTrainer, ImprovedSSM),
}
ONLY_IN = {"num_layers": ("improved", "meta_rl")} | dict.fromkeys(
    ("tasks_per_epoch", "inner_lr", "inner_steps"), ("meta_rl",)
)

_SECONDS_BETWEEN_SNAPSHOTS = 1.0
_MOST_ITERATIONS = 300  # in a curve


@dataclass(frozen=True)
class Progress:
    """An iteration of the training: how much is done of how much, and the trainer's metrics."""

    done: float
    total: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrainView(View):
    """What the tab shows.

    Attributes:
        curve: Points `(steps, return, name of the line)`.
        policy: Name of the policy that was added at the end.
    """

    curve: tuple[Point, ...] = ()
    policy: str | None = None


@with_errors_as_sentences(TrainView)
def train(visitor: Visitor, mode: str, env_id: str, form: Mapping[str, Any]) -> Iterator[TrainView]:
    """Trains a policy for a visitor.

    Args:
        visitor: Who is to have it.
        mode: One of `MODES`.
        env_id: A Gymnasium id.
        form: The amount and `OPTIONS` by name; what is not there is as in the preset or the mode.
    """
    view = TrainView(Status("Starting ...", "busy", 0.0))
    yield view
    options = options_of(mode, env_id, form)
    folder = visitor.new_folder(KIND)
    job = visitor.start(KIND, learn, options, folder)
    if job is None:
        yield TrainView(Status("Stopped before it began.", "done"))
        return
    curve: list[list[Point]] = []  # of each iteration
    notes: list[str] = []
    progress, result, failure = Progress(0.0, 0, {}), "", ""
    try:
        for batch in job.batches():
            for message in batch:
                if isinstance(message, Progress):
                    progress = message
                    curve.append(_points(progress.metrics))
                elif isinstance(message, Note):
                    notes.append(message.text)
                else:
                    result = message
            text, fraction = _shown(progress, mode), progress.done / max(progress.total, 1)
            status = Status(f"{text}{_time_left(progress)}", "busy", fraction, tuple(notes))
            view = TrainView(status, _thinned(curve))
            yield view
    except JobError as error:
        failure = str(error)
    finally:
        visitor.end(KIND)
    policy_file = folder / "policy.safetensors"
    if not policy_file.exists():
        text = failure or "Stopped before there was anything to keep."
        yield replace(view, status=Status(text, "error" if failure else "done"))
        return
    result = result or _shown(progress, mode)
    status = Status(
        f"{'Stopped' if job.is_stopped else 'Done'}. {result}", "done", None, tuple(notes)
    )
    if failure:
        status = Status(f"{failure} The policy is the one of before.", "error")
    env_id = str(options.env)
    policy = visitor.add_policy(policy_file, f"{mode} {env_id}", env_id, is_new=True)
    yield replace(view, status=status, policy=policy.name)


def options_of(mode: str, env_id: str | None, form: Mapping[str, Any]) -> Train:
    """The options of the command, checked.

    Raises:
        ValueError: The mode is unknown, the id would import a module, or a field is empty or out of
            range.
    """
    if mode not in MODES:
        raise ValueError(f"the mode must be one of {', '.join(MODES)}, got {mode!r}")
    env_id = checked_env_id(env_id)
    if mode == "meta_rl":
        env_id = FAMILY_OF.get(env_id, env_id)
    fields = {UNIT_OF[mode]: AMOUNTS[UNIT_OF[mode]], **OPTIONS}
    given: dict[str, Any] = {
        name: fields[name].checked(value)
        for name, value in form.items()
        if name in fields and mode in ONLY_IN.get(name, MODES)
    }
    given.setdefault(UNIT_OF[mode], amount_of(mode, env_id))
    options: dict[str, Any] = {"mode": mode, "env": env_id, **given}
    return Train(preset=preset_of(mode, env_id), **options)


@functools.cache
def preset_of(mode: str, env_id: str | None) -> str | None:
    """The preset that was measured in an environment, the shortest of several; None without one."""
    if mode == "meta_rl":
        env_id = FAMILY_OF.get(env_id or "", env_id)
    fitting = (x for x in preset_names() if _is_preset_of(x, mode, env_id))
    return next(fitting, None)  # "name" comes before "name-long"


def _is_preset_of(preset: str, mode: str, env_id: str | None) -> bool:
    options = load_preset(preset)
    return (options["mode"], options["env"]) == (mode, env_id)


def amount_of(mode: str, env_id: str | None) -> int:
    """Steps, episodes or epochs that a visitor can wait for."""
    preset = preset_of(mode, env_id)
    if preset is None:
        return AMOUNT_OF[mode]
    return min(int(load_preset(preset)[UNIT_OF[mode]]), _MOST_OF_A_PRESET[mode])


def settings_in_words(mode: str, env_id: str | None) -> str:
    """Where the settings come from, and with which amount they were measured."""
    preset, unit = preset_of(mode, env_id), UNIT_OF[mode]
    if preset is None:
        return "no preset for this environment: defaults of the mode"
    measured = load_preset(preset)[unit]
    less = ": with fewer it learns less" if amount_of(mode, env_id) < measured else ""
    return f"preset {preset}, measured with {measured:,} {unit}{less}"


def default_of(mode: str, env_id: str | None, name: str) -> Any:
    """What an option comes to where it is not given; None if the mode has no such option."""
    if mode not in ONLY_IN.get(name, MODES):
        return None
    preset = preset_of(mode, env_id)
    options = DEFAULTS[mode] | ({} if preset is None else load_preset(preset))
    if name in options:
        return options[name]
    if name == "lr":
        name = "outer_lr" if mode == "meta_rl" else "learning_rate"
    for made in _MADE_IN[mode]:
        parameters = inspect.signature(made).parameters
        if name in parameters:
            return parameters[name].default
    raise KeyError(name)


def checked_env_id(env_id: str | None) -> str:
    """An environment's id that somebody typed, or that a stranger's file names.

    Raises:
        ValueError: It is empty, or Gymnasium would import a module for it, or it cannot be an id.
    """
    env_id = (env_id or "").strip()
    if not env_id:
        raise ValueError("choose an environment, or type the id of one")
    if ":" in env_id:
        raise ValueError(
            f"the id {env_id!r} would import a module, which the app does for nobody: "
            "type the id of a registered environment"
        )
    if not re.fullmatch(r"[\w./-]+", env_id):
        raise ValueError(f"{env_id!r} cannot be the id of an environment")
    return env_id


def learn(send: Send, options: Train, folder: Path) -> None:
    """Trains as the command does, in a child process.

    The policy is written about every second, so that a stop, which ends the process, keeps it.

    Args:
        send: Takes a `Progress` after each iteration, and the evaluation, in words, at last.
        options: Of the command.
        folder: The run folder.
    """
    settings = settings_of(options, folder)
    route_mujoco_warnings(settings["env"])
    torch.manual_seed(settings["seed"])
    with make_environment(settings) as env, RunDirectory(folder) as run:
        trainer = make_trainer(settings, env)
        total = total_of(settings, env, trainer)
        run.write_config(settings)
        done, saved = 0.0, -math.inf

        def after_iteration(metrics: dict[str, float]) -> None:
            nonlocal done, saved
            unit = UNIT_OF[settings["mode"]]
            done = {
                "steps": metrics["timesteps"],
                "episodes": done + metrics["episodes"],
                "epochs": metrics["iteration"],
            }[unit]
            if time.monotonic() - saved > _SECONDS_BETWEEN_SNAPSHOTS:
                save_policy(run.model_path, trainer, env)
                saved = time.monotonic()
            send(Progress(min(done, total), total, metrics))

        arguments: dict[str, Any] = {"callback": after_iteration, "run": run}
        trainer.train(env, total, **arguments)  # type: ignore[arg-type]
        save_policy(run.model_path, trainer, env)
    if isinstance(trainer, MetaRLTrainer):
        last = run.read_rows()[-1]  # the last epoch evaluates
        returns = [f"{x:.1f}" for name, x in last.items() if name.startswith("test_return_")]
        steps = ", ".join(map(str, range(len(returns))))
        send(f"Return in held-out tasks after {steps} gradient steps: {', '.join(returns)}.")
    else:
        policy = ssm_fast.load_policy(run.model_path)
        result = evaluate(policy, env.env_name, EVALUATION_EPISODES, EVALUATION_SEED)
        send(as_sentence(describe(env.env_name, result, deterministic=True)))


def _points(metrics: Mapping[str, float]) -> list[Point]:
    """What an iteration adds to the curve."""
    names = {"episode_return": "return"}
    if "return_0" in metrics:
        names = {"return_0": "before gradient steps", "episode_return": "after them"}
    return [
        (metrics["timesteps"], metrics[key], name)
        for key, name in names.items()
        if math.isfinite(metrics[key])
    ]


def _thinned(curve: list[list[Point]]) -> tuple[Point, ...]:
    """The points of at most `_MOST_ITERATIONS`, the newest among them."""
    every = max(1, math.ceil(len(curve) / _MOST_ITERATIONS))
    return tuple(point for points in curve[(len(curve) - 1) % every :: every] for point in points)


def _shown(progress: Progress, mode: str) -> str:
    """How far the training is, in a sentence."""
    metrics = progress.metrics
    if not metrics:
        return "Starting ..."
    parts = [f"{progress.done:,.0f} of {progress.total:,} {UNIT_OF[mode]}"]
    if math.isfinite(metrics["episode_return"]):
        parts.append(f"return {metrics['episode_return']:.1f}")
    parts.append(f"{metrics['steps_per_second']:,.0f} steps/s")
    return ", ".join(parts) + "."


def _time_left(progress: Progress) -> str:
    if not 0 < progress.done < progress.total:
        return ""
    seconds = progress.metrics["seconds"] * (progress.total - progress.done) / progress.done
    return (
        f" About {seconds:.0f} s to go."
        if seconds < 120
        else f" About {seconds / 60:.0f} min to go."
    )
