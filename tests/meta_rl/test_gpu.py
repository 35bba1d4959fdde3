"""Trainings on a GPU, with the policy through Triton."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("gymnasium", reason="trainings need the extra rl")
pytest.importorskip("tyro", reason="trainings need the extra rl")

from ssm_fast import cli
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner import Environment
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.policy_gradient_trainer import PolicyGradientTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer
from ssm_fast.meta_rl.rollout import Rollout
from ssm_fast.meta_rl.run import RunDirectory

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.isa_independent,
]

GPU = "cuda"
CLOSE = {"rtol": 1e-3, "atol": 1e-5}  # of weights that a few steps of Adam moved by 1e-3 each


def _model(env: Environment) -> ImprovedSSM:
    torch.manual_seed(3)
    return ImprovedSSM(
        *(env.input_dim, env.action_dim, 16, 32),
        discrete=env.discrete,
        normalize_observations=True,
    )


def _on_cpu(rollout: Rollout) -> Rollout:
    moved = {
        field.name: value.cpu()
        for field in fields(Rollout)
        if isinstance(value := getattr(rollout, field.name), Tensor)
    }
    return replace(rollout, **moved)


def _assert_on_gpu_and_finite(model: torch.nn.Module) -> None:
    for name, x in model.state_dict().items():
        assert x.device.type == GPU, name
        assert torch.isfinite(x).all(), name


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_ppo(env_id: str, tmp_path: Path) -> None:
    env = Environment(env_id, 4)
    options: dict[str, Any] = {"num_steps": 32, "ppo_epochs": 2, "seed": 5, "learning_rate": 1e-3}
    options["scale_rewards"] = False  # by returns that begin before the rollout
    trainer = PPOTrainer(_model(env), device=GPU, **options)
    trainer.train(env, 2 * 4 * 32)
    _assert_on_gpu_and_finite(trainer.model)

    other = PPOTrainer(copy.deepcopy(trainer.model).cpu(), **options)
    other.load_state_dict(trainer.state_dict())
    rollout = trainer.collect_rollout(env)
    metrics, expected = trainer.update(rollout), other.update(_on_cpu(rollout))
    assert metrics == pytest.approx(expected, rel=1e-2, abs=1e-4)
    torch.testing.assert_close(
        {name: x.cpu() for name, x in trainer.model.state_dict().items()},
        dict(other.model.state_dict()),
        **CLOSE,
    )

    trainer.save(tmp_path / "state.pt")
    weights = []
    for _ in range(2):
        again = PPOTrainer(_model(env), device=GPU, **options)
        again.load(tmp_path / "state.pt")
        again.train(env, 4 * 32)
        weights.append(again.model.state_dict())
    torch.testing.assert_close(*weights, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("env_id", ["ssm_fast/CartPoleFamily-v0", "ssm_fast/HalfCheetahDir-v0"])
def test_meta_rl(env_id: str) -> None:
    env = Environment(env_id, 3 * 4)
    options: dict[str, Any] = {"tasks_per_epoch": 3, "num_steps": 20, "inner_steps": 1, "seed": 5}
    trainer = MetaRLTrainer(_model(env), device=GPU, **options)
    assert env.family is not None
    tasks = (env.family.train_tasks * 2)[:3]  # there are two directions
    trainer.train(env, 2, test_tasks=tasks)
    _assert_on_gpu_and_finite(trainer.model)

    other = MetaRLTrainer(copy.deepcopy(trainer.model).cpu(), **options)
    other.load_state_dict(trainer.state_dict())
    rounds = trainer.adapt(env, tasks, 1, seed=7).rounds
    for one in (trainer, other):
        one._seed_generators(0)  # of the minibatches
        one.update([{name: x.to(one.device) for name, x in batch.items()} for batch in rounds])
    for (name, x), y in zip(
        trainer.model.named_parameters(), other.model.parameters(), strict=True
    ):
        torch.testing.assert_close(x.detach().cpu(), y.detach(), **CLOSE, msg=name)


def test_reinforce() -> None:
    env = Environment("CartPole-v1", 4)
    trainer = PolicyGradientTrainer(StateSpaceModel(8, 4, 2, 16), seed=5, device=GPU)
    assert len(trainer.train(env, 12).episode_returns) == 12
    _assert_on_gpu_and_finite(trainer.model)


def test_the_command_line(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    args = ["train", "--env", "Pendulum-v1", "--batch_size", "2", "--num_steps", "40"]
    args += ["--ppo_epochs", "2", "--state_dim", "4", "--hidden_dim", "8", "--out", run]
    assert cli.main([*args, "--device", GPU, "--steps", "160"]) == 0
    assert cli.main(["train", "--resume", "--out", run, "--steps", "320"]) == 0
    cpu = ["train", "--resume", "--out", run, "--steps", "480", "--device", "cpu"]
    assert cli.main(cpu) == 0
    assert [row["iteration"] for row in RunDirectory(run, resume=True).read_rows()][-1] == 6
    assert cli.main(["evaluate", run, "--episodes", "2"]) == 0
