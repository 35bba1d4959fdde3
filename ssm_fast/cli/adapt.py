"""The command `adapt`."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from ssm_fast.checkpoint import load_model, save_model
from ssm_fast.cli.environments import (
    FAMILY_OF,
    environment_of,
    policy_file,
    route_mujoco_warnings,
)
from ssm_fast.cli.messages import check_option, say
from ssm_fast.cli.options import EVALUATION_SEED, Adapt
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.env_runner import Environment, Task, get_family


def run_adaptation(options: Adapt) -> None:
    """Adapts a copy of a policy, writes it, and compares it with the policy as it was."""
    path = policy_file(options.path)
    model = load_model(path, ImprovedSSM)
    if options.out.resolve() == path.resolve():
        raise ValueError(f"--out must be another file than {path}")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {options.out.parent}")
    env_id = environment_of(path, options.env)
    if options.task is not None:
        env_id = FAMILY_OF.get(env_id, env_id)
    check_option("seed", options.seed, 0, EVALUATION_SEED - 1)
    check_option("rows", options.rows, 1, 2**16)
    check_option("episodes", options.episodes, 1, 2**31)
    check_option("adapt_every", options.adapt_every, 1, 2**31)
    route_mujoco_warnings(env_id)
    torch.set_num_threads(1)
    task = _task(env_id, options)
    tasks = None if task is None else [task] * options.rows
    with Environment(env_id, options.rows, options.max_episode_steps, tasks=tasks) as env:
        if env.max_episode_steps is None:
            raise ValueError(f"--max_episode_steps is needed: {env_id} has no time limit")
        adapter = _adapter(options, model)
        without = episode_means(play_episodes(model, env, options.episodes, options.seed))
        returns = _adapt(adapter, env, options)
        metadata = env.policy_metadata()
        if task is not None:
            metadata["task"] = json.dumps(task.as_dict())
        save_model(options.out, adapter.model, metadata)
        _compare(without, returns)
        played = [
            episode_means(play_episodes(policy, env, options.episodes, EVALUATION_SEED, True))
            for policy in (model, adapter.model)
        ]
        _compare_means("deterministic", *played)
    say(f"adapted to {env_id} by {options.method}, seed {options.seed}; policy {options.out}")


def _adapt(adapter: StandardAdapter, env: Environment, options: Adapt) -> list[float]:
    """The returns while the policy adapts."""
    episodes, every, seed = options.episodes, options.adapt_every, options.seed
    if isinstance(adapter, TestTimeAdapter):
        return adapter.adapt_online(env, episodes, every, seed=seed)[0]
    return adapt_to_environment(adapter, env, episodes, every, seed=seed)[0]


def _compare(without: Sequence[float], adapting: Sequence[float]) -> None:
    say(f"{'episode':>14} {'without':>10} {'adapting':>10}")
    for i, row in enumerate(zip(without, adapting, strict=True)):
        say(f"{i + 1:>14} {row[0]:>10.1f} {row[1]:>10.1f}")
    _compare_means("mean", without, adapting)


def _compare_means(name: str, without: Sequence[float], adapting: Sequence[float]) -> None:
    means = [sum(returns) / len(returns) for returns in (without, adapting)]
    say(f"{name:>14} {means[0]:>10.1f} {means[1]:>10.1f}")


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
