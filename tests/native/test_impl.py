"""``impl`` of the trainers: native code, autograd, or whichever can, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssm_fast.core import ImprovedSSM
from ssm_fast.env_runner import Environment
from ssm_fast.meta_rl.meta_maml import MetaMAML
from ssm_fast.meta_rl.meta_rl_trainer import MetaRLTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer


def _ppo(model: ImprovedSSM, impl: Any) -> Any:
    trainer = PPOTrainer(model, num_steps=8, ppo_epochs=1, seed=0, impl=impl)
    with Environment("CartPole-v1", 2, max_episode_steps=8) as env:
        trainer.train(env, 32)
    return trainer


def _meta_rl(model: ImprovedSSM, impl: Any) -> Any:
    trainer = MetaRLTrainer(model, tasks_per_epoch=2, seed=0, impl=impl)
    with Environment("ssm_fast/CartPoleFamily-v0", 4, max_episode_steps=8) as env:
        trainer.train(env, 1)
    return trainer


def _maml(model: ImprovedSSM, impl: Any) -> Any:
    maml = MetaMAML(model, impl=impl)
    x, y = torch.randn(4, 3, 4), torch.randn(4, 3, 2)
    maml.meta_update([(x, y, x, y)] * 2)
    return maml


RUNS: dict[str, Callable[[ImprovedSSM, Any], Any]] = {
    "PPO": _ppo,
    "meta-RL": _meta_rl,
    "MAML": _maml,
}


def _model() -> ImprovedSSM:
    torch.manual_seed(0)
    return ImprovedSSM(4, 2, 4, 5, discrete=True)


@pytest.mark.parametrize("run", RUNS)
def test_auto_says_which_path_it_takes(run: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ssm_fast"):
        assert RUNS[run](_model(), "auto").gradients.path == "native"
        model = _model()
        model.layers[1].register_forward_hook(lambda *_: None)
        path = RUNS[run](model, "auto").gradients.path
    assert path.startswith("autograd: layers.1 has a hook")
    assert [r.getMessage() for r in caplog.records if "gradients are" in r.getMessage()] == [
        "gradients are native",
        f"gradients are {path}",
    ]


@pytest.mark.parametrize("run", RUNS)
def test_native_raises_with_the_reason(run: str) -> None:
    assert RUNS[run](_model(), "native").gradients.path == "native"
    model = _model()
    model.actor.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"impl='native' is not possible: actor.weight is not"):
        RUNS[run](model, "native")


@pytest.mark.parametrize("run", RUNS)
def test_autograd_gives_the_same(run: str) -> None:
    results = []
    for impl in ("native", "autograd"):
        model = _model().double()
        torch.manual_seed(1)
        trainer = RUNS[run](model, impl) if run != "MAML" else None
        if trainer is None:
            x, y = torch.randn(4, 3, 4).double(), torch.randn(4, 3, 2).double()
            MetaMAML(model, impl=impl).meta_update([(x, y, x, y)] * 2)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("run", RUNS)
def test_unknown(run: str) -> None:
    with pytest.raises(
        ValueError, match=r"unknown impl 'fast'; expected one of \['auto', 'native'"
    ):
        RUNS[run](_model(), "fast")
