"""What one process and several are to do alike; as a script, what each of several does."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import torch

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.env_runner import Environment
from ssm_fast.meta_rl import meta_rl_trainer
from ssm_fast.meta_rl.distributed import World, join_world
from ssm_fast.meta_rl.meta_maml import inner_update
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer, TrainingResult
from ssm_fast.nn.running_norm import RunningNorm

CLOCKS = ("seconds", "steps_per_second", "playing")
PPO: dict[str, tuple[str, int, dict[str, Any]]] = {
    # of 5 rows, two processes have 3 and 2; of 2 sequences, often all are those of one
    "discrete": (
        "CartPole-v1",
        5,
        {"clip_value_loss": True, "entropy_coef": 0.01, "target_kl": 0.02, "learning_rate": 3e-3},
    ),
    "continuous": ("Pendulum-v1", 5, {"learning_rate": 1e-3, "staggered_resets": True}),
}
META: dict[str, tuple[str, dict[str, Any]]] = {
    # minibatches of 2 tasks and of 1, and of 3, of which two processes take 2 and 1
    "discrete": ("ssm_fast/CartPoleFamily-v0", {"inner_steps": 1, "tasks_per_minibatch": 2}),
    "continuous": ("ssm_fast/HalfCheetahDir-v0", {"inner_steps": 2, "first_order": True}),
}


def everything(world: World) -> dict[str, Any]:
    """Weights, statistics and figures of all trainings."""
    done = {f"ppo {kind}": train_ppo(kind, world) for kind in PPO}
    done |= {f"meta_rl {kind}": train_meta_rl(kind, world) for kind in META}
    return done | {"breakdown": break_down(world)}


def train_ppo(kind: str, world: World) -> dict[str, Any]:
    """PPO in a world's share of the rows."""
    env_id, rows, options = PPO[kind]
    env = Environment(env_id, len(world.share(rows)))
    trainer = PPOTrainer(
        _model(env),
        num_steps=24,
        sequence_length=8,
        mini_batch_size=16,
        ppo_epochs=3,
        seed=5,
        world=world,
        **options,
    )
    result = trainer.train(env, rows * 24 * 4)
    return _summary(trainer, result) | {"return_norm": trainer.return_norm.state_dict()}


def train_meta_rl(kind: str, world: World) -> dict[str, Any]:
    """Meta-training of 3 tasks an epoch with 2 rows each, in a world's share of the tasks."""
    env_id, options = META[kind]
    env = Environment(env_id, 2 * len(world.share(3)))
    trainer = MetaRLTrainer(
        _model(env),
        world=world,
        **{
            "tasks_per_epoch": 3,
            "tasks_per_minibatch": 3,
            "num_steps": 12,
            "outer_epochs": 2,
            "evaluation_interval": 2,
            "seed": 5,
            **options,
        },
    )
    result = trainer.train(env, 3, test_tasks=env.family.test_tasks[:4])
    return _summary(trainer, result) | {"rates": {n: r.detach() for n, r in trainer.rates.items()}}


def break_down(world: World) -> dict[str, Any]:
    """What an evaluation and a training say where inner steps lead to NaN in the last task."""
    env_id, options = META["discrete"]
    env = Environment(env_id, 2 * len(world.share(3)))
    trainer = MetaRLTrainer(
        _model(env), world=world, tasks_per_epoch=3, num_steps=12, seed=5, **options
    )
    tasks = env.family.test_tasks[:4]

    def update(*arguments: Any) -> Any:
        adapted, losses = inner_update(*arguments)
        if world.rank == world.size - 1:
            adapted["actor.bias"][-1] = math.nan
        return adapted, losses

    meta_rl_trainer.inner_update = update
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            returns = trainer.evaluate(env, tasks, 1)
        try:
            trainer.train(env, 1, train_tasks=tasks, test_tasks=())
        except FloatingPointError as error:
            stopped = str(error)
    finally:
        meta_rl_trainer.inner_update = inner_update
    said = [str(warning.message) for warning in caught]
    return {"returns": torch.from_numpy(returns), "said": said, "stopped": stopped}


def _model(env: Environment) -> ImprovedSSM:
    torch.manual_seed(3)
    model = ImprovedSSM(
        env.input_dim,
        env.action_dim,
        state_dim=5,
        hidden_dim=8,
        discrete=env.discrete,
        normalize_observations=True,
    )
    with torch.no_grad():  # a policy that depends on what it sees
        model.actor.weight.normal_()
    return model.double()


def _summary(trainer: PPOTrainer | MetaRLTrainer, result: TrainingResult) -> dict[str, Any]:
    return {
        "model": trainer.model.state_dict(),
        "metrics": [
            {k: v for k, v in row.items() if k not in CLOCKS and not math.isnan(v)}
            for row in result.metrics
        ],
        "returns": result.episode_returns,
        "lengths": result.episode_lengths,
        "timesteps": result.timesteps,
    }


def talk(world: World, x: torch.Tensor) -> dict[str, Any]:
    """The methods of a world, with each rank's share of the rows of `x` [R, F]."""
    own = world.share(len(x))
    part = x[own.start : own.stop]
    rows = world.rows(len(part))
    norm = RunningNorm(x.shape[1])
    world.update(norm, torch.ones(1, x.shape[1]))  # of which every rank has one
    world.update(norm, part)
    chosen = torch.tensor([0, 2, 3, 6])  # minibatches of rows 0, 2, 3 and 6, and of row 0 alone
    parts = [rows.part(batch) for batch in (chosen, chosen[:1])]
    scaled = world.standardize([part[items, 0] for items, _ in parts], [w for _, w in parts])
    errors = []
    for failing in (0, 1):
        try:
            with world.share_errors():
                if world.rank == failing:
                    raise FloatingPointError(f"row {own.start} is not finite")
        except FloatingPointError as error:
            errors.append(str(error))
    with world.share_errors():  # after an error, and without one
        pass
    return {
        "rows": (rows.first, rows.count, rows.total),
        "own": torch.equal(rows.of(x), part),
        "gathered": world.gather(part),
        "gathered columns": world.gather(part.T.contiguous() > 0.0, 1),
        "parts": [(items.tolist(), weight) for items, weight in parts],
        "split": [(i.tolist(), w) for i, w in map(world.split, (chosen, chosen[:1]))],
        "scaled": scaled,
        "average": world.average(part.mean(0), len(part) / len(x)),
        "averages": world.average_all([part.mean(0), part.mean()], len(part) / len(x)),
        "variances": world.variances(part, part[:, 1]),
        "norm": norm.state_dict(),
        "first": world.first({"rank": world.rank, "pi": math.pi, "name": "Größe", "none": None}),
        "errors": errors,
        "said": (world.is_first_to_say("once"), world.is_first_to_say("once")),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_world(timeout=60.0) as joined:
        torch.manual_seed(0)
        summary = {"talk": talk(joined, torch.randn(7, 3, dtype=torch.float64))}
        torch.save(summary | everything(joined), f"{sys.argv[1]}/rank{joined.rank}.pt")
