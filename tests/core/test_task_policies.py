from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_fast.core import ImprovedSSM, TaskPolicies

G, B, I, K, N, L = 3, 5, 4, 2, 6, 2
OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "state"},
    {"use_layer_norm": False, "use_residual": False},
    {"discrete": True},
    {"normalize_observations": True},
    {"critic_dim": 5},
]


def make(**options: Any) -> ImprovedSSM:
    model = ImprovedSSM(I, K, state_dim=N, hidden_dim=8, num_layers=L, **options).double()
    if model.obs_norm is not None:
        model.obs_norm.update(3.0 * torch.randn(50, I) + 1.0)
    return model


def task_weights(model: ImprovedSSM, *leave_out: str) -> dict[str, Tensor]:
    return {
        name: torch.stack([p.detach() + 0.2 * torch.randn_like(p) for _ in range(G)])
        for name, p in model.named_parameters()
        if name not in leave_out
    }


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, h = torch.randn(G, B, I).double(), torch.randn(L, G, B, N).double()
    return x, h, torch.rand(G, B) < 0.4


def alone(model: ImprovedSSM, weights: dict[str, Tensor], g: int) -> ImprovedSSM:
    model = copy.deepcopy(model)
    model.load_state_dict({name: w[g] for name, w in weights.items()}, strict=False)
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_a_model_each(options: dict[str, Any]) -> None:
    model = make(**options)
    weights = task_weights(model, "log_std", "critic.bias")
    x, h, reset = inputs()
    together = TaskPolicies(model, weights).get_action(x, h, True, reset)
    for g in range(G):
        with torch.no_grad():
            one = alone(model, weights, g).get_action(x[g], h[:, g], True, reset[g])
        for i, (whole, part) in enumerate(zip(together, one, strict=True)):
            torch.testing.assert_close(whole[:, g] if i == 3 else whole[g], part)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_native_step_equals_the_modules(options: dict[str, Any], with_state: bool) -> None:
    model = make(**options)
    policies = TaskPolicies(model, task_weights(model))
    x, h, reset = inputs()
    arguments = (x, h, False, reset) if with_state else (x,)
    torch.manual_seed(3)
    native = policies.get_action(*arguments)
    handle = model.actor.register_forward_hook(lambda module, args, output: None)
    torch.manual_seed(3)
    modules = policies.get_action(*arguments)
    handle.remove()
    for one, other in zip(native, modules, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_noise_of_some_tasks_gives_the_actions_that_they_take_among_all(
    options: dict[str, Any],
) -> None:
    model = make(**options)
    weights = task_weights(model)
    x, h, reset = inputs()
    torch.manual_seed(3)
    whole = TaskPolicies(model, weights).get_action(x, h, False, reset)
    torch.manual_seed(3)
    noise = model.draw_noise(G * B)
    some = TaskPolicies(model, {name: w[1:] for name, w in weights.items()})
    part = some.get_action(x[1:], h[:, 1:], False, reset[1:], noise[B:])
    for i in range(3):
        torch.testing.assert_close(part[i], whole[i][1:])


def test_keeps_the_weights_it_was_made_with() -> None:
    model = make()
    weights = task_weights(model)
    policies = TaskPolicies(model, weights)
    x, h, _ = inputs()
    before = policies.get_action(x, h, True)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert torch.equal(policies.get_action(x, h, True)[0], before)


def test_wrong_arguments() -> None:
    model = make()
    weights = task_weights(model)
    x, h, reset = inputs()
    with pytest.raises(ValueError, match="weights must hold"):
        TaskPolicies(model, {})
    with pytest.raises(KeyError, match=r"actor\.wait"):
        TaskPolicies(model, {"actor.wait": weights["actor.weight"]})
    with pytest.raises(ValueError, match=r"actor\.bias must have shape \[3, 2\], got \[2, 2\]"):
        TaskPolicies(model, weights | {"actor.bias": weights["actor.bias"][:2]})
    with pytest.raises(TypeError, match=r"actor\.bias"):
        TaskPolicies(model, weights | {"actor.bias": weights["actor.bias"].float()})
    policies = TaskPolicies(model, weights)
    with pytest.raises(ValueError, match="x must have shape"):
        policies.get_action(x[:2], h)
    with pytest.raises(TypeError, match="x must have the parameters' dtype"):
        policies.get_action(x.float(), h)
    with pytest.raises(ValueError, match="hidden_state must have shape"):
        policies.get_action(x, h[:, :2])
    with pytest.raises(ValueError, match="reset must have shape"):
        policies.get_action(x, h, reset=reset[:2])
    with pytest.raises(ValueError, match=r"noise must have shape \[15, 2\], got \[5, 2\]"):
        policies.get_action(x, h, noise=model.draw_noise(B))
