"""Does adapting pay? Returns on held-out bodies of HalfCheetah, with adaptation and without.

    python benchmarks/adaptation_benchmark.py pretrain --out runs/body.safetensors
    python benchmarks/adaptation_benchmark.py run --policy runs/body.safetensors --out result.json
    python benchmarks/adaptation_benchmark.py report result.json

`pretrain` trains one recurrent policy on the 100 training tasks at once. `run` plays 5 episodes of
1000 steps of each test task, from the same first states in every arm: without adapting, sampled and
deterministic, with `TestTimeAdapter`, with `HybridAdapter`, and with `StandardAdapter`; `--rows`
copies of the task share what they learn. The result is written after every task, and `run` plays
what a file lacks: more tasks, or other adapters of `--adapters` on those that it has.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from functools import partial
from pathlib import Path

import mujoco
import numpy as np
import torch
from intervals import estimate

from ssm_fast.adaptation import (
    HybridAdaptationConfig,
    HybridAdapter,
    StandardAdaptationConfig,
    StandardAdapter,
    TestTimeAdapter,
)
from ssm_fast.adaptation.online import adapt_to_environment, play_episodes
from ssm_fast.checkpoint import write_atomic
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.env_runner import Environment, get_family
from ssm_fast.experience.experience_buffer import ExperienceBuffer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer

FAMILY = "ssm_fast/HalfCheetahBody-v0"
HORIZON, EPISODES = 1000, 5
ADAPT_EVERY = 500
LEARNING_RATE = {1: 5e-5}  # chosen on training tasks: fewer steps a call say less
AFTER = 2  # deterministic episodes of the adapted policy, from other first states
WITHOUT = {"sampled": False, "deterministic": True}


def by_test_time(model: ImprovedSSM, env: Environment, seed: int, use_uncertainty: bool = True):
    adapter = TestTimeAdapter(
        model,
        adaptation_lr=LEARNING_RATE.get(env.batch_size, 1e-4),
        adaptation_steps=20,
        buffer_size=HORIZON * env.batch_size,
        batch_size=64,
        use_uncertainty=use_uncertainty,
        max_kl=0.3 if use_uncertainty else 0.03,
        seed=seed,
    )
    _, stats = adapter.adapt_online(env, EPISODES, ADAPT_EVERY, seed=seed)
    return adapter.model, stats


def by_hybrid(model: ImprovedSSM, env: Environment, seed: int):
    config = HybridAdaptationConfig(**_steps(env), experience_batch_size=64, experience_weight=0.5)
    adapter = HybridAdapter(model, config, ExperienceBuffer(10_000, seed=seed))
    return _by_stretches(adapter, env, seed)


def by_standard(model: ImprovedSSM, env: Environment, seed: int):
    return _by_stretches(StandardAdapter(model, StandardAdaptationConfig(**_steps(env))), env, seed)


def _steps(env: Environment) -> dict[str, float]:
    return {
        "learning_rate": LEARNING_RATE.get(env.batch_size, 1e-4),
        "num_steps": 20,
        "grad_clip_norm": 0.5,
        "trust_region_eps": 0.03,
    }


def _by_stretches(adapter: StandardAdapter, env: Environment, seed: int):
    _, stats = adapt_to_environment(adapter, env, EPISODES, ADAPT_EVERY, seed=seed)
    return adapter.model, stats


ADAPTERS = {
    "TestTimeAdapter": by_test_time,
    "TestTimeAdapter, temperature 1": partial(by_test_time, use_uncertainty=False),
    "HybridAdapter": by_hybrid,
    "StandardAdapter": by_standard,
}


def pretrain(steps: int, seed: int, out: Path) -> None:
    """Recurrent PPO on all training tasks side by side."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    family = get_family(FAMILY)
    torch.manual_seed(seed)
    start = time.perf_counter()
    tasks = family.train_tasks
    with Environment(FAMILY, len(tasks), HORIZON, seed=seed, tasks=tasks) as env:
        model = ImprovedSSM(env.input_dim, env.action_dim, normalize_observations=True)
        trainer = PPOTrainer(model, num_steps=32, seed=seed, checkpoint_interval=10**6)
        trainer.train(env, steps)
        model.save(out, env.policy_metadata())
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s: {out}")


def run(
    policy: Path, rows: list[int], seeds: list[int], num_tasks: int, adapters: list[str], out: Path
) -> None:
    """Every arm on every task, seed by seed."""
    model = ImprovedSSM.load(policy)
    tasks = get_family(FAMILY).test_tasks[:num_tasks]
    results = json.loads(out.read_text()) if out.exists() else []
    done = {(r["rows"], r["seed"], r["task"]): r for r in results}
    for seed in seeds:
        for i, task in enumerate(tasks):
            for B in rows:
                result = done.get((B, seed, i))
                if result is None:
                    result = {"rows": B, "seed": seed, "task": i}
                    results.append(result)
                if _complete(result, model, task, adapters):
                    contents = json.dumps(results) + "\n"
                    write_atomic(out, lambda path, text=contents: path.write_text(text))


def _complete(result: dict, model: ImprovedSSM, task, adapters: list[str]) -> bool:
    """Plays the arms that a result lacks, and tells whether there were any."""
    returns, after, seconds = (result.setdefault(k, {}) for k in ("returns", "after", "seconds"))
    missing = [name for name in adapters if name not in returns]
    if "none" in after and not missing:
        return False
    B, first = result["rows"], 10_000 * (result["seed"] + 1)
    with Environment(FAMILY, B, HORIZON, tasks=[task] * B) as env:
        if "none" not in after:
            for name, deterministic in WITHOUT.items():
                returns[name] = play_episodes(model, env, EPISODES, first, deterministic)
            after["none"] = play_episodes(model, env, AFTER, first + 5000, True)
        for name in missing:
            start = time.perf_counter()
            adapted, stats = ADAPTERS[name](model, env, first)
            seconds[name] = time.perf_counter() - start
            returns[name] = stats["episode_returns"]
            after[name] = play_episodes(adapted, env, AFTER, first + 5000, True)
    return True


def report(path: Path) -> None:
    """Means and improvements, with 95 % intervals of a bootstrap over tasks and seeds."""
    results = json.loads(path.read_text())
    for B in sorted({r["rows"] for r in results}):
        mine = [r for r in results if r["rows"] == B]
        returns = {arm: _scores(mine, "returns", arm) for arm in _shared(mine, "returns")}
        after = {arm: _scores(mine, "after", arm) for arm in _shared(mine, "after")}
        seeds, tasks = after["none"].shape
        print(f"\n{B} rows, {tasks} tasks, {seeds} seeds, {EPISODES} episodes a row")
        if partly := sorted({arm for r in mine for arm in r["returns"]} - returns.keys()):
            print(f"not of every task yet, and left out: {', '.join(partly)}")
        print("| arm | return | last episode | against sampled | against deterministic |")
        print("|---|---|---|---|---|")
        for arm, scores in returns.items():
            last = np.mean([np.array(r["returns"][arm])[:, -1].mean() for r in mine])
            gains = [_improvement(scores - returns[other]) for other in WITHOUT]
            print(f"| {arm} | {scores.mean():.0f} | {last:.0f} | {' | '.join(gains)} |")
        print("\n| then, deterministic, not adapting any more | return | improvement |")
        print("|---|---|---|")
        for arm, scores in after.items():
            print(f"| {arm} | {scores.mean():.0f} | {_improvement(scores - after['none'])} |")


def _shared(results: list[dict], what: str) -> list[str]:
    """The arms that every result has."""
    return [arm for arm in results[0][what] if all(arm in r[what] for r in results)]


def _scores(results: list[dict], what: str, arm: str) -> np.ndarray:
    """Mean returns `[seeds, tasks]`, of the tasks that every seed has."""
    seeds = sorted({r["seed"] for r in results})
    tasks = [
        i
        for i in sorted({r["task"] for r in results})
        if {r["seed"] for r in results if r["task"] == i} == set(seeds)
    ]
    means = {(r["seed"], r["task"]): np.mean(r[what][arm]) for r in results}
    return np.array([[means[seed, task] for task in tasks] for seed in seeds])


def _improvement(differences: np.ndarray) -> str:
    if not differences.any():
        return "0"
    mean, low, high = estimate(differences, np.mean, task_bootstrap=True)
    return f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("pretrain")
    train.add_argument("--steps", type=int, default=1_000_000)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", type=Path, required=True)
    play = commands.add_parser("run")
    play.add_argument("--policy", type=Path, required=True)
    play.add_argument("--rows", type=int, nargs="+", default=[8, 1])
    play.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    play.add_argument("--tasks", type=int, default=40)
    play.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    play.add_argument("--out", type=Path, required=True)
    show = commands.add_parser("report")
    show.add_argument("path", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mujoco.set_mju_user_warning(lambda _: None)
    if options.command == "pretrain":
        pretrain(options.steps, options.seed, options.out)
    elif options.command == "run":
        run(
            options.policy,
            options.rows,
            options.seeds,
            options.tasks,
            options.adapters,
            options.out,
        )
    else:
        report(options.path)


if __name__ == "__main__":
    main()
