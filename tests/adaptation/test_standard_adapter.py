from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from ssm_fast.adaptation.policy_objective import distribution_of
from ssm_fast.adaptation.standard_adapter import (
    StandardAdaptationConfig,
    StandardAdapter,
    state_growth,
)
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.nn.parameters import learning_rate_scales

pytestmark = pytest.mark.isa_independent


def regression() -> tuple[StateSpaceModel, Tensor, Tensor]:
    torch.manual_seed(0)
    return StateSpaceModel(4, 3, 2, 8), torch.randn(5, 7, 3), torch.randn(5, 7, 2)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


class TestUpdateStep:
    def test_equals_adam_by_hand(self) -> None:
        model, x, y = regression()
        config = StandardAdaptationConfig(1e-2, num_steps=3, grad_clip_norm=0.1)
        adapter = StandardAdapter(model, config)
        other = copy.deepcopy(model)
        others = [p for name, p in other.named_parameters() if name != "A"]
        groups = [{"params": others}, {"params": [other.A], "lr": 1e-3}]
        adam = torch.optim.Adam(groups, lr=1e-2, eps=1e-5)
        for _ in range(2):
            losses = []
            for _ in range(3):
                adam.zero_grad()
                loss = nn.functional.mse_loss(other(x)[0], y)
                losses.append(float(loss.detach()))
                loss.backward()
                nn.utils.clip_grad_norm_(other.parameters(), 0.1)
                adam.step()
            loss, steps = adapter.update_step(x, y)
            assert (loss, steps) == (pytest.approx(losses[0], rel=1e-5), 3)
        torch.testing.assert_close(weights_of(adapter.model), weights_of(other))

    def test_where_no_gradients_are_recorded(self) -> None:
        model, x, y = regression()
        adapter, other = StandardAdapter(model), StandardAdapter(model)
        with torch.no_grad():
            adapter.update_step(x, y)
        other.update_step(x, y)
        assert_equal(weights_of(adapter.model), weights_of(other.model))

    def test_a_copy_adapts_on_its_own(self) -> None:
        model, x, y = regression()
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e-2))
        adapter.update_step(x, y)
        other = copy.deepcopy(adapter)
        before = weights_of(adapter.model)
        losses = [other.update_step(x, y)[0] for _ in range(2)]
        assert losses[1] < losses[0]
        assert_equal(weights_of(adapter.model), before)
        assert [adapter.update_step(x, y)[0] for _ in range(2)] == losses

    def test_state_and_reset_reach_the_model(self) -> None:
        model, x, y = regression()
        state, reset = torch.randn(5, 4), torch.rand(5, 7) < 0.3
        for given, hidden in (({"x": x, "reset": reset}, state), ({"x": x, "reset": reset}, None)):
            loss, _ = StandardAdapter(model).update_step(given, y, hidden)
            want = nn.functional.mse_loss(model(x, hidden, reset)[0], y)
            assert loss == pytest.approx(want.item(), rel=1e-6)

    def test_integers_are_classes(self) -> None:
        model, x, _ = regression()
        y = torch.randint(2, (5, 7))
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e-2, 60))
        first, _ = adapter.update_step(x, y)
        logits = model(x)[0]
        want = nn.functional.cross_entropy(logits.reshape(-1, 2), y.reshape(-1))
        assert first == pytest.approx(want.item(), rel=1e-5)
        assert adapter.update_step(x, y)[0] < 0.8 * first

    def test_any_module_and_loss(self) -> None:
        linear = nn.Linear(3, 1)
        adapter = StandardAdapter(linear, StandardAdaptationConfig(0.1, 100))
        x = torch.randn(20, 3)
        adapter.update_step(x, None, None, lambda m, x, y, h: (m(x) - 2.0).square().mean())
        assert (adapter.model(x) - 2.0).square().mean().item() < 0.1


class TestConfig:
    @pytest.mark.parametrize("num_steps", [1, 4])
    def test_num_steps_and_learning_rate(self, num_steps: int) -> None:
        model, x, y = regression()
        config = StandardAdaptationConfig(1e-3, num_steps, grad_clip_norm=None)
        adapter = StandardAdapter(model, config)
        assert adapter.update_step(x, y)[1] == num_steps
        # a step of Adam moves a weight by about its rate, a transition matrix by a tenth of it
        for name, rate in (("A", 1e-4), ("B", 1e-3)):
            change = (getattr(adapter.model, name) - getattr(model, name)).abs().max()
            assert 0.5 * rate * num_steps < change.item() < 1.01 * rate * num_steps

    def test_grad_clip_norm(self) -> None:
        # clipped far below Adam's eps, gradients hardly move anything
        model, x, y = regression()
        changes = []
        for clip in (None, 1e-8):
            config = StandardAdaptationConfig(1e-3, 1, grad_clip_norm=clip)
            adapter = StandardAdapter(model, config)
            adapter.update_step(x, y)
            changes.append((adapter.model.A - model.A).abs().max().item())
        assert changes[1] < 0.01 * changes[0]

    @pytest.mark.parametrize("eps", [1e-4, 1e-2])
    def test_trust_region(self, eps: float) -> None:
        torch.manual_seed(0)
        model = ImprovedSSM(3, 2, 4, 8, discrete=True, orthogonal_init=False)
        x, y = torch.randn(5, 7, 3), torch.randint(2, (5, 7))
        config = StandardAdaptationConfig(0.1, 50, trust_region_eps=eps)
        adapter = StandardAdapter(model, config)
        for _ in range(3):
            before = copy.deepcopy(adapter.model)
            _, steps = adapter.update_step(x, y)
            with torch.no_grad():
                old, new = (Categorical(logits=m(x)[0]) for m in (before, adapter.model))
            kl = float(kl_divergence(old, new).mean())
            assert 0.1 * eps < kl <= eps
            assert 1 <= steps < 50
        free = StandardAdapter(model, StandardAdaptationConfig(0.1, 50))
        assert free.update_step(x, y)[1] == 50
        now, then = distribution_of(free.model, x, None)[0], distribution_of(model, x, None)[0]
        assert then.kl(now).mean().item() > 1e-2

    def test_trust_region_of_a_regression_is_that_of_unit_gaussians(self) -> None:
        model, x, y = regression()
        config = StandardAdaptationConfig(0.1, 9, trust_region_eps=1e-3)
        adapter = StandardAdapter(model, config)
        adapter.update_step(x, y)
        with torch.no_grad():
            moved = (adapter.model(x)[0] - model(x)[0]).square().sum(-1).mean()
        assert 1e-4 < 0.5 * float(moved) <= 1e-3

    def test_ema_decay(self) -> None:
        model, x, y = regression()
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e-2, 1, ema_decay=0.9))
        average = weights_of(model)
        for _ in range(4):
            adapter.update_step(x, y)
            now = weights_of(adapter.model)
            average = {n: 0.9 * a + 0.1 * now[n] for n, a in average.items()}
        torch.testing.assert_close(adapter.averaged_weights(), average)
        adapter.take_average()
        torch.testing.assert_close(weights_of(adapter.model), average)
        adapter.reset_to_meta()
        assert_equal(adapter.averaged_weights(), weights_of(model))
        with pytest.raises(ValueError, match="ema_decay must be set"):
            StandardAdapter(model).averaged_weights()

    def test_entropy_weight(self) -> None:
        torch.manual_seed(0)
        model = ImprovedSSM(3, 2, 4, 8, discrete=True, orthogonal_init=False)
        x, y = torch.randn(5, 7, 3), torch.zeros(5, 7, dtype=torch.int64)
        entropies = []
        for weight in (0.0, 1.0):
            config = StandardAdaptationConfig(1e-2, 40, entropy_weight=weight)
            adapter = StandardAdapter(model, config)
            adapter.update_step(x, y)
            entropies.append(
                float(distribution_of(adapter.model, x, None)[0].entropy().mean().detach())
            )
        assert entropies[0] < 0.7 * entropies[1]

        model, x, y = regression()
        adapter = StandardAdapter(model, StandardAdaptationConfig(entropy_weight=0.1))
        with pytest.raises(ValueError, match="entropy_weight must be 0"):
            adapter.update_step(x, y)

    def test_max_steps_per_call(self) -> None:
        model, x, y = regression()
        config = StandardAdaptationConfig(1e-3, num_steps=10, max_steps_per_call=4)
        assert StandardAdapter(model, config).update_step(x, y)[1] == 4
        # a step far out of the region needs more halvings than there are left
        config = StandardAdaptationConfig(1.0, 10, trust_region_eps=1e-3, max_steps_per_call=3)
        adapter = StandardAdapter(model, config)
        assert adapter.update_step(x, y)[1] == 0
        assert_equal(weights_of(adapter.model), weights_of(model))
        config = StandardAdaptationConfig(1.0, 10, trust_region_eps=1e-3)
        assert StandardAdapter(model, config).update_step(x, y)[1] == 1

    @pytest.mark.parametrize(
        "option",
        [
            {"learning_rate": 0.0},
            {"learning_rate": float("nan")},
            {"num_steps": 0},
            {"grad_clip_norm": 0.0},
            {"trust_region_eps": -1.0},
            {"ema_decay": 1.5},
            {"entropy_weight": -0.1},
            {"max_steps_per_call": 0},
        ],
    )
    def test_ranges(self, option: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(option))):
            StandardAdaptationConfig(**option)


def test_transition_matrices_learn_slowly() -> None:
    scales = learning_rate_scales(ImprovedSSM(3, 2, 4, 8))
    assert {name for name, scale in scales.items() if scale != 1.0} == {"layers.0.A", "layers.1.A"}
    assert scales["layers.1.A"] == learning_rate_scales(StateSpaceModel(4, 3, 2, 8))["A"] == 0.1
    assert learning_rate_scales(nn.Linear(2, 2)) == {"weight": 1.0, "bias": 1.0}


class TestGrowth:
    """A loss that is the better the larger the states get."""

    @staticmethod
    def grow(model: nn.Module, x: Any, y: Any, state: Any) -> Tensor:
        assert isinstance(model, ImprovedSSM)
        return -model.unroll(x)[1].square().mean().log()

    def test_of_a_scaled_rotation(self) -> None:
        model = ImprovedSSM(3, 2, 4, 8, 1)
        with torch.no_grad():
            cast(Any, model.layers[0]).A.copy_(1.01 * torch.eye(4))
        assert state_growth(model) == pytest.approx(2.0 * 1.01**1024, rel=1e-2)
        assert state_growth(ImprovedSSM(3, 2, 4, 8)) < 1e-6
        assert state_growth(ImprovedSSM(3, 2, 4, 8, norm="state")) == 0.0
        broken = StateSpaceModel(4, 3, 2, 8)
        nn.init.constant_(broken.A, 1e3)
        assert state_growth(broken) == float("inf")

    @pytest.mark.parametrize("eps", [None, 10.0])
    def test_stays_bounded(self, eps: float | None) -> None:
        torch.manual_seed(0)
        model = ImprovedSSM(3, 2, 8, 8, 1)
        x = torch.randn(2, 10, 3)
        adapter = StandardAdapter(model, StandardAdaptationConfig(0.1, 30, trust_region_eps=eps))
        losses = [adapter.update_step(x, None, None, self.grow)[0] for _ in range(2)]
        assert losses[1] < losses[0] - 0.5
        assert 1e-6 < state_growth(adapter.model) <= 1e3
        assert not torch.equal(adapter.model.layers[0].B, model.layers[0].B)

    def test_a_model_that_grew_before(self) -> None:
        # what it came with is its own, and does not keep it from learning
        model, x, y = regression()
        nn.init.eye_(model.A)
        with torch.no_grad():
            model.A.mul_(1.02)
        before = state_growth(model)
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e-2, 20))
        adapter.update_step(x, y)
        assert state_growth(adapter.model) <= before
        assert not torch.equal(adapter.model.B, model.B)

    def test_the_last_step_counts(self) -> None:
        # finite weights whose output is not
        model, x, y = regression()
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e30, 1))
        with pytest.raises(FloatingPointError, match="the loss after the last step is"):
            adapter.update_step(x, y)
        assert_equal(weights_of(adapter.model), weights_of(model))


class TestMetaWeights:
    def test_never_change(self) -> None:
        model, x, y = regression()
        before = weights_of(model)
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e-2))
        adapter.update_step(x, y)
        assert_equal(weights_of(model), before)
        first = weights_of(adapter.model)
        assert not torch.equal(first["A"], before["A"])
        adapter.reset_to_meta()
        assert_equal(weights_of(adapter.model), before)
        adapter.update_step(x, y)  # the optimizer starts anew, too
        assert_equal(weights_of(adapter.model), first)


class TestSnapshot:
    def test_is_good_for_more_than_one_restore(self) -> None:
        model, x, y = regression()
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e-2, ema_decay=0.5))
        adapter.update_step(x, y)
        snapshot, found = adapter.snapshot(), []
        for _ in range(2):
            adapter.restore(snapshot)
            adapter.update_step(x, y)
            found.append((weights_of(adapter.model), adapter.averaged_weights()))
        for one, other in zip(*found, strict=True):
            assert_equal(one, other)


class TestTiedWeights:
    def test_the_average_has_each_name_of_a_weight(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e-2, 1, ema_decay=0.5))
        before = weights_of(model)
        adapter.update_step(torch.randn(4, 3), torch.randn(4, 3))
        now = weights_of(adapter.model)
        adapter.take_average()
        found = weights_of(adapter.model)
        expected = {n: 0.5 * (x + now[n]) for n, x in before.items()}
        torch.testing.assert_close(found, expected)
        assert adapter.model[2].weight is adapter.model[0].weight


class TestBadInput:
    def test_inference_mode(self) -> None:
        model, x, y = regression()
        adapter, other = StandardAdapter(model), StandardAdapter(model)
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
            adapter.update_step(x, y)
        adapter.update_step(x, y)
        other.update_step(x, y)
        assert_equal(weights_of(adapter.model), weights_of(other.model))

    @pytest.mark.parametrize("at", [0, 2])
    def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(self, at: int) -> None:
        model, x, y = regression()
        adapter, other = (
            StandardAdapter(model, StandardAdaptationConfig(1e-2, ema_decay=0.5)) for _ in range(2)
        )
        adapter.update_step(x, y)
        other.update_step(x, y)
        before, calls = weights_of(adapter.model), iter(range(9))

        def loss_fn(model: nn.Module, x: Any, y: Any, state: Any) -> Tensor:
            loss = nn.functional.mse_loss(model(x)[0], y)
            return loss * torch.nan if next(calls) == at else loss

        with pytest.raises(FloatingPointError, match=f"step {at}: loss nan"):
            adapter.update_step(x, y, None, loss_fn)
        assert_equal(weights_of(adapter.model), before)
        adapter.update_step(x, y)
        other.update_step(x, y)
        assert_equal(weights_of(adapter.model), weights_of(other.model))
        assert_equal(adapter.averaged_weights(), other.averaged_weights())

    def test_a_divergence(self) -> None:
        model, x, y = regression()
        adapter = StandardAdapter(model, StandardAdaptationConfig(1e30, 5))
        with pytest.raises(FloatingPointError, match=r"step \d: "):
            adapter.update_step(x, y)
        assert_equal(weights_of(adapter.model), weights_of(model))

    def test_batches(self) -> None:
        model, x, y = regression()
        adapter = StandardAdapter(model)
        for bad_x, bad_y, text in (
            (x[:0], y[:0], "x is empty"),
            (x[:, :0], y[:, :0], "x is empty"),
            (x * torch.nan, y, r"x must be finite, got NaN or infinity at \[0, 0, 0\]"),
            ({"x": x * torch.inf}, y, r"x\['x'\] must be finite"),
            (x, y / 0.0, "y must be finite"),
            (x, y[:, :3], "y must have the output's shape"),
            (x, torch.full((5, 7), 2), r"y must lie in \[0, 2\)"),
        ):
            with pytest.raises(ValueError, match=text):
                adapter.update_step(bad_x, bad_y)
        with pytest.raises(TypeError, match="y must have the output's dtype"):
            adapter.update_step(x, y.double())
        with pytest.raises(TypeError, match=r"y must hold floats or integers, got torch.bool"):
            adapter.update_step(x, y > 0)
        with pytest.raises(TypeError, match="y must be a tensor where loss_fn is None, got None"):
            adapter.update_step(x, None)
        assert_equal(weights_of(adapter.model), weights_of(model))

    def test_models(self) -> None:
        with pytest.raises(TypeError, match=r"model must be an nn.Module"):
            StandardAdapter(lambda x: x)
        with pytest.raises(ValueError, match="must have parameters"):
            StandardAdapter(nn.Identity())
        with pytest.raises(TypeError, match="config must be a StandardAdaptationConfig, got dict"):
            StandardAdapter(nn.Linear(2, 2), {})
        broken = nn.Linear(2, 2)
        nn.init.constant_(broken.bias, torch.nan)
        with pytest.raises(ValueError, match="bias of the model must be finite"):
            StandardAdapter(broken)
