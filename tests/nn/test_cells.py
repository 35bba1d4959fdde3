"""What holds for every recurrent cell, with every norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layer_references import weights
from nn.conformance import (
    CASES,
    LOOPS,
    RESETS,
    Case,
    every_cell,
    every_reset,
    sequence,
    with_and_without_bias,
)
from references import relative_rms
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

from ssm_fast.core import ImprovedSSM
from ssm_fast.native import Plan, plan_of
from ssm_fast.nn import SSMLayer
from ssm_fast.nn.cells import CELLS, WITH_STATE_NORM
from ssm_fast.nn.parameters import learning_rate_scales

Parameters = dict[str, Tensor]


def test_every_cell_has_a_loop() -> None:
    assert set(LOOPS) == set(CELLS) >= set(WITH_STATE_NORM)


@with_and_without_bias
@every_reset
def test_forward_equals_a_float64_loop(case: Case, resets: str) -> None:
    layer = case.make()
    x, s0, reset = sequence(layer, resets=resets)
    y, s = layer(x, s0, reset)
    y_ref, s_ref = LOOPS[case.cell](weights(layer), x.numpy(), s0.numpy(), reset.numpy(), case.norm)
    np.testing.assert_allclose(y.detach(), y_ref, atol=1e-12)
    np.testing.assert_allclose(s.detach(), s_ref[:, -1], atol=1e-12)


@every_cell
def test_float32_error_against_a_float64_loop(case: Case) -> None:
    layer = case.make(17, 31, 63, dtype=torch.float32)
    x, s0, reset = sequence(layer, 3, 65)
    y, s = layer(x, s0)
    y_ref, s_ref = LOOPS[case.cell](
        weights(layer), x.double().numpy(), s0.double().numpy(), None, case.norm
    )
    assert relative_rms(y, torch.from_numpy(y_ref)) <= 1e-5
    assert relative_rms(s, torch.from_numpy(s_ref[:, -1])) <= 1e-5

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        one = case.make(17, 31, 63, dtype=torch.float32).to(dtype)
        y, _ = one(x.to(dtype), s0.to(dtype), reset)
        return torch.autograd.grad(y.square().sum(), list(one.parameters()))

    for single, double in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert relative_rms(single, double) <= 1e-4


@with_and_without_bias
def test_step_equals_forward(case: Case) -> None:
    layer = case.make()
    x, s0, _ = sequence(layer)
    y, s_last = layer(x, s0)
    s: Tensor | None = s0
    for t in range(6):
        y_t, s = layer.step(x[:, t], s)
        torch.testing.assert_close(y_t, y[:, t], rtol=0, atol=1e-13)
    torch.testing.assert_close(s, s_last, rtol=0, atol=1e-13)
    y_1, s_1 = layer(x[:, :1])
    torch.testing.assert_close(layer.step(x[:, 0]), (y_1[:, 0], s_1))


@every_cell
@pytest.mark.parametrize("cut", [0, 1, 5, 6])
def test_split_in_two_equals_whole(case: Case, cut: int) -> None:
    layer = case.make()
    x, s0, reset = sequence(layer, resets="consecutive")
    reset[:, 5] = True
    y, s_last = layer(x, s0, reset)
    y1, s1 = layer(x[:, :cut], s0, reset[:, :cut])
    y2, s2 = layer(x[:, cut:], s1, reset[:, cut:])
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=0, atol=1e-13)
    torch.testing.assert_close(s2, s_last, rtol=0, atol=1e-13)


@every_cell
def test_an_empty_sequence_hands_the_state_on(case: Case) -> None:
    layer = case.make()
    x, s0, _ = sequence(layer, T=0)
    y, s = layer(x, s0)
    assert y.shape == (3, 0, 5)
    torch.testing.assert_close(s, s0)
    torch.testing.assert_close(layer(x)[1], torch.zeros_like(s0))


@every_cell
@pytest.mark.parametrize("start", [0, 3, 5])
def test_a_reset_starts_a_sequence_anew(case: Case, start: int) -> None:
    layer = case.make()
    x, s0, reset = sequence(layer)
    reset[:, start] = True
    y, s = layer(x, s0, reset)
    y_fresh, s_fresh = layer(x[:, start:])
    torch.testing.assert_close(y[:, start:], y_fresh)
    torch.testing.assert_close(s, s_fresh)
    late = reset.roll(1, 1)  # as PufferLib once did it
    assert not torch.isclose(layer(x, s0, late)[0][:, start], y[:, start]).all(-1).any()


@every_cell
def test_a_reset_cuts_the_gradient(case: Case) -> None:
    layer = case.make()
    x, s0, reset = sequence(layer, T=4)
    reset[:, 2] = True
    x.requires_grad_()
    s0.requires_grad_()
    y, _ = layer(x, s0, reset)
    grad_x, grad_s0 = torch.autograd.grad(y[:, 3].sum(), (x, s0))
    assert bool((grad_x[:, :2] == 0).all())
    assert bool((grad_s0 == 0).all())
    assert bool((grad_x[:, 2:].abs() > 0).any(-1).all())


def called_with(layer: SSMLayer, parameters: Parameters, *arguments: Tensor) -> Any:
    return functional_call(layer, parameters, arguments)


@every_cell
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    layer = case.make(2, 2, 3)
    x, s0, _ = sequence(layer, 2, 4)
    reset = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, s0: Tensor, *values: Tensor) -> Any:
        return called_with(layer, dict(zip(names, values, strict=True)), x, s0, reset)

    leaves = [value.detach().clone() for value in (x, s0, *layer.parameters())]
    arguments = tuple(leaf.requires_grad_() for leaf in leaves)
    assert gradcheck(run, arguments)
    assert gradgradcheck(run, arguments, fast_mode=True)


@every_cell
def test_vmap_over_parameters_of_tasks_equals_a_loop(case: Case) -> None:
    layer = case.make()
    x, s0, reset = sequence(layer, resets="consecutive")
    tasks = {
        name: torch.stack([value.detach() + 0.1 * torch.randn_like(value) for _ in range(3)])
        for name, value in layer.named_parameters()
    }

    def loss(parameters: Parameters) -> Tensor:
        y, s = called_with(layer, parameters, x, s0, reset)
        total: Tensor = y.square().mean() + s.sin().mean()
        return total

    def adapted(parameters: Parameters) -> Tensor:
        steps = grad(loss)(parameters)
        return loss({name: value - 0.1 * steps[name] for name, value in parameters.items()})

    def run(parameters: Parameters) -> Any:
        return called_with(layer, parameters, x, s0, reset), grad(adapted)(parameters)

    alone = [run({name: value[g] for name, value in tasks.items()}) for g in range(3)]
    (y, s), gradients = vmap(run)(tasks)
    for g, ((y_g, s_g), gradients_g) in enumerate(alone):
        torch.testing.assert_close((y[g], s[g]), (y_g, s_g))
        torch.testing.assert_close(
            {name: value[g] for name, value in gradients.items()}, gradients_g
        )


@every_cell
def test_strided_inputs_and_untouched_arguments(case: Case) -> None:
    layer = case.make()
    x, s0, _ = sequence(layer)
    y, s = layer(x, s0)
    wide = torch.randn(6, 3, 8, dtype=torch.float64)
    wide[..., 2:5] = x.transpose(0, 1)
    strided = wide.transpose(0, 1)[..., 2:5]
    state = torch.randn(3, 8, dtype=torch.float64)
    state[:, ::2] = s0
    before = wide.clone(), state.clone()
    torch.testing.assert_close(layer(strided, state[:, ::2]), (y, s))
    layer.step(strided[:, 0], state[:, ::2])
    torch.testing.assert_close((wide, state), before, rtol=0, atol=0)


@every_cell
def test_time_major_states(case: Case) -> None:
    layer = case.make()
    x, s0, reset = sequence(layer, resets="consecutive")
    s = layer.states(x, s0, reset)
    s_time_major = layer.states(x.transpose(0, 1), s0, reset.t(), batch_first=False)
    torch.testing.assert_close(s_time_major.transpose(0, 1), s)


@every_cell
def test_native_code_runs_a_model_of_it(case: Case) -> None:
    torch.manual_seed(0)
    model = ImprovedSSM(3, 2, 4, 5, num_layers=2).double()
    for i, seed in enumerate((1, 2)):
        model.layers[i] = case.make(5, 5, 4, seed=seed)
    plan = plan_of(model)
    assert isinstance(plan, Plan), plan
    assert plan.states == [4, 4]
    names = {name for name, _ in model.named_parameters()}
    assert plan.used(branches=2) == names
    x, h = torch.randn(3, 3).double(), torch.randn(2, 3, 4).double()
    expected = model.get_action(x, h, deterministic=True)  # with gradients: by the modules
    with torch.no_grad():
        torch.testing.assert_close(model.get_action(x, h, deterministic=True), expected)


@every_cell
def test_state_dict_round_trip(case: Case) -> None:
    layer, other = case.make(), case.make(seed=1)
    x, s0, reset = sequence(layer)
    assert not torch.equal(other(x, s0, reset)[0], layer(x, s0, reset)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, s0, reset)[0], layer(x, s0, reset)[0])


@every_cell
def test_learning_rate_scales_name_its_parameters(case: Case) -> None:
    layer = case.make()
    names = {name for name, _ in layer.named_parameters()}
    transition, recurrent = set(layer.transition_parameters), set(layer.recurrent_parameters)
    assert transition <= recurrent <= names
    for around, declared in ((False, transition), (True, recurrent)):
        scales = learning_rate_scales(layer, 0.5, around=around)
        assert scales == {name: 0.5 if name in declared else 1.0 for name in names}


def test_the_cases_are_all_that_a_layer_can_be_made_with() -> None:
    assert {(case.cell, case.norm) for case in CASES} == {
        (cell, norm)
        for cell in CELLS
        for norm in (None, "output", "state")
        if norm != "state" or cell in WITH_STATE_NORM
    }
    assert set(RESETS) >= {"none", "first", "last", "consecutive", "all"}
