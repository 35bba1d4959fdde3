"""Train a policy with PPO by every seed, evaluate it, and compare kinds of policies.

python benchmarks/simple_improved_benchmark.py --env HalfCheetah-v5 --preset halfcheetah-v5 --steps 1000000 --seeds 5
python benchmarks/simple_improved_benchmark.py --env HalfCheetah-v5 --policies ssm gru mlp no_norm no_residual no_orthogonal

Each run leaves a file of its own in the folder, and what is there is not run again; the table and the plot are made of
all files of the environment and the number of steps. A return is that of a final deterministic evaluation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
import tyro
from baseline_policies import GRUPolicy, MLPPolicy
from contest import commit
from intervals import check_rliable, interval

import ssm_fast
from ssm_fast.cli.environments import route_mujoco_warnings
from ssm_fast.cli.presets import load_preset
from ssm_fast.cli.settings import MODEL_OPTIONS, TRAINER_OPTIONS
from ssm_fast.core import ImprovedSSM
from ssm_fast.env_runner import Environment, evaluate
from ssm_fast.env_runner.film import film, usable_backend
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.policy import Policy

mpl.use("agg")
from matplotlib import pyplot as plt

ROWS = 8  # of a preset that does not say
PICTURES, FIRST_PICTURE, BETWEEN_PICTURES = 6, 20, 2  # of a strip, in steps
EVALUATION_EPISODES, EVALUATION_SEED = 10, 3_000_000_000
POLICIES: dict[str, tuple[str, type[ImprovedSSM], dict[str, Any]]] = {
    "ssm": ("SSM", ImprovedSSM, {}),
    "gru": ("GRU", GRUPolicy, {}),
    "mlp": ("MLP", MLPPolicy, {}),
    "no_norm": ("SSM without layer norm", ImprovedSSM, {"use_layer_norm": False}),
    "no_residual": ("SSM without residuals", ImprovedSSM, {"use_residual": False}),
    "no_orthogonal": (
        "SSM without orthogonal initialisation",
        ImprovedSSM,
        {"orthogonal_init": False},
    ),
}


@dataclass(frozen=True)
class Options:
    """Train a policy with PPO by every seed, evaluate it, and compare kinds of policies."""

    env: str = "HalfCheetah-v5"
    """Gymnasium id."""
    steps: int = 1_000_000
    """Environment steps of each run."""
    preset: str | None = None
    """Settings of the policies and the trainer, as `ssm-fast train --preset`; by default its defaults."""
    episodes: int | None = None
    """Instead of the steps: as many as so many episodes of the time limit have."""
    seeds: int = 5
    """Seeds 0, 1, ... of each policy."""
    first_seed: int = 0
    policies: tuple[
        Literal["ssm", "gru", "mlp", "no_norm", "no_residual", "no_orthogonal"], ...
    ] = ("ssm",)
    """What to compare."""
    out: Path = Path("benchmarks/results/improved")
    """The folder of the runs' files, the table and the plot."""
    models: Path = Path("build/improved")
    """The folder of the trained SSM policies."""
    videos: bool = False
    """Also film an episode of every SSM policy in that folder, and make a strip of pictures of the first
    one, beside the table."""
    only_summary: bool = False
    """Run nothing."""
    threads: int = 1
    """Threads of torch and of the physics."""


def main(options: Options) -> None:
    check_rliable()
    torch.set_num_threads(options.threads)
    route_mujoco_warnings(options.env)
    options.out.mkdir(parents=True, exist_ok=True)
    options.models.mkdir(parents=True, exist_ok=True)
    steps = steps_of(options)
    label = f"{options.env.replace('/', '_')}-{steps}"
    if options.preset is not None:
        label = f"preset-{options.preset}-{steps}"
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for policy in options.policies:
            path = options.out / f"{label}-{policy}-seed{seed}.json"
            if path.exists() or options.only_summary:
                continue
            result = run(options, policy, seed, steps, options.models / path.stem)
            path.write_text(json.dumps(result) + "\n")
            say(f"{path}: {np.mean(result['returns']):.1f}")
    summarise(options, label, steps)
    if options.videos:
        film_policies(options, label)


def steps_of(options: Options) -> int:
    if options.episodes is None:
        return options.steps
    with Environment(options.env) as env:
        if env.max_episode_steps is None:
            raise SystemExit(f"{options.env} has no time limit: give --steps")
        return options.episodes * env.max_episode_steps


def run(options: Options, policy: str, seed: int, steps: int, model_path: Path) -> dict[str, Any]:
    """Trains and evaluates one policy."""
    env_id = options.env
    _, kind, arguments = POLICIES[policy]
    preset = {} if options.preset is None else load_preset(options.preset)
    if preset and (preset["mode"], preset["env"]) != ("improved", env_id):
        raise SystemExit(f"--preset {options.preset} is for {preset['mode']} in {preset['env']}")
    preset["learning_rate"] = preset.pop("lr", None)
    model_options, trainer_options = (
        {name: preset[name] for name in names["improved"] if preset.get(name) is not None}
        for names in (MODEL_OPTIONS, TRAINER_OPTIONS)
    )
    torch.manual_seed(seed)
    start = time.perf_counter()
    with Environment(env_id, preset.get("batch_size", ROWS), seed=seed) as env:
        model = kind(
            env.input_dim,
            env.action_dim,
            discrete=env.discrete,
            normalize_observations=True,
            **model_options | arguments,
        )
        trainer = PPOTrainer(model, seed=seed, num_threads=options.threads, **trainer_options)

        def show(metrics: dict[str, float]) -> None:
            if metrics["iteration"] % 50 == 0:
                say(
                    f"{policy}, seed {seed}: {metrics['timesteps']:,.0f} steps, "
                    f"return {metrics['episode_return']:.1f}"
                )

        curve = trainer.train(env, steps, log_interval=10**9, callback=show).metrics
        seconds = time.perf_counter() - start
        if kind is ImprovedSSM:
            model.save(model_path.with_suffix(".safetensors"), env.policy_metadata())
        found = evaluate(
            Policy(model, env.action_low, env.action_high),
            env_id,
            EVALUATION_EPISODES,
            EVALUATION_SEED,
        )
    return {
        "env": env_id,
        "policy": policy,
        "preset": options.preset,
        "seed": seed,
        "timesteps": trainer.timesteps,
        "seconds": seconds,
        "commit": commit() or "",
        "torch": torch.__version__,
        "returns": found.returns.tolist(),
        "curve": {
            name: [row[name] for row in curve]
            for name in ("timesteps", "seconds", "episode_return")
        },
    }


# What the runs say together


def summarise(options: Options, label: str, steps: int) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(options.out.glob(f"{label}-*.json"))]
    if not runs:
        say("no runs")
        return
    preset = "" if options.preset is None else f" --preset {options.preset}"
    lines = [
        f"# {options.env}, {steps:,} steps",
        "",
        (
            f"Made by `python benchmarks/simple_improved_benchmark.py --env {options.env}{preset} --steps {steps}`. Return of the final "
            f"policy, deterministic, {EVALUATION_EPISODES} episodes a seed: the interquartile mean over seeds (means of "
            "their episodes) with its 95 % bootstrap interval, the mean, and each seed."
        ),
        "",
        "| policy | return (IQM) | 95 % interval | mean | seeds | wall time | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for policy, (name, _, _) in POLICIES.items():
        own = [found for found in runs if found["policy"] == policy]
        if not own:
            continue
        lines.append(row_of(name, own))
        draw(axes, name, own)
    axes.set_xlabel("million environment steps")
    axes.set_ylabel("return of episodes in training")
    axes.set_title(options.env)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.out / f"{label}.png", dpi=110)
    plt.close(figure)
    (options.out / f"{label}.md").write_text("\n".join(lines) + "\n")
    say("\n".join(lines))


def row_of(name: str, runs: list[dict[str, Any]]) -> str:
    """A line of the table."""
    means = np.array([np.mean(found["returns"]) for found in runs])
    row = interval(means[:, None])
    minutes = np.mean([found["seconds"] for found in runs]) / 60
    seeds = ", ".join(f"{mean:.0f}" for mean in means)
    commits = ", ".join(sorted({found["commit"] for found in runs}))
    return (
        f"| {name} | {row['iqm']:.0f} | {row['low']:.0f} to {row['high']:.0f} | {row['mean']:.0f} "
        f"| {seeds} | {minutes:.1f} min | {commits} |"
    )


def draw(axes: Any, name: str, runs: list[dict[str, Any]]) -> None:
    """The curve of each seed, thin, and their mean."""
    length = min(len(found["curve"]["timesteps"]) for found in runs)
    steps = np.array(runs[0]["curve"]["timesteps"][:length]) / 1e6
    curves = np.array([found["curve"]["episode_return"][:length] for found in runs])
    (line,) = axes.plot(steps, curves.mean(0), label=name)
    for curve in curves:
        axes.plot(steps, curve, color=line.get_color(), alpha=0.3, linewidth=0.7)


# What they look like


def film_policies(options: Options, label: str) -> None:
    """An .mp4 beside each policy's file that has none yet, and a strip of pictures of the first one."""
    from imageio_ffmpeg import get_ffmpeg_exe  # of the extra `app`

    backend = usable_backend(options.env)
    if backend is not None:
        os.environ["MUJOCO_GL"] = backend
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # of CartPole and the like: no window
    paths = sorted(options.models.glob(f"{label}-ssm-seed*.safetensors"))
    for path in paths:
        video = path.with_suffix(".mp4")
        if not video.exists():
            filmed = film(ssm_fast.load_policy(path), options.env, video, seed=EVALUATION_SEED)
            say(f"{video}: return {filmed.episode_return:.1f}")
    if paths:
        chosen = rf"select=gte(n\,{FIRST_PICTURE})*not(mod(n\,{BETWEEN_PICTURES}))"
        joined = f"{chosen},scale=320:-2,tile={PICTURES}x1"
        strip = options.out / f"{label}-strip.png"
        strip.unlink(missing_ok=True)
        command = [get_ffmpeg_exe(), "-y", "-v", "error", "-i", paths[0].with_suffix(".mp4")]
        subprocess.run([*command, "-vf", joined, "-frames:v", "1", strip], check=True)
        if not strip.exists():
            say(f"{paths[0]}: its episode is too short for {strip}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(tyro.cli(Options))
