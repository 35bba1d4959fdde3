"""A policy step without gradients, through the public get_action, beside the same modules and one product."""

from __future__ import annotations

import pytest
import torch
from contest import contest

from ssm_fast.bench.peers import GRUPolicy
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.native import plan_of
from ssm_fast.native.step import PolicyStep


@pytest.mark.parametrize("B", [1, 8, 64])
def test_policy_step(benchmark, B):
    torch.manual_seed(0)
    model = ImprovedSSM(17, 6)
    gru = GRUPolicy(17, 6, 64)
    x, state = torch.randn(B, 17), model.init_hidden(B)
    small, square = torch.randn(B, 64), torch.randn(64, 64)

    with torch.no_grad():
        plan = plan_of(model)
        assert plan
        step = PolicyStep(plan, plan.addresses())

        def modules() -> None:
            features, states = model._features(x, state, None)
            model.actor(features)
            model.critic(features)
            torch.stack(states)

        contest(
            benchmark,
            "get_action",
            {
                "get_action": lambda: model.get_action(x, state, True),
                "policy_step": lambda: step(x, state, None, None),
                "modules": modules,
                "GRUCell policy": lambda: gru(x, state),
                f"mm {B}x64x64": lambda: torch.mm(small, square),
            },
            calls=100,
        )
