"""`PolicyStep` beside the modules of an `ImprovedSSM`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import relative_rms
from torch import Tensor

from ssm_fast.core import ImprovedSSM
from ssm_fast.native import plan_of
from ssm_fast.native.step import PolicyStep

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(
    B: int,
    I: int,
    H: int,
    N: int,
    L: int,
    K: int,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[ImprovedSSM, Inputs]:
    """A model of any weights, with observations, state, resets and noise."""
    torch.manual_seed(0)
    model = ImprovedSSM(I, K, N, H, L, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (1.0 if p.dim() == 1 else p.shape[-1] ** -0.5))
    if model.obs_norm is not None:
        model.obs_norm.update(torch.randn(50, I) * 2.0 + 1.0)
    x, state, noise = torch.randn(B, I), torch.randn(L, B, N), torch.randn(B, K)
    inputs = x.to(dtype), state.to(dtype), torch.rand(B) < 0.4, noise.to(dtype)
    return model.to(dtype), inputs


def native(model: ImprovedSSM, *inputs: Tensor | None) -> list[Tensor]:
    plan = plan_of(model)
    assert plan, plan
    with torch.no_grad():
        results = PolicyStep(plan, plan.addresses())(*inputs)
    return [x for x in results if x is not None]


def modules(
    model: ImprovedSSM, x: Tensor, state: Tensor | None, reset: Tensor | None, noise: Tensor | None
) -> list[Tensor]:
    """With gradients enabled, the modules run one after the other."""
    if model.discrete:
        logits, _, value, after = model(x, state, reset)
        return [logits.detach(), value.detach(), after.detach()]
    results = model.get_action(x, state, noise is None, reset, noise)
    return [result.detach() for result in results]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 1, 2),
    (3, 17, 16, 15, 2, 6),
    (6, 8, 33, 20, 2, 1),
    (8, 17, 128, 64, 2, 6),
    (13, 4, 31, 65, 3, 16),
    (40, 27, 64, 32, 2, 8),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("norm", [None, "output", "state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_modules(sizes: tuple[int, ...], norm: str | None, dtype: torch.dtype) -> None:
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    for options in ({}, {"use_residual": False}, {"normalize_observations": True}):
        model, (x, state, reset, noise) = problem(
            *sizes, dtype, use_layer_norm=norm is not None, norm=norm or "output", **options
        )
        for inputs in ((x, state, reset, noise), (x, None, None, None), (x, state, None, noise)):
            assert_equal(native(model, *inputs), modules(model, *inputs), tolerance)


@pytest.mark.parametrize("W", [1, 16, 65])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_critic_with_a_network_of_its_own(
    W: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    model, inputs = problem(*sizes, dtype, critic_dim=W, normalize_observations=True)
    assert_equal(native(model, *inputs), modules(model, *inputs), tolerance)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_discrete_gives_logits_and_no_log_prob(sizes: tuple[int, ...]) -> None:
    model, (x, state, reset, _) = problem(*sizes, discrete=True, critic_dim=sizes[2])
    results = native(model, x, state, reset, None)
    assert results[0].shape == (sizes[0], sizes[5])
    assert_equal(results, modules(model, x, state, reset, None), 1e-12)


def test_other_eps_and_layers_without_a_bias() -> None:
    model, inputs = problem(5, 4, 12, 10, 2, 3)
    model.layers[0].norm.eps = 0.5
    model.layers[1].register_parameter("bias", None)
    model.actor.register_parameter("bias", None)
    assert_equal(native(model, *inputs), modules(model, *inputs), 1e-12)


def test_float32_error() -> None:
    model, inputs = problem(64, 17, 128, 64, 2, 6)
    expected = modules(model, *inputs)
    x, state, reset, noise = inputs
    single = native(model.float(), x.float(), state.float(), reset, noise.float())
    for actual, wanted in zip(single, expected, strict=True):
        assert relative_rms(actual, wanted) <= 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 0.3, 1.0, 8.0, 30.0, 1e30])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 4e-7), (torch.float64, 8e-16)])
def test_tanh_over_its_range(scale: float, dtype: torch.dtype, error: float) -> None:
    # An encoder and an actor that hand on what they get, around a layer that gives zero.
    H = 64
    model, _ = problem(8, H, H, H, 1, H, dtype, use_layer_norm=False)
    x = scale * torch.randn(8, H, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.encoder.weight.copy_(torch.eye(H))
        model.actor.weight.copy_(torch.eye(H))
    expected = torch.tanh(x.double())
    action = native(model, x, None, None, None)[0]
    assert float(((action - expected) / expected).abs().max()) <= error


def test_nan_and_infinity_stay_in_their_row() -> None:
    model, (x, state, _, noise) = problem(7, 5, 20, 9, 2, 3)
    clean = native(model, x, state, None, noise)
    x[2, 1], state[1, 5, 3] = torch.nan, torch.inf
    spoilt = native(model, x, state, None, noise)
    rows = [0, 1, 3, 4, 6]
    for before, after in zip(clean[:3], spoilt[:3], strict=True):
        assert torch.equal(before[rows], after[rows])
        assert not torch.isfinite(after[[2, 5]]).any()


def test_a_reset_hides_a_nan_in_the_state() -> None:
    model, (x, state, reset, noise) = problem(7, 5, 20, 9, 2, 3)
    state[:, reset] = torch.nan
    for result in native(model, x, state, reset, noise):
        assert torch.isfinite(result).all()


def test_rows_are_bitwise_independent_of_batch_and_threads() -> None:
    model, (x, state, reset, noise) = problem(53, 17, 64, 48, 2, 6)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(native(model, x, state, reset, noise))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    for b in range(0, 53, 7):
        row = slice(b, b + 1)
        alone = native(model, x[row], state[:, row], reset[row], noise[row])
        for part, whole in zip(alone[:3], results[0][:3], strict=True):
            assert torch.equal(part, whole[row])
        assert torch.equal(alone[3], results[0][3][:, row])


def test_empty_batch() -> None:
    model, inputs = problem(0, 5, 20, 9, 2, 3)
    action, log_prob, value, next_state = native(model, *inputs)
    assert action.shape == (0, 3)
    assert log_prob.shape == value.shape == (0,)
    assert next_state.shape == (2, 0, 9)


@pytest.mark.parametrize("B", [1, 3, 8, 11])
@pytest.mark.parametrize("norm", ["output", "state"])
@pytest.mark.parametrize("options", [{}, {"discrete": True}, {"critic_dim": 4}])
def test_groups_equal_a_call_each(B: int, norm: str, options: dict[str, Any]) -> None:
    G = 3
    models, inputs = [], []
    for g in range(G):
        model, (x, state, reset, noise) = problem(B, 5, 20, 9, 2, 3, norm=norm, **options)
        with torch.no_grad():
            for tensor in (*model.parameters(), x, state, noise):
                tensor.add_(0.1 * g)
        models.append(model)
        inputs.append((x, state, reset, None if model.discrete else noise))
    plan = plan_of(models[0])
    assert plan
    weights = [torch.stack(ps) for ps in zip(*(m.parameters() for m in models), strict=True)]
    step = PolicyStep(plan, [w.data_ptr() for w in weights], G, weights)
    x, state, reset, noise = zip(*inputs, strict=True)
    with torch.no_grad():
        stacked = step(
            torch.cat(x),
            torch.cat(state, 1),
            torch.cat(reset),
            None if noise[0] is None else torch.cat(noise),
        )
    actual = [result for result in stacked if result is not None]
    alone = [native(m, *one) for m, one in zip(models, inputs, strict=True)]
    for i, (whole, parts) in enumerate(zip(actual, zip(*alone, strict=True), strict=True)):
        assert torch.equal(whole, torch.cat(parts, 1 if i == len(actual) - 1 else 0))
