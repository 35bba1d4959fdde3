"""The command line `ssm-fast`: train, evaluate, adapt, info."""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

import torch

import ssm_fast
from ssm_fast import _native

try:
    import gymnasium
    import tyro
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ssm_fast.adaptation import (
        HybridAdaptationConfig,
        HybridAdapter,
        StandardAdaptationConfig,
        StandardAdapter,
        TestTimeAdapter,
    )
    from ssm_fast.adaptation.online import adapt_to_environment, episode_means, play_episodes
    from ssm_fast.checkpoint import load_model, read_metadata, save_model, write_atomic
    from ssm_fast.checks import check_count
    from ssm_fast.core.improved_ssm import ImprovedSSM
    from ssm_fast.core.ssm import StateSpaceModel
    from ssm_fast.env_runner import (
        Environment,
        Evaluation,
        Task,
        TrialEnvironment,
        evaluate,
        get_family,
    )
    from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
    from ssm_fast.meta_rl.policy_gradient_trainer import PolicyGradientTrainer
    from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
    from ssm_fast.meta_rl.run import RunDirectory
    from ssm_fast.meta_rl.training_state import load_checkpoint
except ModuleNotFoundError as error:
    sys.stderr.write(f"ssm-fast: {error.name} is missing: pip install 'ssm_fast[rl]'\n")
    raise SystemExit(2) from None

# Trainers draw their seeds below 2**31: no episode of an evaluation was trained on.
EVALUATION_SEED = 3_000_000_000
_EVALUATION_EPISODES = 10
_LARGEST_SEED = 2**63 - 1  # of torch's generators
_MOST_THREADS = 1024
_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to draw a bar on
Trainer: TypeAlias = "PolicyGradientTrainer | PPOTrainer | MetaRLTrainer"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "policy_gradient": {
        "env": "CartPole-v1",
        "episodes": 1600,
        "batch_size": 16,
        "seed": 0,
        "threads": 1,
    },
    "improved": {
        "env": "HalfCheetah-v5",
        "steps": 1_000_000,
        "batch_size": 8,
        "seed": 0,
        "threads": 1,
    },
    "meta_rl": {
        "env": "ssm_fast/CartPoleFamily-v0",
        "epochs": 40,
        "batch_size": 20,
        "seed": 0,
        "threads": 1,
        "tasks_per_epoch": 8,
        "trial_episodes": 1,
        "state_dim": 64,
        "hidden_dim": 64,
        "num_layers": 1,
    },
}
# Environments of one task that a family varies.
_FAMILY_OF = {
    "CartPole-v1": "ssm_fast/CartPoleFamily-v0",
    "HalfCheetah-v5": "ssm_fast/HalfCheetahBody-v0",
    "Walker2d-v5": "ssm_fast/Walker2dBody-v0",
    "Ant-v5": "ssm_fast/AntDir-v0",
}
_LIMITS = {
    "policy_gradient": ("episodes", "steps"),
    "improved": ("episodes", "steps"),
    "meta_rl": ("epochs",),
}


def _default(text: str, metavar: str) -> Any:
    """Says what an option that is not given comes to, and what it takes."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})", metavar=metavar)


@dataclass(frozen=True)
class Train:
    """Train a policy and evaluate it.

    The run folder receives config.json, checkpoints, TensorBoard events, curve.csv, curve.png,
    policy.safetensors (for `ssm-fast evaluate` and `ssm_fast.load_policy`) and evaluation.json.
    What is not given takes the default of the mode and its trainer, or, with --resume, the value
    that the run was started with.
    """

    mode: Annotated[
        Literal["policy_gradient", "meta_rl", "improved"] | None,
        _default("improved", "{policy_gradient,meta_rl,improved}"),
    ] = None
    """policy_gradient: REINFORCE with StateSpaceModel (discrete actions). improved: recurrent PPO
    with ImprovedSSM (any actions). meta_rl: ImprovedSSM learns to adapt to the tasks of a family,
    by gradient steps (ProMP), in its state (RL^2, --inner_steps 0 --trial_episodes 2) or both."""
    env: Annotated[
        str | None,
        _default(
            "improved: HalfCheetah-v5, policy_gradient: CartPole-v1, "
            "meta_rl: ssm_fast/CartPoleFamily-v0",
            "STR",
        ),
    ] = None
    """Gymnasium id. meta_rl takes CartPole-v1 and the like for the family of tasks around it."""
    epochs: Annotated[int | None, _default("meta_rl: 40", "INT")] = None
    """Stop after so many epochs; meta_rl only."""
    episodes: Annotated[int | None, _default("policy_gradient: 1600", "INT")] = None
    """Stop after so many episodes."""
    steps: Annotated[
        int | None, _default("improved: 1000000, where --episodes is not given", "INT")
    ] = None
    """Stop after so many environment steps."""
    seed: Annotated[int | None, _default("0", "INT")] = None
    """Seed of the weights, the environments and the actions."""
    out: Annotated[Path | None, _default("runs/MODE-ENV-seedSEED", "PATH")] = None
    """Run folder."""
    resume: bool = False
    """Continue the run in the run folder exactly where its last checkpoint left it."""
    threads: Annotated[int | None, _default("1", "INT")] = None
    """Threads of torch and the kernels. These models are too small to gain from more, and where
    another process has the core, more are several times slower."""
    lr: Annotated[float | None, _default("improved: 2e-4, policy_gradient: 5e-3", "FLOAT")] = None
    """Learning rate at the start."""
    gamma: Annotated[float | None, _default("improved: 0.99, policy_gradient: 0.999", "FLOAT")] = (
        None
    )
    """Discount factor."""
    batch_size: Annotated[
        int | None, _default("improved: 8, policy_gradient: 16, meta_rl: 20", "INT")
    ] = None
    """Environments side by side; in meta_rl those of each task, the trajectories of a gradient
    step."""
    state_dim: Annotated[
        int | None, _default("improved, meta_rl: 64, policy_gradient: 32", "INT")
    ] = None
    """Size of the recurrent state."""
    hidden_dim: Annotated[
        int | None, _default("improved: 128, policy_gradient, meta_rl: 64", "INT")
    ] = None
    """Width of the network around it."""
    num_layers: Annotated[int | None, _default("improved: 2, meta_rl: 1", "INT")] = None
    """Layers, each with a state."""
    entropy_coef: Annotated[float | None, _default("0", "FLOAT")] = None
    """Weight of the entropy bonus."""
    max_grad_norm: Annotated[float | None, _default("0.5, meta_rl: 1", "FLOAT")] = None
    """Gradients are scaled down to this norm."""
    anneal_lr: Annotated[bool | None, _default("True", "{True,False}")] = None
    """Decay the learning rate linearly to zero."""
    checkpoint_interval: Annotated[
        int | None, _default("improved: 20, policy_gradient, meta_rl: 10", "INT")
    ] = None
    """Iterations between checkpoints. In improved, all environments are reset there: at least five
    episodes of the time limit lie between two of them."""
    gae_lambda: Annotated[float | None, _default("0.95; improved and meta_rl", "FLOAT")] = None
    """Weight of longer returns in the advantages."""
    clip_epsilon: Annotated[float | None, _default("improved: 0.2, meta_rl: 0.3", "FLOAT")] = None
    """PPO's clipping range."""
    value_coef: Annotated[float | None, _default("0.5; improved only", "FLOAT")] = None
    """Weight of the value loss."""
    ppo_epochs: Annotated[int | None, _default("10; improved only", "INT")] = None
    """Passes over each rollout."""
    mini_batch_size: Annotated[int | None, _default("128; improved only", "INT")] = None
    """Steps in a minibatch."""
    num_steps: Annotated[
        int | None, _default("improved: 2048 over all, meta_rl: the time limit", "INT")
    ] = None
    """Steps of each environment in a rollout, or in a round of meta_rl."""
    sequence_length: Annotated[int | None, _default("at most 8; improved only", "INT")] = None
    """Steps that are learnt from as one sequence."""
    target_kl: Annotated[float | None, _default("none; improved only", "FLOAT")] = None
    """End an update early beyond this KL divergence."""
    tasks_per_epoch: Annotated[int | None, _default("8; meta_rl only", "INT")] = None
    """Tasks of an epoch, which are played and adapted to together."""
    inner_lr: Annotated[float | None, _default("1; meta_rl only", "FLOAT")] = None
    """Length of the gradient steps in a task."""
    outer_lr: Annotated[float | None, _default("1e-3; meta_rl only", "FLOAT")] = None
    """Learning rate of the shared weights at the start; --lr says the same."""
    inner_steps: Annotated[int | None, _default("1; meta_rl only", "INT")] = None
    """Gradient steps in a task, each on episodes of its own."""
    outer_epochs: Annotated[int | None, _default("5; meta_rl only", "INT")] = None
    """Passes of the outer update over an epoch's episodes."""
    tasks_per_minibatch: Annotated[int | None, _default("2; meta_rl only", "INT")] = None
    """Tasks in a minibatch of the outer update."""
    first_order: Annotated[bool | None, _default("False; meta_rl only", "{True,False}")] = None
    """Leave out the derivative of the inner gradients."""
    learn_inner_lr: Annotated[bool | None, _default("False; meta_rl only", "{True,False}")] = None
    """Learn a rate of the inner steps for each weight (Meta-SGD)."""
    trial_episodes: Annotated[int | None, _default("1; meta_rl only", "INT")] = None
    """With 2 or more: episodes of a trial, through which the state is kept; the policy then also
    sees its last action and reward, and where an episode ended."""
    evaluation_interval: Annotated[int | None, _default("10; meta_rl only", "INT")] = None
    """Epochs between evaluations on held-out tasks, which go to curve.csv and TensorBoard."""


def _options_of_call(function: Callable[..., object]) -> tuple[str, ...]:
    """The arguments of a model or a trainer that are options of the command line."""
    options = {field.name for field in fields(Train)} - {"seed"} | {"learning_rate"}  # --lr
    return tuple(name for name in inspect.signature(function).parameters if name in options)


_MODEL_OPTIONS = {
    "policy_gradient": _options_of_call(StateSpaceModel),
    "improved": _options_of_call(ImprovedSSM),
    "meta_rl": _options_of_call(ImprovedSSM),
}
_TRAINER_OPTIONS = {
    "policy_gradient": _options_of_call(PolicyGradientTrainer),
    "improved": _options_of_call(PPOTrainer),
    "meta_rl": _options_of_call(MetaRLTrainer),
}


@dataclass(frozen=True)
class Evaluate:
    """Play a trained policy and print its returns."""

    path: Annotated[Path, tyro.conf.Positional]
    """A policy.safetensors, or a run folder. That of a meta_rl run adapts to held-out tasks."""
    episodes: int = _EVALUATION_EPISODES
    """Number of episodes; a meta_rl run plays one in each of its rows."""
    seed: int = EVALUATION_SEED
    """Seed of the first episode; the next ones count up."""
    env: str | None = None
    """Gymnasium id; by default the one that the policy was trained in."""
    deterministic: bool = True
    """Play the mode of the policy, not samples."""


@dataclass(frozen=True)
class Adapt:
    """Adapt a trained policy to a task while it plays it.

    Prints each episode's return beside that of the policy as it was, from the same first states, and
    then the deterministic returns of both. The adapted policy is written for `ssm-fast evaluate` and
    `ssm_fast.load_policy`.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A policy.safetensors of PPO, or a run folder."""
    env: str | None = None
    """Gymnasium id; by default the one that the policy was trained in."""
    task: int | None = None
    """Number of the task in the task family of the environment; by default what it plays anyway."""
    split: Literal["train", "test", "out_of_range"] = "test"
    """Which tasks of the family --task counts."""
    method: Literal["standard", "hybrid", "test_time"] = "test_time"
    """standard: the last stretch. hybrid: with replay of those before. test_time: value ensemble,
    exploration by uncertainty, step size by difficulty."""
    episodes: int = 5
    """Episodes to adapt in."""
    rows: int = 1
    """Copies of the task that are played side by side and learnt from together."""
    adapt_every: int = 500
    """Steps of every row between two updates."""
    lr: float = 1e-4
    """Learning rate."""
    steps: int = 20
    """Gradient steps of an update; standard and hybrid take as many for the values before it."""
    max_kl: float = 0.03
    """Largest KL divergence of the policy after an update from that before; with test_time, from
    those that acted."""
    max_episode_steps: int | None = None
    """Truncate episodes here; by default where the environment does."""
    seed: int = 0
    """Seed of the environment and of the actions."""
    out: Path = Path("adapted.safetensors")
    """File of the adapted policy."""


@dataclass(frozen=True)
class Info:
    """Print versions, instruction sets, threads and GPUs."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: The arguments; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, 1 when training, an adaptation or an evaluation broke down on NaN or infinity, 2 for a mistake in the
        input, 130 after Ctrl-C.
    """
    options = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "evaluate": Evaluate, "adapt": Adapt, "info": Info},
        prog="ssm-fast",
        description="State-space-model policies: training, evaluation and adaptation.",
        args=args,
    )
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if isinstance(options, Train):
                _train(options)
            elif isinstance(options, Evaluate):
                _evaluate(options)
            elif isinstance(options, Adapt):
                _adapt(options)
            else:
                _info()
        except (ValueError, OSError) as error:
            return _fail(2, _sentence(error))
        except FloatingPointError as error:
            names = {Train: "training", Adapt: "adaptation"}
            stopped = names.get(type(options), "evaluation")
            return _fail(1, f"{stopped} stopped: {_sentence(error)}")
        except KeyboardInterrupt as interrupt:
            return _fail(130, _sentence(interrupt) or "interrupted")
    return 0


# train


def _train(options: Train) -> None:
    """Trains, or continues to, and evaluates."""
    out = options.out or _default_folder(options)
    settings = _settings(options, out)
    mode, env_id, seed = settings["mode"], settings["env"], settings["seed"]
    _route_mujoco_warnings(env_id)
    _check_option("threads", settings["threads"], 1, _MOST_THREADS)
    _check_option("seed", seed, 0, _LARGEST_SEED)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(seed)
    start = time.perf_counter()
    with _environment(settings) as env:
        try:
            trainer = _trainer(settings, env)
        except (RuntimeError, OverflowError, MemoryError) as error:  # sizes beyond the memory
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the model of this size cannot be made: {reason}") from error
        _total(settings, env, trainer)
        with RunDirectory(out, resume=options.resume) as run:
            run.write_config({**settings, "versions": _versions()})
            _say(f"training in {env_id} ({mode}, seed {seed}); run folder {run.path}")
            try:
                _learn(trainer, env, settings, run, options.resume)
            except ValueError:
                if not run.read_rows():
                    run.config_path.unlink()  # nothing was learnt: the folder stays free
                raise
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted; {_how_to_resume(run)}") from None
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {_how_to_resume(run)}") from error
            # The weights of the last checkpoint, or newer ones where --episodes ended the run.
            save_model(run.model_path, trainer.model, env.policy_metadata())
            run.plot_curve(f"{env_id}, {mode}, seed {seed}")
            seconds = time.perf_counter() - start

            if isinstance(trainer, MetaRLTrainer):
                report, lines = _evaluate_adaptation(trainer, env)
                scalars = {
                    f"evaluation/return_{k}": row["mean"]
                    for k, row in enumerate(report["test_tasks"])
                }
            else:
                policy = ssm_fast.load_policy(run.model_path)
                result = evaluate(policy, env_id, _EVALUATION_EPISODES, EVALUATION_SEED)
                report = {
                    "deterministic": True,
                    "returns": result.returns.tolist(),
                    "mean": result.mean,
                    "std": result.std,
                }
                scalars = {"evaluation/return": result.mean}
                lines = [_describe(env_id, result, deterministic=True)]
            run.log_scalars(scalars, trainer.timesteps)
            report |= {
                "env": env_id,
                "seed": EVALUATION_SEED,
                "timesteps": trainer.timesteps,
                "seconds": seconds,
            }
            contents = json.dumps(report, indent=2) + "\n"
            write_atomic(run.path / "evaluation.json", lambda path: path.write_text(contents))
            _say(f"{trainer.timesteps:,} steps in {seconds:.0f} s; policy {run.model_path}")
            for line in lines:
                _say(line)


def _environment(settings: dict[str, Any]) -> Environment | TrialEnvironment:
    """The environments that the run plays in."""
    env_id, rows, seed = settings["env"], settings["batch_size"], settings["seed"]
    if settings["mode"] != "meta_rl":
        return Environment(env_id, rows, seed=seed)
    tasks = settings["tasks_per_epoch"]
    for name, value in (("batch_size", rows), ("tasks_per_epoch", tasks)):
        check_count(f"--{name}", value)
    get_family(env_id)
    env = Environment(env_id, rows * tasks, seed=seed)
    episodes = settings["trial_episodes"]
    return env if episodes == 1 else TrialEnvironment(env, episodes)


def _evaluate_adaptation(
    trainer: MetaRLTrainer,
    env: Environment | TrialEnvironment,
    seed: int = EVALUATION_SEED,
    deterministic: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Returns after each gradient step on held-out tasks: for the report, and to be read."""
    family = get_family(env.env_name)
    report: dict[str, Any] = {"deterministic": deterministic}
    lines = []
    for what in ("test_tasks", "out_of_range_tasks"):
        tasks = getattr(family, what)
        if not tasks:  # nothing lies outside a family of two directions
            continue
        steps = 3 if trainer.inner_steps else 0
        returns = trainer.evaluate(env, tasks, steps, seed, deterministic)  # [K + 1, M, R, E]
        of_tasks = returns.mean((2, 3))  # [K + 1, M]
        report[what] = [
            {
                "gradient_steps": k,
                "mean": float(row.mean()),
                "std_over_tasks": float(row.std()),
                "mean_of_episodes": returns[k].mean((0, 1)).tolist(),
                "tasks": row.tolist(),
            }
            for k, row in enumerate(of_tasks)
        ]
        figures = ", ".join(f"{row.mean():.1f} +- {row.std():.1f}" for row in of_tasks)
        kind = what.replace("_tasks", "").replace("_", " ")
        lines.append(
            f"return in {len(tasks)} {kind} tasks of {env.env_name} after 0, 1, ... gradient "
            f"steps: {figures}"
        )
    return report, lines


def _default_folder(options: Train) -> Path:
    mode = options.mode or "improved"
    env_id = options.env or _DEFAULTS[mode]["env"]
    name = env_id.replace("/", "_").replace(":", "_")
    return Path("runs") / f"{mode}-{name}-seed{options.seed or 0}"


def _settings(options: Train, out: Path) -> dict[str, Any]:
    """What the run is started or continued with: `mode`, and the options of that mode."""
    given = {
        name: value
        for name, value in asdict(options).items()
        if value is not None and name not in ("out", "resume")
    }
    if options.resume:
        run = RunDirectory(out, resume=True)
        if run.config_path.exists():
            stored = _stored_settings(run)
            if "env" not in given:
                _refuse_import(stored["env"], run.config_path)
            return _continued(_in_terms_of(stored["mode"], given), stored, run)
        _say(f"{out} holds no run yet: starting one")
    mode = given.get("mode", "improved")
    settings: dict[str, Any] = {"mode": mode, **dict.fromkeys(_options_of(mode)), **_DEFAULTS[mode]}
    if mode == "improved" and "episodes" in given:
        settings["steps"] = None
    for name in given:
        if name not in settings and name != "lr":
            raise ValueError(f"--{name} is not an option of --mode {mode}")
    settings.update(_in_terms_of(mode, given))
    return settings


def _in_terms_of(mode: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options with the names and values that the mode knows them by."""
    meant = dict(given)
    if "lr" in meant:
        name = "outer_lr" if mode == "meta_rl" else "learning_rate"
        if name in meant:
            raise ValueError("--lr and --outer_lr are the same option: give one of them")
        meant[name] = meant.pop("lr")
    if mode == "meta_rl" and meant.get("env") in _FAMILY_OF:
        meant["env"] = _FAMILY_OF[meant["env"]]
    return meant


def _continued(given: dict[str, Any], stored: dict[str, Any], run: RunDirectory) -> dict[str, Any]:
    """The settings of the run, with as many steps or episodes as are asked for now."""
    for name, value in given.items():
        if name in _LIMITS[stored["mode"]]:
            stored[name] = value
        elif stored.get(name) != value:
            option = "lr" if name == "learning_rate" else name
            raise ValueError(
                f"--{option} must be {stored.get(name)} as in the run in {run.path}, got {value}"
            )
    return stored


def _stored_settings(run: RunDirectory) -> dict[str, Any]:
    """The settings in config.json, checked."""
    stored = run.read_config()
    mode = stored.get("mode")
    if not isinstance(mode, str) or mode not in _DEFAULTS:
        raise ValueError(f"{run.config_path}: mode must be one of {list(_DEFAULTS)}, got {mode!r}")
    stored.setdefault("threads", 1)  # not in the runs of older versions
    kinds = get_type_hints(Train)
    kinds["learning_rate"] = kinds["lr"]
    for name in _options_of(mode):
        value, kind = stored.get(name), get_args(kinds[name])[0]
        if value is None and name not in _DEFAULTS[mode].keys() - {"episodes", "steps"}:
            continue
        if type(value) is not kind:
            raise ValueError(f"{run.config_path}: {name} must be {kind.__name__}, got {value!r}")
    return {name: stored.get(name) for name in ("mode", *_options_of(mode))}


def _options_of(mode: str) -> tuple[str, ...]:
    shared = ("env", *_LIMITS[mode], "seed", "batch_size", "threads")
    trial = ("trial_episodes",) if mode == "meta_rl" else ()
    return shared + trial + _MODEL_OPTIONS[mode] + _TRAINER_OPTIONS[mode]


def _trainer(settings: dict[str, Any], env: Environment | TrialEnvironment) -> Trainer:
    """The model and trainer of the settings; what is None is left to their defaults."""

    def chosen(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: settings[name] for name in names if settings[name] is not None}

    mode = settings["mode"]
    if mode == "policy_gradient" and not env.discrete:
        raise ValueError(
            f"--mode policy_gradient needs discrete actions; {env.env_name} has "
            f"{env.single_action_space}: use --mode improved"
        )
    model_options = chosen(_MODEL_OPTIONS[mode])
    trainer_options = chosen(_TRAINER_OPTIONS[mode]) | {"seed": settings["seed"]}
    if mode == "policy_gradient":
        standard = StateSpaceModel(
            input_dim=env.input_dim, output_dim=env.action_dim, **model_options
        )
        return PolicyGradientTrainer(standard, **trainer_options)
    improved = ImprovedSSM(
        env.input_dim,
        env.action_dim,
        discrete=env.discrete,
        normalize_observations=True,
        **model_options,
    )
    if mode == "meta_rl":
        return MetaRLTrainer(improved, **trainer_options)
    return PPOTrainer(improved, num_threads=None, **trainer_options)


def _total(settings: dict[str, Any], env: Environment | TrialEnvironment, trainer: Trainer) -> int:
    """What the trainer counts up to: episodes of REINFORCE, steps of PPO, epochs of meta_rl."""
    for name in _LIMITS[settings["mode"]]:
        if settings[name] is not None:
            check_count(f"--{name}", settings[name])
    if isinstance(trainer, MetaRLTrainer):
        return int(settings["epochs"])
    assert isinstance(env, Environment)
    episodes, steps = settings["episodes"], settings["steps"]
    if isinstance(trainer, PolicyGradientTrainer):
        if episodes is None:
            raise ValueError("--episodes is needed")
        return int(episodes)
    if steps is not None:
        return int(steps)
    if episodes is None or env.max_episode_steps is None:
        raise ValueError(f"--steps is needed: the episodes of {env.env_name} have no time limit")
    return trainer.timesteps_for(env, episodes)


def _learn(
    trainer: Trainer,
    env: Environment | TrialEnvironment,
    settings: dict[str, Any],
    run: RunDirectory,
    resume: bool,
) -> None:
    """Runs the trainer up to the limits of the settings."""
    total = _total(settings, env, trainer)
    epochs, episodes, steps = (settings.get(name) for name in ("epochs", "episodes", "steps"))
    unit, limit = next(
        (name, settings[name])
        for name in ("epochs", "episodes", "steps")
        if settings.get(name) is not None
    )
    if isinstance(trainer, PPOTrainer):
        steps = None  # it stops by itself, after whole rollouts
    checkpoint = run.latest_checkpoint() if resume else None
    ended, timesteps = 0.0, 0.0
    if checkpoint is not None:
        rows = [row for row in run.read_rows() if row["iteration"] <= checkpoint.iteration]
        if any("episodes" not in row for row in rows):
            raise ValueError(f"{run.curve_path} lacks the column 'episodes'")
        ended = sum(row["episodes"] for row in rows)
        load_checkpoint(checkpoint, trainer)
        timesteps = float(trainer.timesteps)

    def is_done() -> bool:
        return (
            (epochs is not None and trainer.iteration >= epochs)
            or (episodes is not None and ended >= episodes)
            or (steps is not None and timesteps >= steps)
        )

    if checkpoint is not None and is_done():
        return
    run.open_tensorboard(purge_step=int(timesteps) + 1 if resume else None)
    with _progress(limit, unit) as show:

        def after_iteration(metrics: dict[str, float]) -> bool:
            nonlocal ended, timesteps
            ended += metrics["episodes"]
            timesteps = metrics["timesteps"]
            done = {"epochs": trainer.iteration, "episodes": ended, "steps": timesteps}
            show(done[unit], metrics)
            return not is_done()

        options: dict[str, Any] = {"callback": after_iteration, "run": run, "resume": resume}
        if isinstance(trainer, MetaRLTrainer):
            trainer.train(env, total, **options)
        else:
            assert isinstance(env, Environment)
            trainer.train(env, total, **options)


@contextmanager
def _progress(total: int, unit: str) -> Iterator[Callable[[float, dict[str, float]], None]]:
    """Yields a function that shows progress: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def write_line(done: float, metrics: dict[str, float]) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < _SECONDS_BETWEEN_LINES and done < total:
                return
            last = now
            sys.stderr.write(f"{done:,.0f} of {total:,} {unit}, {_figures(metrics)}\n")
            sys.stderr.flush()

        yield write_line
        return

    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        refresh_per_second=4,
    ) as bar:
        task = bar.add_task(unit, total=total, figures="")

        def move_bar(done: float, metrics: dict[str, float]) -> None:
            bar.update(task, completed=min(done, total), figures=_figures(metrics))

        yield move_bar


def _figures(metrics: dict[str, float]) -> str:
    mean = metrics["episode_return"]
    figure = "no episode yet" if math.isnan(mean) else f"return {mean:.1f}"
    return f"{figure}, {metrics['steps_per_second']:,.0f} steps/s"


def _how_to_resume(run: RunDirectory) -> str:
    command = f"ssm-fast train --resume --out {shlex.quote(str(run.path))}"
    env_id = run.read_config()["env"]
    if ":" in env_id:  # never imported on the word of config.json
        command += f" --env {shlex.quote(env_id)}"
    return f"the last checkpoint is intact, continue with: {command}"


# evaluate


def _evaluate(options: Evaluate) -> None:
    if options.path.is_dir():
        run = RunDirectory(options.path, resume=True)
        if run.config_path.exists() and run.read_config().get("mode") == "meta_rl":
            _evaluate_meta_rl(options, run)
            return
    path = options.path / "policy.safetensors" if options.path.is_dir() else options.path
    env_id, metadata = options.env, read_metadata(path)
    _refuse_trials(path, metadata)
    if env_id is None:
        env_id = metadata.get("env_id")
        if env_id is None:
            raise ValueError(f"{path} does not say which environment it is for: give --env")
        _refuse_import(env_id, path)
    _route_mujoco_warnings(env_id)
    torch.set_num_threads(1)
    _check_option("seed", options.seed, 0, _LARGEST_SEED)
    if not options.deterministic:
        torch.manual_seed(options.seed)
    result = evaluate(
        ssm_fast.load_policy(path), env_id, options.episodes, options.seed, options.deterministic
    )
    _say(_describe(env_id, result, options.deterministic))


def _evaluate_meta_rl(options: Evaluate, run: RunDirectory) -> None:
    """Adapts to held-out tasks with the inner rates of the run, which its policy's file lacks."""
    settings = _stored_settings(run)
    if options.env is not None:
        raise ValueError(f"--env must not be given: {run.path} has tasks of {settings['env']}")
    _refuse_import(settings["env"], run.config_path)
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise ValueError(f"{run.path} has no checkpoint yet")
    _check_option("seed", options.seed, 0, _LARGEST_SEED)
    _route_mujoco_warnings(settings["env"])
    torch.set_num_threads(1)
    with _environment(settings) as env:
        trainer = _trainer(settings, env)
        assert isinstance(trainer, MetaRLTrainer)
        load_checkpoint(checkpoint, trainer)
        for line in _evaluate_adaptation(trainer, env, options.seed, options.deterministic)[1]:
            _say(line)


def _describe(env_id: str, result: Evaluation, deterministic: bool) -> str:
    kind = "deterministic" if deterministic else "stochastic"
    return (
        f"{kind} evaluation of {len(result.returns)} episodes of {env_id}: "
        f"return {result.mean:.1f} +- {result.std:.1f} "
        f"(min {result.returns.min():.1f}, max {result.returns.max():.1f})"
    )


# adapt


def _adapt(options: Adapt) -> None:
    path = options.path / "policy.safetensors" if options.path.is_dir() else options.path
    model = load_model(path, ImprovedSSM)
    if options.out.resolve() == path.resolve():
        raise ValueError(f"--out must be another file than {path}")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {options.out.parent}")
    env_id, metadata = options.env, read_metadata(path)
    _refuse_trials(path, metadata)
    if env_id is None:
        env_id = metadata.get("env_id")
        if env_id is None:
            raise ValueError(f"{path} does not say which environment it is for: give --env")
        _refuse_import(env_id, path)
    if options.task is not None:
        env_id = _FAMILY_OF.get(env_id, env_id)
    _check_option("seed", options.seed, 0, EVALUATION_SEED - 1)
    _check_option("rows", options.rows, 1, 2**16)
    _check_option("episodes", options.episodes, 1, 2**31)
    _check_option("adapt_every", options.adapt_every, 1, 2**31)
    _route_mujoco_warnings(env_id)
    torch.set_num_threads(1)
    task = _task(env_id, options)
    tasks = None if task is None else [task] * options.rows
    with Environment(env_id, options.rows, options.max_episode_steps, tasks=tasks) as env:
        if env.max_episode_steps is None:
            raise ValueError(f"--max_episode_steps is needed: {env_id} has no time limit")
        adapter = _adapter(options, model)
        episodes, seed = options.episodes, options.seed
        without = episode_means(play_episodes(model, env, episodes, seed))
        if isinstance(adapter, TestTimeAdapter):
            returns, _ = adapter.adapt_online(env, episodes, options.adapt_every, seed=seed)
        else:
            returns, _ = adapt_to_environment(
                adapter, env, episodes, options.adapt_every, seed=seed
            )
        metadata = env.policy_metadata()
        if task is not None:
            metadata["task"] = json.dumps(task.as_dict())
        save_model(options.out, adapter.model, metadata)
        _say(f"{'episode':>14} {'without':>10} {'adapting':>10}")
        for i, row in enumerate(zip(without, returns, strict=True)):
            _say(f"{i + 1:>14} {row[0]:>10.1f} {row[1]:>10.1f}")
        means = [sum(column) / episodes for column in (without, returns)]
        _say(f"{'mean':>14} {means[0]:>10.1f} {means[1]:>10.1f}")
        played = [
            sum(episode_means(play_episodes(policy, env, episodes, EVALUATION_SEED, True)))
            for policy in (model, adapter.model)
        ]
        _say(f"{'deterministic':>14} {played[0] / episodes:>10.1f} {played[1] / episodes:>10.1f}")
    _say(f"adapted to {env_id} by {options.method}, seed {options.seed}; policy {options.out}")


def _task(env_id: str, options: Adapt) -> Task | None:
    """The task that --task asks for."""
    if options.task is None:
        return None
    tasks = getattr(get_family(env_id), f"{options.split}_tasks")
    if not 0 <= options.task < len(tasks):
        raise ValueError(
            f"--task must lie in [0, {len(tasks)}) of the {options.split} tasks, got {options.task}"
        )
    chosen: Task = tasks[options.task]
    return chosen


def _adapter(options: Adapt, model: ImprovedSSM) -> StandardAdapter:
    if options.method == "test_time":
        return TestTimeAdapter(
            model,
            options.lr,
            options.steps,
            buffer_size=1000 * options.rows,
            max_kl=options.max_kl,
            seed=options.seed,
        )
    shared: dict[str, Any] = {
        "learning_rate": options.lr,
        "num_steps": options.steps,
        "grad_clip_norm": 0.5,
        "trust_region_eps": options.max_kl,
    }
    if options.method == "hybrid":
        return HybridAdapter(model, HybridAdaptationConfig(**shared))
    return StandardAdapter(model, StandardAdaptationConfig(**shared))


# info


def _info() -> None:
    for name, text in _versions().items():
        _say(f"{name:12} {text}")
    _say(f"{'ISA':12} {_native.isa()} (available: {', '.join(_native.available_isas())})")
    _say(f"{'threads':12} {torch.get_num_threads()} of {os.cpu_count()} processors")
    if not torch.cuda.is_available():
        _say(f"{'GPU':12} none")
    for i in range(torch.cuda.device_count()):
        _say(f"{'GPU':12} {torch.cuda.get_device_name(i)}")


def _versions() -> dict[str, str]:
    versions = {"ssm_fast": ssm_fast.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "gymnasium", "mujoco"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


# What the commands share


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fail(code: int, sentence: str) -> int:
    sys.stderr.write(f"ssm-fast: {sentence}\n")
    return code


def _sentence(message: object) -> str:
    return " ".join(str(message).split())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"ssm-fast: warning: {_sentence(message)}\n")


def _check_option(name: str, value: int, at_least: int, at_most: int) -> None:
    check_count(f"--{name}", value, at_least)
    if value > at_most:
        raise ValueError(f"--{name} must be at most {at_most}, got {value}")


def _refuse_import(env_id: str, source: Path) -> None:
    """Gymnasium imports the module of an id like `module:Name-v0`: a file must not ask for it."""
    if ":" in env_id:
        raise ValueError(
            f"{source} names the environment {env_id!r}, which imports a module: "
            "give --env if you trust it"
        )


def _refuse_trials(path: Path, metadata: dict[str, str]) -> None:
    if "trial_episodes" in metadata:
        raise ValueError(
            f"{path} plays trials of {metadata['trial_episodes']} episodes: "
            "evaluate its run folder instead"
        )


def _route_mujoco_warnings(env_id: str) -> None:
    """Keeps MuJoCo from writing MUJOCO_LOG.TXT and from repeating itself for every environment."""
    spec = gymnasium.registry.get(env_id)
    if spec is None or "mujoco" not in str(spec.entry_point) or find_spec("mujoco") is None:
        return
    import mujoco

    seen: set[str] = set()

    def write_once(text: str) -> None:
        if text not in seen and "deprecated" not in text:
            sys.stderr.write(f"MuJoCo: {text}\n")
        seen.add(text)

    mujoco.set_mju_user_warning(write_once)
