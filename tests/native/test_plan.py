"""`plan_of`: which models run natively, and the sentence for those that do not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ssm_fast.core import ImprovedSSM, StateSpaceModel
from ssm_fast.native import Plan, Reason, plan_of
from ssm_fast.native.step import step_plan


def improved(**options: Any) -> ImprovedSSM:
    torch.manual_seed(0)
    return ImprovedSSM(3, 2, 4, 5, normalize_observations=True, critic_dim=6, **options)


def _hook(model: Any) -> None:
    model.layers[1].register_forward_hook(lambda *_: None)


def _pruned(model: Any) -> None:
    prune.l1_unstructured(model.encoder, "weight", 0.3)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (_hook, "layers.1 has a hook"),
    "own forward": (lambda m: setattr(m.actor, "forward", m.actor.forward), "actor has a hook"),
    "other module": (lambda m: setattr(m, "actor", nn.Identity()), "actor is a Identity"),
    "other layer": (lambda m: m.layers.append(m.layers[0]), "the number of layers is 3, not 2"),
    "method": (lambda m: setattr(m, "normalize", m.normalize), "the model overrides normalize()"),
    "half": (lambda m: m.half(), "is torch.float16"),
    "device": (lambda m: m.to("meta"), "is on meta"),
    "mixed": (lambda m: m.actor.double(), "is torch.float64"),
    "shape": (
        lambda m: setattr(m.actor, "weight", nn.Parameter(torch.zeros(2, 4))),
        "a weight of a linear stage is [2, 4], not [2, 5]",
    ),
    "not contiguous": (
        lambda m: setattr(m.layers[0].A, "data", m.layers[0].A.data.t()),
        "layers.0.A does not lie in memory as a contiguous tensor",
    ),
    "norm": (
        lambda m: setattr(m.layers[0], "norm", nn.RMSNorm(5)),
        "layers.0.norm is a RMSNorm, not an nn.LayerNorm",
    ),
    "statistics": (
        lambda m: setattr(m.obs_norm, "mean", m.obs_norm.mean.float()),
        "obs_norm.mean is no contiguous float64 [3]",
    ),
    "pruned": (_pruned, "encoder has a hook"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_says_why_a_model_has_no_plan(change: str) -> None:
    model = improved()
    assert isinstance(plan_of(model), Plan)
    act, sentence = CHANGES[change]
    act(model)
    reason = plan_of(model)
    assert isinstance(reason, Reason)
    assert not reason
    assert sentence in str(reason)


def test_a_module_without_stages() -> None:
    assert str(plan_of(nn.Linear(2, 2))) == "Linear has no stages()"


def test_is_kept_until_the_model_changes() -> None:
    model = improved()
    plan = plan_of(model)
    with torch.no_grad():
        model.encoder.weight.mul_(2.0)
    model.load_state_dict(model.state_dict())
    assert plan_of(model) is plan
    for change in (
        lambda: setattr(model.layers[0].norm, "eps", 0.5),
        lambda: setattr(model, "use_residual", False),
        lambda: setattr(model.encoder, "bias", None),
        lambda: setattr(model, "encoder", nn.Linear(3, 5)),
        lambda: model.double(),
        lambda: setattr(model.layers[0], "__class__", type("Mine", (type(model.layers[0]),), {})),
    ):
        change()
        other = plan_of(model)
        assert isinstance(other, Plan)
        assert other is not plan
        plan = other


def test_lets_go_of_a_model() -> None:
    model = improved()
    with torch.no_grad():
        model.get_action(torch.zeros(1, 3), model.init_hidden(1))
    assert plan_of(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_copies_have_plans_of_their_own() -> None:
    model = improved()
    plan = plan_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = plan_of(other)
        assert isinstance(found, Plan)
        assert found is not plan
        assert found.parameters[0] is next(other.parameters())


def test_says_why_a_call_is_not_native() -> None:
    model = improved()
    x, h = torch.zeros(2, 3), model.init_hidden(2)
    assert str(step_plan(model, x, h)) == "gradients are enabled"
    with torch.no_grad():
        assert step_plan(model, x, h)
        assert "is torch.float64, the parameters" in str(step_plan(model, x.double(), h))
        assert "no plain tensor" in str(step_plan(model, x.to("meta"), h))
        with torch.autocast("cpu"):
            assert str(step_plan(model, x, h)) == "autocast is enabled"
        reasons: list[Any] = []
        torch.func.vmap(lambda x: (reasons.append(step_plan(model, x, h)), x)[1])(x[None])
        assert not reasons[0]


def test_state_space_models() -> None:
    model = StateSpaceModel(4, 3, 2)
    plan = plan_of(model)
    assert isinstance(plan, Plan)
    assert (plan.inputs, plan.outputs, plan.states) == (3, 2, [4])
    model.C[1] = nn.ReLU()
    assert str(plan_of(model)) == "C is no linear layer, tanh and linear layer"
