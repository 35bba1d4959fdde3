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
from ssm_fast.meta_rl.meta_maml import MetaMAML
from ssm_fast.native import Plan, Reason, plan_of
from ssm_fast.native.step import step_plan
from ssm_fast.nn.cells import DenseCell
from ssm_fast.nn.stages import NetworkStages, Stage


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
    "statistics in place": (
        lambda m: setattr(m.obs_norm.mean, "data", m.obs_norm.mean.data.float()),
        "obs_norm.mean is no contiguous float64 [3]",
    ),
    "pruned": (_pruned, "encoder has a hook"),
    "critic of one": (
        lambda m: setattr(m.critic_network, "observations", nn.Linear(3, 1)),
        "critic_network.observations has 1 outputs, not 6",
    ),
    "log_std": (lambda m: setattr(m, "log_std", nn.Parameter(torch.zeros(3))), "log_std is [3]"),
    "own cell": (
        lambda m: setattr(m.layers[0], "cell", type("Mine", (DenseCell,), {})()),
        "the cell of layers.0 is a Mine, not a DenseCell",
    ),
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


class Staged(nn.Module):
    """A model that somebody else wrote, with an attribute or a method of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(3, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.stages[0](x)
        return y


def test_other_stages() -> None:
    assert str(plan_of(Staged())) == "Staged has no stages()"
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    assert MetaMAML(Staged()).meta_update([(x, y, x, y)]) > 0.0
    method = type("Method", (nn.Module,), {"stages": lambda self: [1]})
    assert str(plan_of(method())) == "stages() of Method gives no NetworkStages"


def _linear(inputs: int, outputs: int) -> Stage:
    weight = nn.Parameter(torch.zeros(outputs, inputs))
    parameters = [(weight, (outputs, inputs)), (None, (outputs,)), (None, (outputs, 0))]
    return Stage("linear", inputs, outputs, parameters)


def _scan(inputs: int, N: int) -> Stage:
    matrices = [nn.Parameter(torch.zeros(N, n)) for n in (N, inputs)]
    shapes = [(N, N), (N, inputs)]
    none = [(None, (N,))] * 3
    return Stage("scan", inputs, N, [*zip(matrices, shapes, strict=True), *none], state=N)


@pytest.mark.parametrize(
    ("trunk", "branches", "sentence"),
    [
        ([_scan(3, 4), _scan(4, 5)], [[_linear(5, 2)]], "states have the sizes [4, 5]"),
        ([_linear(3, 4)], [[_linear(4, 2)]], "states have the sizes []"),
        ([_scan(3, 4)], [[_scan(4, 4)]], "a branch has a state"),
        ([_scan(3, 4)], [[_linear(4, 2)], [_linear(4, 2)]], "the values have [2] outputs"),
        ([_scan(3, 4)], [[_linear(5, 2)]], "a linear stage takes 5 features, not 4"),
    ],
)
def test_stages_that_native_code_cannot_run(
    trunk: list[Stage], branches: list[list[Stage]], sentence: str
) -> None:
    class Described(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            chains = [trunk, *branches]
            tensors = [p for chain in chains for stage in chain for p in stage.tensors()]
            self.weights = nn.ParameterList([p for p in tensors if p is not None])

        def stages(self) -> NetworkStages:
            return NetworkStages(trunk, [(branch, False) for branch in branches])

    assert sentence in str(plan_of(Described()))


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
    wide = StateSpaceModel(4, 3, 1)
    wide.C[2] = nn.Linear(64, 4)  # which D x of one output broadcasts to
    assert str(plan_of(wide)) == "C.2.out_features is 4, not 1"
    model.C[1] = nn.ReLU()
    assert str(plan_of(model)) == "C is no linear layer, tanh and linear layer"
