"""The command `adapt`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssm_fast.adaptation import (
    HybridAdaptationConfig,
    HybridAdapter,
    StandardAdaptationConfig,
    StandardAdapter,
    TestTimeAdapter,
)
from ssm_fast.adaptation.online import adapt_to_environment, episode_means, play_episodes
from ssm_fast.checkpoint import load_inner_rates, load_model, read_metadata, save_model
from ssm_fast.checks import check_spaces
from ssm_fast.cli.environments import (
    FAMILY_OF,
    environment_of,
    policy_file,
    route_mujoco_warnings,
    say_task,
    say_where_trained,
    stored_task,
    task_of,
)
from ssm_fast.cli.messages import check_option, say
from ssm_fast.cli.options import (
    ADAPT_DEFAULTS,
    DEFAULTS,
    EVALUATION_SEED,
    HYBRID_DEFAULTS,
    Adapt,
    Method,
)
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.env_runner import Environment, Task
from ssm_fast.experience.experience_buffer import ExperienceBuffer
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.policy import spaces_of


@dataclass(frozen=True)
class AdaptationReport:
    """Returns of a policy as it was and of its adapted copy, means over the rows.

    Attributes:
        method: That was taken.
        env_id: What was played.
        without: Of each episode (of `gradient`: each round), not adapting.
        adapting: Of the same, from the same first states, while the copy adapted.
        before: Of as many other episodes, played deterministically by the policy as it was.
        after: Of the same, by the adapted copy.
    """

    method: Method
    env_id: str
    without: list[float]
    adapting: list[float]
    before: list[float]
    after: list[float]


def run_adaptation(options: Adapt) -> None:
    """Adapts a copy of a policy, writes it, and prints the comparison with the policy as it was."""
    replaced = " (another one was there before)" if options.out.exists() else ""
    path = policy_file(options.path)
    env_id = environment_of(path, options.env)
    say_where_trained(path, env_id)
    task = stored_task(path, env_id) if options.task is None else None
    if task is None and options.env is None and options.task is None and env_id in FAMILY_OF:
        options = replace(options, task=0)
        say(f"{options.split} task 0 of {FAMILY_OF[env_id]}; --task chooses another one")
    if task is not None:
        say_task(task)
    report = adapt_policy(options, task=task)
    say(f"{'episode':>14} {'without':>10} {'adapting':>10}")
    for i, row in enumerate(zip(report.without, report.adapting, strict=True)):
        say(f"{i + 1:>14} {row[0]:>10.1f} {row[1]:>10.1f}")
    _say_means("mean", report.without, report.adapting)
    _say_means("deterministic", report.before, report.after)
    say(
        f"adapted to {report.env_id} by {report.method}, seed {options.seed}; "
        f"policy {options.out}{replaced}"
    )


def _say_means(name: str, without: Sequence[float], adapting: Sequence[float]) -> None:
    means = [sum(returns) / len(returns) for returns in (without, adapting)]
    say(f"{name:>14} {means[0]:>10.1f} {means[1]:>10.1f}")


def adapt_policy(
    options: Adapt, on_stage: Callable[[str], None] = lambda _: None, task: Task | None = None
) -> AdaptationReport:
    """Adapts a copy of a policy and writes it.

    Args:
        options: Those of the command.
        on_stage: Called with a few words on what begins.
        task: What to play where the options name no number; what the environment plays anyway if
            None.
    """
    path = policy_file(options.path)
    model = load_model(path)
    rates = load_inner_rates(path)
    method = options.method or ("gradient" if rates else "test_time")
    options = replace(options, method=method)
    if not isinstance(model, ImprovedSSM):
        raise ValueError(  # noqa: TRY004 (the file's fault)
            f"{path} is of --mode policy_gradient, whose {type(model).__name__} has no critic to adapt "
            "with: take a policy of --mode improved or meta_rl"
        )
    if options.out.resolve() == path.resolve():
        raise ValueError(f"--out must be another file than {path}")
    if options.out.is_dir():
        raise ValueError(f"--out must be a file, {options.out} is a folder")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {options.out.parent}")
    env_id = environment_of(path, options.env)
    if options.task is not None:
        env_id = FAMILY_OF.get(env_id, env_id)
    trainer = _trainer_of(path) if method == "gradient" else None
    chosen = _chosen(options, trainer)
    critic = _state_of_critic(path, method)
    route_mujoco_warnings(env_id)
    torch.set_num_threads(1)
    if options.task is not None:
        task = task_of(env_id, options.split, options.task)
    elif task is None and method != "gradient" and read_metadata(path).get("env_id") == env_id:
        warnings.warn(
            f"the policy was trained in {env_id} itself: it has little to learn there and may get "
            "worse",
            stacklevel=2,
        )
    with _environment(env_id, task, chosen) as env:
        if chosen.get("adapt_every", 0) is None:
            assert env.max_episode_steps is not None
            chosen["adapt_every"] = max(env.max_episode_steps // 5, 1)
        check_spaces(env, *spaces_of(model))
        if trainer is not None:
            on_stage("playing with and without gradient steps")
            adapted, without, adapting = _by_gradient_steps(trainer, env, chosen)
        else:
            adapter = _adapter(method, model, chosen)
            adapted = adapter.model
            on_stage("playing without adapting")
            without = episode_means(play_episodes(model, env, chosen["episodes"], options.seed))
            on_stage("playing and adapting")
            adapting = _by_adapter(adapter, env, chosen)
        metadata = env.policy_metadata() | critic | {"adapted": method}
        if rates:
            metadata["inner_loop"] = read_metadata(path)["inner_loop"]
        if task is not None:
            metadata["task"] = json.dumps(task.as_dict())
        save_model(options.out, adapted, metadata, rates)
        on_stage("playing both deterministically")
        before, after = (
            episode_means(play_episodes(policy, env, chosen["episodes"], EVALUATION_SEED, True))
            for policy in (model, adapted)
        )
    return AdaptationReport(method, env_id, without, adapting, before, after)


def _trainer_of(path: Path) -> MetaRLTrainer:
    """The gradient steps that a policy has learnt to take."""
    try:
        return MetaRLTrainer.from_policy(path)
    except ValueError as error:
        raise ValueError(f"--method gradient: {error}") from error


def _chosen(options: Adapt, trainer: MetaRLTrainer | None) -> dict[str, Any]:
    """The numbers that the method takes, given or by default, and the seed."""
    defaults: dict[str, Any] = HYBRID_DEFAULTS if options.method == "hybrid" else ADAPT_DEFAULTS
    if trainer is not None:
        defaults = {
            "episodes": 4,
            "rows": trainer.rows_per_task or DEFAULTS["meta_rl"]["batch_size"],
        }
    given = {name: getattr(options, name) for name in HYBRID_DEFAULTS}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - defaults:
        raise ValueError(f"--{name} is not an option of --method {options.method}")
    chosen = defaults | given
    check_option("seed", options.seed, 0, EVALUATION_SEED - 1)
    check_option("rows", chosen["rows"], 1, 2**16)
    check_option("episodes", chosen["episodes"], 2 if options.method == "gradient" else 1, 2**31)
    if chosen.get("adapt_every") is not None:
        check_option("adapt_every", chosen["adapt_every"], 1, 2**31)
    return chosen | {"seed": options.seed, "max_episode_steps": options.max_episode_steps}


def _state_of_critic(path: Path, method: str) -> dict[str, str]:
    """What the file of the adapted policy says of its critic."""
    if read_metadata(path).get("critic") != "untrained":
        return {}
    if method != "gradient":
        warnings.warn(
            f"the critic of {path} was not trained, as meta_rl does without one: "
            "--method gradient needs none",
            stacklevel=2,
        )
    return {} if method in ("standard", "hybrid") else {"critic": "untrained"}


def _environment(env_id: str, task: Task | None, chosen: dict[str, Any]) -> Environment:
    rows = chosen["rows"]
    tasks = None if task is None else [task] * rows
    env = Environment(env_id, rows, chosen["max_episode_steps"], tasks=tasks)
    if env.max_episode_steps is None:
        env.close()
        raise ValueError(f"--max_episode_steps is needed: {env_id} has no time limit")
    return env


def _by_gradient_steps(
    trainer: MetaRLTrainer, env: Environment, chosen: dict[str, Any]
) -> tuple[ImprovedSSM, list[float], list[float]]:
    """The adapted policy, and the mean returns of each round without and with its steps."""
    rounds, seed = chosen["episodes"], chosen["seed"]
    adaptation = trainer.adapt(env, None, rounds - 1, seed)
    shared, noise = trainer.shared_weights(1), torch.Generator(trainer.device).manual_seed(seed)
    played = [
        trainer.collect(env, shared, seed + k * env.batch_size, generator=noise)
        for k in range(rounds)
    ]
    without = [float(round_.episode_returns.mean()) for round_ in played]
    adapted = trainer.adapted_model(adaptation.weights)
    return adapted, without, adaptation.returns.mean((1, 2, 3)).tolist()


def _by_adapter(adapter: StandardAdapter, env: Environment, chosen: dict[str, Any]) -> list[float]:
    """The returns while the policy adapts."""
    arguments = env, chosen["episodes"], chosen["adapt_every"]
    if isinstance(adapter, TestTimeAdapter):
        returns, stats = adapter.adapt_online(*arguments, seed=chosen["seed"])
    else:
        returns, stats = adapt_to_environment(adapter, *arguments, seed=chosen["seed"])
    every = chosen["adapt_every"]
    steps, before_last = (
        max(sum(lengths[:end]) for lengths in stats["episode_lengths"]) for end in (None, -1)
    )
    if chosen["episodes"] == 1:
        return returns
    if steps < every:
        warnings.warn(
            f"the policy changed after the last episode alone: they had {steps} steps, fewer than "
            f"--adapt-every {every}; a smaller number adapts sooner",
            stacklevel=2,
        )
    elif before_last < every:
        warnings.warn(
            f"the policy first changed in the last episode: those before it had {before_last} steps, "
            f"fewer than --adapt-every {every}; a smaller number adapts sooner",
            stacklevel=2,
        )
    return returns


def _adapter(method: str, model: ImprovedSSM, chosen: dict[str, Any]) -> StandardAdapter:
    if method == "test_time":
        return TestTimeAdapter(
            model,
            chosen["lr"],
            chosen["steps"],
            buffer_size=1000 * chosen["rows"],
            max_kl=chosen["max_kl"],
            seed=chosen["seed"],
        )
    shared: dict[str, Any] = {
        "learning_rate": chosen["lr"],
        "num_steps": chosen["steps"],
        "grad_clip_norm": 0.5,
        "trust_region_eps": chosen["max_kl"],
    }
    if method == "hybrid":
        memory = ExperienceBuffer(10_000 * chosen["rows"], seed=chosen["seed"])
        config = HybridAdaptationConfig(**shared, experience_weight=chosen["experience_weight"])
        return HybridAdapter(model, config, memory)
    return StandardAdapter(model, StandardAdaptationConfig(**shared))
