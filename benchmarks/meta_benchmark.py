"""Meta-train by every method and seed, adapt to held-out tasks, and compare.

python benchmarks/meta_benchmark.py --env dir --seeds 3

Each run leaves a file of its own in the folder, and what is there is not run again; the table, the plots and the
summary are made of all files that are there. An entry of a table is the interquartile mean over tasks and
seeds with a 95 % interval of the stratified bootstrap (Agarwal et al. 2021, arXiv 2108.13264, by rliable).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
import tyro
from contest import commit
from intervals import check_rliable, interval
from trust_region import TrustRegionTrainer

from ssm_fast.core import ImprovedSSM
from ssm_fast.env_runner import Environment, TrialEnvironment, get_family
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.run import write_state

mpl.use("agg")
from matplotlib import pyplot as plt

METHODS = ("maml", "trpo", "rl2", "both", "pretrained", "untrained")
ADAPTING = ("maml", "trpo", "both")  # by gradient steps
LABELS = {
    "maml": "gradient steps (ProMP)",
    "trpo": "gradient steps (MAML-TRPO)",
    "rl2": "recurrent state (RL²)",
    "both": "both",
    "pretrained": "one policy for all tasks",
    "untrained": "random weights",
}
STEPS = 3
ROWS = 20  # of each task
SEED = 4_000_000_000  # of the evaluations
# The step lengths are learnt.
TRAINER = {"tasks_per_epoch": 8, "inner_steps": 2, "inner_lr": 0.3, "learn_inner_lr": True}


@dataclass(frozen=True)
class Setting:
    """How a family is trained in: what the methods share."""

    env: str
    epochs: int
    bar: dict[int, float]  # the return that is to be beaten after so many gradient steps
    trainer: dict[str, Any] = field(default_factory=dict)  # beside those of every family
    trial_episodes: int = 2
    model: dict[str, Any] = field(
        default_factory=lambda: {"state_dim": 64, "hidden_dim": 64, "num_layers": 1}
    )


SETTINGS = {
    # Of two tasks, half of the minibatches would know one direction of the motor alone.
    "cartpole": Setting("ssm_fast/CartPoleFamily-v0", 20, {3: 475.0}, {"tasks_per_minibatch": 4}),
    "dir": Setting("ssm_fast/HalfCheetahDir-v0", 60, {1: 293.0, 3: 330.0}),
    "vel": Setting("ssm_fast/HalfCheetahVel-v0", 110, {1: -79.0, 3: -60.0}),
}


@dataclass(frozen=True)
class Options:
    """Meta-train by every method and seed, adapt to held-out tasks, and compare."""

    env: Literal["cartpole", "dir", "vel"] = "cartpole"
    """The family of tasks."""
    methods: tuple[Literal["maml", "trpo", "rl2", "both", "pretrained", "untrained"], ...] = METHODS
    """What to compare."""
    seeds: int = 3
    """Seeds 0, 1, ... of each method."""
    first_seed: int = 0
    epochs: int | None = None
    """Instead of the setting's."""
    out: Path = Path("benchmarks/results/meta")
    """The folder of the runs' files, the table and the plots."""
    states: Path = Path("build/meta")
    """The folder of the trained policies, as states of a `MetaRLTrainer`."""
    only_summary: bool = False
    """Run nothing."""
    threads: int = 1
    """Threads of torch; the models are too small to gain from more."""


def main(options: Options) -> None:
    check_rliable()
    torch.set_num_threads(options.threads)
    setting = SETTINGS[options.env]
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for method in options.methods:
            path = options.out / f"{options.env}-{method}-seed{seed}.json"
            epochs = epochs_of(setting, method, options.epochs or setting.epochs)
            if path.exists():
                check_settings(path, epochs, trainer_options(setting, method))
            if path.exists() or options.only_summary:
                continue
            result = run(setting, method, seed, epochs, options.states / f"{path.stem}.pt")
            path.write_text(json.dumps(result) + "\n")
            say(f"{path}: {describe(np.array(result['test_tasks']))}")
    summarise(options, setting)


def trainer_options(setting: Setting, method: str) -> dict[str, Any]:
    options = TRAINER | setting.trainer
    return options if method in ADAPTING else options | {"inner_steps": 0}


def epochs_of(setting: Setting, method: str, epochs: int) -> int:
    """As many as make the steps of `epochs` epochs of gradient steps."""
    if method == "untrained":
        return 0
    rounds = TRAINER["inner_steps"] + 1
    own = rounds if method in ADAPTING else 1
    episodes = setting.trial_episodes if method in ("rl2", "both") else 1
    return max(1, round(epochs * rounds / (own * episodes)))


def check_settings(path: Path, epochs: int, options: dict[str, Any]) -> None:
    """A table does not mix runs of different settings."""
    found = json.loads(path.read_text())
    if (found["epochs"], found["trainer"]) != (epochs, options):
        raise SystemExit(f"{path} has other settings than {epochs} epochs, {options}: remove it")


def run(setting: Setting, method: str, seed: int, epochs: int, state: Path) -> dict[str, Any]:
    """Trains and evaluates one policy."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    options = trainer_options(setting, method)
    rows = ROWS * options["tasks_per_epoch"]
    env: Environment | TrialEnvironment = Environment(setting.env, rows)
    if method in ("rl2", "both"):
        env = TrialEnvironment(env, setting.trial_episodes)
    model = ImprovedSSM(
        env.input_dim,
        env.action_dim,
        discrete=env.discrete,
        normalize_observations=True,
        **setting.model,
    )
    kind = TrustRegionTrainer if method == "trpo" else MetaRLTrainer
    trainer = kind(model, **options, seed=seed)
    family = get_family(setting.env)

    def show(metrics: dict[str, float]) -> None:
        if metrics["iteration"] % 10 == 0:
            known = [f"{x:.1f}" for k, x in metrics.items() if k.startswith("test_return")]
            say(f"{method}, seed {seed}: {metrics['iteration']:.0f} epochs, {' '.join(known)}")

    if epochs > 0:
        curve = trainer.train(env, epochs, callback=show).metrics
    else:
        curve = see_observations(trainer, env)
    seconds = time.perf_counter() - start
    state.parent.mkdir(parents=True, exist_ok=True)
    write_state(state, trainer.state_dict())
    if trainer.inner_steps == 0:
        tune_inner_lr(trainer, env)
    returns = {
        what: trainer.evaluate(env, tasks, STEPS, SEED).mean(2).tolist()
        for what in ("test_tasks", "out_of_range_tasks")
        if (tasks := getattr(family, what))
    }
    modes = trainer.evaluate(env, family.test_tasks, STEPS, SEED, deterministic=True)
    env.close()
    return {
        "env": setting.env,
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "timesteps": trainer.timesteps,
        "seconds": seconds,
        "commit": commit() or "",
        "torch": torch.__version__,
        "trainer": options,
        **returns,  # [K + 1, M, E], means over the rows
        "test_tasks_modes": modes.mean(2).tolist(),
        "curve": {
            name: [row[name] for row in curve]
            for name in (curve[0] if curve else ())
            if name in ("timesteps", "seconds", "return_0", "episode_return")
            or name.startswith("test_return")
        },
    }


def see_observations(trainer: MetaRLTrainer, env: Environment | TrialEnvironment) -> list[Any]:
    """Sets the normalisation of a policy that does not learn."""
    assert env.family is not None
    assert trainer.model.obs_norm is not None
    tasks = env.family.train_tasks[: trainer.tasks_per_epoch]
    adapted = trainer.adapt(env, tasks, 0, SEED - 2, generator=torch.default_generator)
    played = adapted.rounds[0]
    trainer.model.obs_norm.update(played["observations"].flatten(0, 2))
    return []


def tune_inner_lr(trainer: MetaRLTrainer, env: Environment | TrialEnvironment) -> None:
    """Gives the steps of a policy that was not trained for them the best length, on training tasks."""
    assert env.family is not None
    tasks = env.family.train_tasks[: trainer.tasks_per_epoch]
    rates = dict(trainer.rates)
    scores = {}
    for scale in (0.03, 0.1, 0.3, 1.0):
        trainer.rates = {name: scale * rate for name, rate in rates.items()}
        scores[scale] = trainer.evaluate(env, tasks, STEPS, SEED - 1)[-1].mean()
    best = max(scores, key=lambda scale: scores[scale])
    trainer.rates = {name: best * rate for name, rate in rates.items()}


# What the runs say together


def summarise(options: Options, setting: Setting) -> None:
    runs = load(options.out, options.env)
    if not runs:
        say("no runs")
        return
    table = {
        method: [
            {"gradient_steps": k, **interval(scores[:, k], task_bootstrap=True)}
            for k in range(scores.shape[1])
        ]
        for method, scores in of_methods(runs, "test_tasks").items()
    }
    count = np.array(runs[0]["test_tasks"]).shape[1]
    numbers = " | ".join(str(k) for k in range(STEPS + 1))
    lines = [
        f"# {setting.env}",
        "",
        (
            f"Made by `python benchmarks/meta_benchmark.py --env {options.env}`. Return on {count} held-out tasks, "
            f"of sampled actions, after 0 to 3 gradient steps on {ROWS} rows each, of one episode's length (or a trial's; a row "
            "plays on where its episode ends early): the mean over tasks and seeds, and in parentheses the interquartile mean "
            "with its 95 % interval, of a bootstrap over tasks and seeds. Of a trial, the return of its last episode."
        ),
        "",
        f"| method | seeds | steps | wall time | {numbers} | commit |",
        "|---" * (STEPS + 6) + "|",
    ]
    for method, row in table.items():
        own = [r for r in runs if r["method"] == method]
        minutes = np.mean([r["seconds"] for r in own]) / 60
        steps = np.mean([r["timesteps"] for r in own]) / 1e6
        cells = [
            f"{x['mean']:.1f} ({x['iqm']:.1f}, {x['low']:.1f} to {x['high']:.1f})" for x in row
        ]
        commits = ", ".join(sorted({r["commit"] for r in own}))
        lines.append(
            f"| {LABELS[method]} | {len(own)} | {steps:.1f}M | {minutes:.0f} min "
            f"| {' | '.join(cells)} | {commits} |"
        )
    bars = ", ".join(f"above {value:g} after {k}" for k, value in setting.bar.items())
    lines += ["", f"To be beaten: {bars}.", "", *modes_table(runs)]
    (options.out / f"{options.env}.md").write_text("\n".join(lines))
    (options.out / f"{options.env}.json").write_text(
        json.dumps({"env": setting.env, "bar": setting.bar, "methods": table}, indent=2) + "\n"
    )
    plot_steps(options, setting, runs)
    plot_curves(options, setting, runs)
    say("\n".join(lines))


def modes_table(runs: list[dict[str, Any]]) -> list[str]:
    """What the modes of the same policies earn, in rounds of their own."""
    lines = [
        "Deterministic, the mean:",
        "",
        "| method | 0 | 1 | 2 | 3 |",
        "|---" * (STEPS + 2) + "|",
    ]
    for method, scores in of_methods(runs, "test_tasks_modes").items():
        means = [f"{x:.1f}" for x in scores.mean((0, 2))]
        lines.append(f"| {LABELS[method]} | {' | '.join(means)} |")
    return [*lines, ""]


def load(folder: Path, env: str) -> list[dict[str, Any]]:
    paths = sorted(folder.glob(f"{env}-*-seed*.json"))
    runs = [json.loads(path.read_text()) for path in paths]
    return sorted(runs, key=lambda r: (METHODS.index(r["method"]), r["seed"]))


def of_methods(runs: list[dict[str, Any]], what: str) -> dict[str, np.ndarray]:
    """Returns of the last episode by method: `[seeds, K + 1, M]`."""
    scores: dict[str, list[np.ndarray]] = {}
    for found in runs:
        scores.setdefault(found["method"], []).append(np.array(found[what])[..., -1])
    return {method: np.stack(each) for method, each in scores.items()}


def plot_steps(options: Options, setting: Setting, runs: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6.0, 4.0), layout="constrained")
    for method, scores in of_methods(runs, "test_tasks").items():
        rows = [interval(scores[:, k], task_bootstrap=True) for k in range(STEPS + 1)]
        (line,) = axes.plot([row["iqm"] for row in rows], marker="o", label=LABELS[method])
        axes.fill_between(
            range(STEPS + 1),
            [row["low"] for row in rows],
            [row["high"] for row in rows],
            color=line.get_color(),
            alpha=0.2,
        )
    for k, value in setting.bar.items():
        axes.plot([k - 0.15, k + 0.15], [value, value], color="black")
    axes.set_xticks(range(STEPS + 1))
    axes.set_xlabel(f"gradient steps on {ROWS} rows each")
    axes.set_ylabel("return on held-out tasks")
    axes.set_title(f"{setting.env} (interquartile mean, 95 % interval)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.out / f"{options.env}-steps.png", dpi=110)
    plt.close(figure)


def plot_curves(options: Options, setting: Setting, runs: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6.0, 4.0), layout="constrained")
    colors: dict[str, Any] = {}
    for found in runs:
        method, curve = found["method"], found["curve"]
        if not curve:
            continue
        (line,) = axes.plot(
            np.array(curve["timesteps"]) / 1e6,
            curve["episode_return"],
            color=colors.get(method),
            label=None if method in colors else LABELS[method],
        )
        colors[method] = line.get_color()
    axes.set_xlabel("million environment steps")
    axes.set_ylabel("return of the adapted policy on training tasks")
    axes.set_title(setting.env)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.out / f"{options.env}-curves.png", dpi=110)
    plt.close(figure)


def describe(returns: np.ndarray) -> str:
    """Of `[K + 1, M, E]`."""
    return "after 0, 1, ... gradient steps " + ", ".join(
        f"{x:.1f}" for x in returns[..., -1].mean(1)
    )


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(tyro.cli(Options))
