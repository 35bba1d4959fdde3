"""Where the time of PPO goes: physics, policy, learning, and the Python between the steps.

python benchmarks/profile_ppo.py --env HalfCheetah-v5

A clock stands around the native calls of a rollout (the physics of a step, the policy's step) and around the update;
what is left of the rollout is Python between the steps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from contest import machine
from mujoco.batch import Batch

from ssm_fast.core import ImprovedSSM
from ssm_fast.env_runner import Environment
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.native.step import PolicyStep


@dataclass(frozen=True)
class Options:
    """Where the time of PPO goes: physics, policy, learning, and the Python between the steps."""

    env: str = "HalfCheetah-v5"
    """A MuJoCo task that the vector physics runs."""
    hidden_dim: int = 128
    num_layers: int = 2
    mini_batch_size: int = 128
    iterations: int = 20
    out: Path | None = None
    """Also write the figures there, as JSON."""


class Clock:
    """Seconds within functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the time of its calls counted."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            return result

        return timed


def main(options: Options) -> None:
    clock = Clock()

    with ExitStack() as stack:
        env = stack.enter_context(Environment(options.env, 8, seed=0, physics="vector"))
        torch.manual_seed(0)
        model = ImprovedSSM(
            env.input_dim,
            env.action_dim,
            hidden_dim=options.hidden_dim,
            num_layers=options.num_layers,
            normalize_observations=True,
        )
        trainer = PPOTrainer(model, mini_batch_size=options.mini_batch_size, seed=0)
        trainer.train(env, 2048)
        for owner, name, part in (
            (PolicyStep, "run", "policy, native"),
            (Batch, "step", "physics, native"),
            (trainer, "collect_rollout", "rollout"),
            (trainer, "update", "update"),
        ):
            timed = clock.around(part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        began = time.perf_counter()
        trainer.train(env, 2048 * options.iterations)
        seconds = time.perf_counter() - began
    show(options, clock.seconds, seconds)


def show(options: Options, parts: dict[str, float], seconds: float) -> None:
    native = ("physics, native", "policy, native")
    between = parts.pop("rollout") - sum(parts[part] for part in native)
    shares = {
        **{part: parts[part] / seconds for part in (*native, "update")},
        "Python between the steps": between / seconds,
    }
    shares["resets, statistics and the rest"] = 1.0 - sum(shares.values())
    steps_per_second = 2048 * options.iterations / seconds
    lines = [f"{options.env}, {steps_per_second:.0f} steps/s", "", "| part | share |", "|---|---|"]
    lines += [f"| {part} | {share:.1%} |" for part, share in shares.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.out is not None:
        found = {"shares": shares, "steps_per_second": steps_per_second}
        settings = {name: str(value) for name, value in vars(options).items()}
        options.out.write_text(
            json.dumps({"settings": settings, **found, "machine": machine()}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
