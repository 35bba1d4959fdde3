"""What PPO in several processes on the loopback interface pays for talking, beside one process.

`python benchmarks/distributed_overhead.py` starts itself under torchrun. HalfCheetah-v5, one thread a process; by
default 8 environments x 256 steps in all, 10 epochs over minibatches of 256 steps, the settings of bench_ppo.py.
An all-reduce is timed twice: alone, where all processes call it at once, and in the training, where it also waits
for the slowest of them. On a busy machine, waiting is most of both: seconds of the processor tell what the work
itself takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from contest import machine

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.env_runner.environment import Environment
from ssm_fast.meta_rl.distributed import World, join_world
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

ENV = "HalfCheetah-v5"
STEPS, EPOCHS = 256, 10
TALK = ("average", "standardize", "variances", "update", "gather", "first", "together", "rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--mini_batch", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--results", type=Path, help="folder of the JSON file")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={options.processes}",
        ]
        command = [sys.executable, "-m", *torchrun, *sys.argv]
        raise SystemExit(subprocess.run(command, check=False).returncode)

    torch.set_num_threads(1)
    with join_world() as world:
        alone = None
        if world.rank == 0:  # the others wait for the first all-reduce below
            alone = train(World(), options)
        floor = all_reduce_seconds(world)
        together = train(world, options)
        if alone is not None:
            report(world, alone, together, floor, options)


def make_trainer(world: World, env: Environment, mini_batch: int) -> PPOTrainer:
    torch.manual_seed(0)
    model = ImprovedSSM(env.input_dim, env.action_dim, normalize_observations=True)
    return PPOTrainer(
        model, num_steps=STEPS, mini_batch_size=mini_batch, ppo_epochs=EPOCHS, seed=0, world=world
    )


def train(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an iteration, and of those the ones in each method of the world."""
    iterations, size = options.iterations, options.envs * STEPS
    with Environment(ENV, len(world.share(options.envs)), seed=0) as env:
        trainer = make_trainer(world, env, options.mini_batch)
        trainer.train(env, size)
        spent = watch(world)
        began, worked = time.perf_counter(), time.process_time()
        trainer.train(env, iterations * size)
        seconds, work = time.perf_counter() - began, time.process_time() - worked
    return {
        "seconds": seconds / iterations,
        "work": float(world.gather(torch.tensor([work])).sum()) / iterations,
        "spent": {name: x / iterations for name, x in spent.items()},
    }


def watch(world: World) -> dict[str, float]:
    """Sums up the seconds in each method of a world from now on; nested calls count once."""
    spent: dict[str, float] = defaultdict(float)
    depth = [0]

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            depth[0] += 1
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                depth[0] -= 1
                if depth[0] == 0:
                    spent[name] += time.perf_counter() - began

        return run

    for name in set(TALK) - {"together"}:  # whose inside is the rollout
        setattr(world, name, timed(name, getattr(world, name)))
    return spent


def all_reduce_seconds(world: World, calls: int = 300) -> dict[str, float]:
    """Seconds of an all-reduce of PPO's gradient, called by all processes at once."""
    with Environment(ENV) as env:
        trainer = make_trainer(World(), env, STEPS)
    gradient = torch.randn(trainer.optimizer.param_groups[0]["params"][0].shape)
    times, work = [], []
    for _ in range(calls):
        world.first(0)
        began, worked = time.perf_counter(), time.process_time()
        world.average(gradient, 1.0 / world.size)
        times.append(time.perf_counter() - began)
        work.append(time.process_time() - worked)
    return {
        "parameters": gradient.numel(),
        "all_reduce_us_median": statistics.median(times) * 1e6,
        "all_reduce_us_least": min(times) * 1e6,
        "all_reduce_us_of_processor": statistics.mean(work) * 1e6,
    }


def report(
    world: World,
    alone: dict[str, Any],
    together: dict[str, Any],
    floor: dict[str, float],
    options: argparse.Namespace,
) -> None:
    updates = EPOCHS * options.envs * STEPS // options.mini_batch
    figures = {
        "processes": world.size,
        "envs": options.envs,
        "mini_batch": options.mini_batch,
        "updates": updates,
        **floor,
        "all_reduce_us_in_training": together["spent"]["average"] / updates * 1e6,
        "iteration_ms_of_one": alone["seconds"] * 1e3,
        "iteration_ms_of_all": together["seconds"] * 1e3,
        "processor_ms_of_one": alone["work"] * 1e3,
        "processor_ms_of_all": together["work"] * 1e3,
        "talking_share": sum(together["spent"].values()) / together["seconds"],
        "all_reduce_share": together["spent"]["average"] / together["seconds"],
        "ms_in": {name: x * 1e3 for name, x in sorted(together["spent"].items())},
        "load": os.getloadavg()[0],
        "machine": machine(),
    }
    for name, value in figures.items():
        sys.stdout.write(f"{name:30} {f'{value:.3g}' if isinstance(value, float) else value}\n")
    if options.results is not None:
        text = json.dumps(figures, indent=2) + "\n"
        (options.results / f"distributed-{world.size}.json").write_text(text)


if __name__ == "__main__":
    main()
