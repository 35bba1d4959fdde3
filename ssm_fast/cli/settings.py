"""What a run is started or continued with, and the environment and trainer that this makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import torch

from ssm_fast.checks import check_count
from ssm_fast.cli.environments import FAMILY_OF, refuse_import
from ssm_fast.cli.messages import say
from ssm_fast.cli.options import DEFAULTS, Train
from ssm_fast.cli.presets import load_preset
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner import Environment, TrialEnvironment, get_family
from ssm_fast.meta_rl.distributed import World
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.policy_gradient_trainer import PolicyGradientTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.meta_rl.run import RunDirectory
from ssm_fast.meta_rl.training_state import with_current_names

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


_MODELS = {"policy_gradient": StateSpaceModel, "improved": ImprovedSSM, "meta_rl": ImprovedSSM}
_TRAINERS = {
    "policy_gradient": PolicyGradientTrainer,
    "improved": PPOTrainer,
    "meta_rl": MetaRLTrainer,
}
_UNUSED = {"meta_rl": {"critic_dim"}}  # its critic is not trained
MODEL_OPTIONS = {
    mode: tuple(name for name in _options_in(model) if name not in _UNUSED.get(mode, ()))
    for mode, model in _MODELS.items()
}
TRAINER_OPTIONS = {mode: _options_in(trainer) for mode, trainer in _TRAINERS.items()}


def _defaults_of(mode: str) -> dict[str, Any]:
    """What the arguments of the mode's model and trainer are where nobody says anything."""
    pairs = ((_MODELS[mode], MODEL_OPTIONS[mode]), (_TRAINERS[mode], TRAINER_OPTIONS[mode]))
    return {
        name: inspect.signature(function).parameters[name].default
        for function, names in pairs
        for name in names
    }


def default_folder(options: Train) -> Path:
    """The run folder where none is named."""
    mode = options.mode or "improved"
    env_id = options.env or DEFAULTS[mode]["env"]
    env_name = env_id.replace("/", "_").replace(":", "_")
    name = f"{mode}-{env_name}"
    if options.preset is not None:
        name = options.preset
        if not _is_of(load_preset(options.preset), options.env):
            name += f"-{env_name}"
    return Path("runs") / f"{name}-seed{options.seed or 0}"


def settings_of(options: Train, out: Path) -> dict[str, Any]:
    """What the run is started or continued with: `mode`, and the options of that mode."""
    given = {
        name: value
        for name, value in asdict(options).items()
        if value is not None and name not in ("out", "resume", "overwrite", "preset")
    }
    if options.preset is not None:
        given = _with_preset(given, options.preset)
    if options.resume:
        run = RunDirectory(out, read_only=True)
        if run.config_path.exists():
            stored = stored_settings(run)
            if "env" not in given:
                refuse_import(stored["env"], run.config_path)
            return _continued(_in_terms_of(stored["mode"], given), stored, run)
        if not given.keys() & {"mode", "env"}:
            raise ValueError(f"{out} holds no run to resume; to start one, say --mode or --env")
        say(f"{out} holds no run yet: starting one")
    mode = given.get("mode", "improved")
    settings: dict[str, Any] = {
        "mode": mode,
        **dict.fromkeys(_options_of(mode)),
        **_defaults_of(mode),
        **DEFAULTS[mode],
    }
    if mode == "improved" and "episodes" in given:
        settings["steps"] = None
    for name in given:
        if name not in settings and name != "lr":
            raise ValueError(f"--{name} is not an option of --mode {mode}")
    settings.update(_in_terms_of(mode, given))
    return settings


def _with_preset(given: dict[str, Any], preset: str) -> dict[str, Any]:
    """The options of the preset, with those in the place of its own that are given."""
    options = load_preset(preset)
    mode, env_id = options["mode"], options["env"]
    if given.get("mode", mode) != mode:
        raise ValueError(f"--preset {preset} is for --mode {mode}")
    if not _is_of(options, given.get("env")):
        say(f"settings of {env_id}, which were not measured in {given['env']}")
    limits = LIMITS[options["mode"]]
    if any(name in given for name in limits):
        options = {name: value for name, value in options.items() if name not in limits}
    if "lr" in given or "outer_lr" in given:
        options.pop("lr", None)
    return options | given


def _is_of(preset: dict[str, Any], env_id: str | None) -> bool:
    """Whether the preset was measured in this environment, or the family of tasks around it."""
    return env_id is None or _in_terms_of(preset["mode"], {"env": env_id})["env"] == preset["env"]


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
    """The settings of the run, with the steps or episodes and the device asked for now."""
    limits = LIMITS[stored["mode"]]
    had = [name for name in limits if stored[name] is not None]
    if stored["mode"] == "improved" and len(had) == 1 and len(given.keys() & set(limits)) == 1:
        given = dict.fromkeys(limits) | given  # one limit in the place of the other, as at a start
    settings = dict(stored)
    for name, value in given.items():
        if name in (*limits, "device"):
            settings[name] = value
        elif stored.get(name) != value:
            option = "lr" if name == "learning_rate" else name
            raise ValueError(
                f"--{option} must be {stored.get(name)} as in the run in {run.path}, got {value}"
            )
    counted = _counted(settings)
    old, new = stored[counted], settings[counted]
    if settings.get("anneal_lr") and old is not None and new != old:
        say(
            f"--{counted} {new} instead of {old}: from here on the learning rate is that of a run of "
            "this length"
        )
    return settings


def _counted(settings: dict[str, Any]) -> str:
    """The limit that the learning rate is annealed over."""
    if settings["mode"] == "improved":
        return "episodes" if settings["steps"] is None else "steps"
    return LIMITS[settings["mode"]][0]


def stored_settings(run: RunDirectory) -> dict[str, Any]:
    """The settings in config.json, checked."""
    stored = with_current_names(run.read_config())
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
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError(
                    f"{run.config_path}: {name} must be one of {list(get_args(kind))}, got {value!r}"
                )
        elif type(value) is not kind:
            raise ValueError(f"{run.config_path}: {name} must be {kind.__name__}, got {value!r}")
    defaults = _defaults_of(mode)
    given = {name: stored.get(name) for name in ("mode", *_options_of(mode))}
    return {name: defaults.get(name) if x is None else x for name, x in given.items()}


def _options_of(mode: str) -> tuple[str, ...]:
    shared = ("env", *LIMITS[mode], "seed", "batch_size", "threads")
    trial = ("trial_episodes",) if mode == "meta_rl" else ()
    return shared + trial + MODEL_OPTIONS[mode] + TRAINER_OPTIONS[mode]


def make_environment(
    settings: dict[str, Any], world: World | None = None
) -> Environment | TrialEnvironment:
    """The environments that the run plays in: this process's share of them."""
    world = world or World()
    env_id, rows, seed = settings["env"], settings["batch_size"], settings["seed"]
    sharded = "tasks_per_epoch" if settings["mode"] == "meta_rl" else "batch_size"
    for name in ("batch_size", sharded):
        check_count(f"--{name}", settings[name])
    if settings[sharded] < world.size:
        raise ValueError(
            f"--{sharded} must be at least the number of processes, {world.size}, "
            f"got {settings[sharded]}"
        )
    share = len(world.share(settings[sharded]))
    if settings["mode"] != "meta_rl":
        return Environment(env_id, share, seed=seed)
    get_family(env_id)
    env = Environment(env_id, rows * share, seed=seed)
    episodes = settings["trial_episodes"]
    return env if episodes == 1 else TrialEnvironment(env, episodes)


def make_trainer(
    settings: dict[str, Any],
    env: Environment | TrialEnvironment,
    world: World | None = None,
) -> Trainer:
    """The model and trainer of the settings; what is None is left to their defaults."""
    try:
        return _make_trainer(settings, env, world or World())
    except (RuntimeError, OverflowError, MemoryError) as error:  # sizes beyond the memory
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the model of this size cannot be made: {reason}") from error


def _make_trainer(
    settings: dict[str, Any], env: Environment | TrialEnvironment, world: World
) -> Trainer:
    def chosen(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: settings[name] for name in names if settings[name] is not None}

    mode = settings["mode"]
    if mode == "policy_gradient" and world.size > 1:
        raise ValueError("--mode policy_gradient trains in one process")
    if mode == "policy_gradient" and not env.discrete:
        raise ValueError(
            f"--mode policy_gradient needs discrete actions; {env.env_name} has "
            f"{env.single_action_space}: use --mode improved"
        )
    model_options = chosen(MODEL_OPTIONS[mode])
    trainer_options = chosen(TRAINER_OPTIONS[mode]) | {"seed": settings["seed"]}
    trainer_options["device"] = device_of(settings["device"], world)
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
        return MetaRLTrainer(improved, **trainer_options, world=world)
    return PPOTrainer(improved, num_threads=None, **trainer_options, world=world)


def device_of(name: str | None, world: World) -> torch.device:
    """The CPU, or a GPU for each process of this machine."""
    if name != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device: this torch sees no GPU")
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise ValueError(f"--device: every process of a machine needs a GPU, and there are {count}")
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


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
