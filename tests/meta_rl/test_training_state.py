from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner.environment import Environment
from ssm_fast.meta_rl.policy_gradient_trainer import PolicyGradientTrainer
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.isa_independent

Trainer = PPOTrainer | PolicyGradientTrainer


def _ppo() -> Trainer:
    model = ImprovedSSM(4, 2, 4, 8, discrete=True, normalize_observations=True)
    return PPOTrainer(model, num_steps=8, ppo_epochs=1, seed=0)


def _reinforce() -> Trainer:
    return PolicyGradientTrainer(StateSpaceModel(state_dim=4, hidden_dim=8), seed=0)


@pytest.fixture(params=[_ppo, _reinforce])
def make(request: pytest.FixtureRequest) -> Callable[[], Trainer]:
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def state(make: Callable[[], Trainer]) -> dict[str, Any]:
    trainer = make()
    with Environment("CartPole-v1", 2) as env:
        trainer.train(env, 2)
    return deepcopy(trainer.state_dict())


def _huge() -> Tensor:
    return torch.zeros(1).expand(10**11)


def test_takes_a_state_over(make: Callable[[], Trainer], state: dict[str, Any]) -> None:
    trainer = make()
    trainer.load_state_dict(state)
    found = trainer.optimizer.state_dict()["state"]
    for i, moments in state["optimizer"]["state"].items():
        for name, moment in moments.items():
            assert torch.equal(found[i][name], moment)
            assert found[i][name].data_ptr() != moment.data_ptr()


def test_settings_by_the_names_of_older_versions(
    make: Callable[[], Trainer], state: dict[str, Any]
) -> None:
    trainer = make()
    old = "memory_pace" if isinstance(trainer, PPOTrainer) else "transition_lr_scale"
    state["settings"][old] = state["settings"].pop("recurrent_lr_scale")
    trainer.load_state_dict(state)
    state["settings"][old] = 0.5
    with pytest.raises(ValueError, match=r"recurrent_lr_scale must be 0\.5"):
        trainer.load_state_dict(state)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.flatten()[:1], "must have shape"),
        (lambda x: _huge(), "must have shape"),
        (lambda x: x.double(), "must have dtype"),
        (lambda x: x * math.nan, "is not finite"),
        (lambda x: x.to_sparse(), "dense tensor"),
        (lambda x: 0.0, "dense tensor"),
    ],
)
def test_a_moment_that_does_not_fit(
    name: str,
    change: Callable[[Tensor], Any],
    match: str,
    make: Callable[[], Trainer],
    state: dict[str, Any],
) -> None:
    moments = state["optimizer"]["state"][0]
    moments[name] = change(moments[name])
    with pytest.raises(ValueError, match=f"training state does not fit: optimizer.*{match}"):
        make().load_state_dict(state)


def test_a_moment_of_stride_zero_becomes_whole(
    make: Callable[[], Trainer], state: dict[str, Any]
) -> None:
    moments = state["optimizer"]["state"][0]
    moments["exp_avg"] = torch.zeros(()).expand_as(moments["exp_avg"])
    trainer = make()
    trainer.load_state_dict(state)
    parameter = trainer.optimizer.param_groups[0]["params"][0]
    assert trainer.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()


def test_the_options_of_the_optimizer_stay(
    make: Callable[[], Trainer], state: dict[str, Any]
) -> None:
    group = state["optimizer"]["param_groups"][0]
    group.update(lr=0.125, betas=(0.5, 0.5), amsgrad=True, fused=None, weight_decay=9.0)
    trainer = make()
    before = {k: v for k, v in trainer.optimizer.param_groups[0].items() if k != "params"}
    trainer.load_state_dict(state)
    after = {k: v for k, v in trainer.optimizer.param_groups[0].items() if k != "params"}
    assert after == {**before, "lr": 0.125}
    group["params"] = group["params"][:-1]
    with pytest.raises(ValueError, match="groups must hold the same parameters"):
        make().load_state_dict(state)


def test_a_tensor_that_does_not_fit(make: Callable[[], Trainer], state: dict[str, Any]) -> None:
    for part in {"model", "return_norm"} & state.keys():  # REINFORCE scales no returns
        name = next(iter(state[part]))
        whole = state[part][name]
        for value, match in (
            (_huge(), "must have shape"),
            (whole.half(), "must have dtype"),
            (whole * math.nan, "is not finite"),
        ):
            changed = {**state, part: {**state[part], name: value}}
            with pytest.raises(ValueError, match=f"does not fit: {part} tensor {name} .*{match}"):
                make().load_state_dict(changed)
        with pytest.raises(ValueError, match=f"{part} tensors missing"):
            make().load_state_dict({**state, part: {"x": whole}})


@pytest.mark.parametrize("value", [math.inf, -1, 10**400, "1", None])
def test_a_count_that_is_none(
    value: Any, make: Callable[[], Trainer], state: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="training state does not fit: iteration must be a count"):
        make().load_state_dict({**state, "iteration": value})
