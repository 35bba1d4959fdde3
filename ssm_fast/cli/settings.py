"""What a run is started or continued with, and the environment and trainer that this makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_type_hints

from ssm_fast.checks import check_count
from ssm_fast.cli.environments import FAMILY_OF, refuse_import
from ssm_fast.cli.messages import say
from ssm_fast.cli.options import DEFAULTS, Train
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner import Environment, TrialEnvironment, get_family
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.policy_gradient_trainer import PolicyGradientTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.meta_rl.run import RunDirectory

Trainer: TypeAlias = PolicyGradientTrainer | PPOTrainer | MetaRLTrainer
LIMITS = {
    "policy_gradient": ("episodes", "steps"),
    "improved": ("episodes", "steps"),
    "meta_rl": ("epochs",),
}


def _options_in(function: Callable[..., object]) -> tuple[str, ...]:
    """The arguments of a model or a trainer that are options of the command line."""
    options = {field.name for field in fields(Train)} - {"seed"} | {"learning_rate"}  # --lr
    return tuple(name for name in inspect.signature(function).parameters if name in options)


MODEL_OPTIONS = {
    "policy_gradient": _options_in(StateSpaceModel),
    "improved": _options_in(ImprovedSSM),
    "meta_rl": _options_in(ImprovedSSM),
}
TRAINER_OPTIONS = {
    "policy_gradient": _options_in(PolicyGradientTrainer),
    "improved": _options_in(PPOTrainer),
    "meta_rl": _options_in(MetaRLTrainer),
}


def default_folder(options: Train) -> Path:
    """The run folder where none is named."""
    mode = options.mode or "improved"
    env_id = options.env or DEFAULTS[mode]["env"]
    name = env_id.replace("/", "_").replace(":", "_")
    return Path("runs") / f"{mode}-{name}-seed{options.seed or 0}"


def settings_of(options: Train, out: Path) -> dict[str, Any]:
    """What the run is started or continued with: `mode`, and the options of that mode."""
    given = {
        name: value
        for name, value in asdict(options).items()
        if value is not None and name not in ("out", "resume")
    }
    if options.resume:
        run = RunDirectory(out, resume=True)
        if run.config_path.exists():
            stored = stored_settings(run)
            if "env" not in given:
                refuse_import(stored["env"], run.config_path)
            return _continued(_in_terms_of(stored["mode"], given), stored, run)
        say(f"{out} holds no run yet: starting one")
    mode = given.get("mode", "improved")
    settings: dict[str, Any] = {"mode": mode, **dict.fromkeys(_options_of(mode)), **DEFAULTS[mode]}
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
    if mode == "meta_rl" and meant.get("env") in FAMILY_OF:
        meant["env"] = FAMILY_OF[meant["env"]]
    return meant


def _continued(given: dict[str, Any], stored: dict[str, Any], run: RunDirectory) -> dict[str, Any]:
    """The settings of the run, with as many steps or episodes as are asked for now."""
    for name, value in given.items():
        if name in LIMITS[stored["mode"]]:
            stored[name] = value
        elif stored.get(name) != value:
            option = "lr" if name == "learning_rate" else name
            raise ValueError(
                f"--{option} must be {stored.get(name)} as in the run in {run.path}, got {value}"
            )
    return stored


def stored_settings(run: RunDirectory) -> dict[str, Any]:
    """The settings in config.json, checked."""
    stored = run.read_config()
    mode = stored.get("mode")
    if not isinstance(mode, str) or mode not in DEFAULTS:
        raise ValueError(f"{run.config_path}: mode must be one of {list(DEFAULTS)}, got {mode!r}")
    stored.setdefault("threads", 1)  # not in the runs of older versions
    kinds = get_type_hints(Train)
    kinds["learning_rate"] = kinds["lr"]
    for name in _options_of(mode):
        value, kind = stored.get(name), get_args(kinds[name])[0]
        if value is None and name not in DEFAULTS[mode].keys() - {"episodes", "steps"}:
            continue
        if type(value) is not kind:
            raise ValueError(f"{run.config_path}: {name} must be {kind.__name__}, got {value!r}")
    return {name: stored.get(name) for name in ("mode", *_options_of(mode))}


def _options_of(mode: str) -> tuple[str, ...]:
    shared = ("env", *LIMITS[mode], "seed", "batch_size", "threads")
    trial = ("trial_episodes",) if mode == "meta_rl" else ()
    return shared + trial + MODEL_OPTIONS[mode] + TRAINER_OPTIONS[mode]


def make_environment(settings: dict[str, Any]) -> Environment | TrialEnvironment:
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


def make_trainer(settings: dict[str, Any], env: Environment | TrialEnvironment) -> Trainer:
    """The model and trainer of the settings; what is None is left to their defaults."""

    def chosen(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: settings[name] for name in names if settings[name] is not None}

    mode = settings["mode"]
    if mode == "policy_gradient" and not env.discrete:
        raise ValueError(
            f"--mode policy_gradient needs discrete actions; {env.env_name} has "
            f"{env.single_action_space}: use --mode improved"
        )
    model_options = chosen(MODEL_OPTIONS[mode])
    trainer_options = chosen(TRAINER_OPTIONS[mode]) | {"seed": settings["seed"]}
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


def total_of(
    settings: dict[str, Any], env: Environment | TrialEnvironment, trainer: Trainer
) -> int:
    """What the trainer counts up to: episodes of REINFORCE, steps of PPO, epochs of meta_rl."""
    for name in LIMITS[settings["mode"]]:
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
