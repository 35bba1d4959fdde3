from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssm_fast.adaptation.hybrid_adapter import HybridAdaptationConfig, HybridAdapter
from ssm_fast.adaptation.policy_objective import Experience, PolicyObjective, policy_batch
from ssm_fast.adaptation.standard_adapter import StandardAdaptationConfig, StandardAdapter
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.experience.experience_buffer import ExperienceBuffer

pytestmark = pytest.mark.isa_independent


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def regression() -> tuple[StateSpaceModel, Tensor, Tensor]:
    torch.manual_seed(0)
    return StateSpaceModel(4, 3, 2, 8), torch.randn(5, 7, 3), torch.randn(5, 7, 2)


def filled(model: StateSpaceModel, steps: int = 40) -> ExperienceBuffer:
    """Steps of one environment with the states that the model came to."""
    torch.manual_seed(1)
    buffer = ExperienceBuffer(100, seed=0)
    state = model.init_hidden(1)
    for t in range(steps):
        x, reset = torch.randn(1, 3), torch.tensor([t % 9 == 0])
        buffer.add(x[0], torch.tensor([0.1 * t, -1.0]), reset=reset[0], state=state[0].detach())
        _, state = model(x, state, reset)
    return buffer


def policy() -> ImprovedSSM:
    torch.manual_seed(0)
    return ImprovedSSM(3, 2, 4, 8, orthogonal_init=False)


def played(model: ImprovedSSM, B: int = 2, T: int = 30) -> Experience:
    x, beyond = torch.randn(2, B, T, 3)
    reset = torch.rand(B, T) < 0.1
    truncated = torch.zeros(B, T, dtype=torch.bool)
    truncated[:, :-1] = reset[:, 1:]
    state = torch.randn(2, B, 4)
    with torch.no_grad():
        actions, log_probs, _, _ = model.get_action(x, state, reset=reset)
    rewards, no = torch.randn(B, T), torch.zeros(B, T, dtype=torch.bool)
    tau = torch.ones(B, T)
    return Experience(*(x, actions, log_probs, rewards, no, truncated, reset, beyond, tau, state))


class TestReplay:
    def test_weights_of_the_two_losses(self) -> None:
        model, x, y = regression()
        losses = {}
        for w in (0.0, 0.25, 1.0):
            config = HybridAdaptationConfig(experience_weight=w, sequence_length=6)
            adapter = HybridAdapter(model, config, filled(model))
            losses[w] = adapter.update_step(x, y)[0]
        assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)
        sequences = filled(model).sample_sequences(32, 6)
        output, _ = model(sequences["observations"], sequences["initial_state"], sequences["reset"])
        want = nn.functional.mse_loss(output, sequences["targets"])
        assert losses[1.0] == pytest.approx(want.item(), rel=1e-5)

    @pytest.mark.parametrize("empty", [True, False])
    def test_without_weight_it_is_the_standard_adapter(self, empty: bool) -> None:
        model, x, y = regression()
        buffer = ExperienceBuffer(9) if empty else filled(model)
        config = HybridAdaptationConfig(1e-2, experience_weight=1.0 if empty else 0.0)
        one = HybridAdapter(model, config, buffer)
        other = StandardAdapter(model, StandardAdaptationConfig(1e-2))
        assert one.update_step(x, y) == other.update_step(x, y)
        torch.testing.assert_close(weights_of(one.model), weights_of(other.model), rtol=0, atol=0)

    def test_stored_states_are_those_before_each_step(self) -> None:
        model = policy()
        adapter = HybridAdapter(model, HybridAdaptationConfig(sequence_length=5))
        e = played(model)
        adapter.add_experience(e)
        drawn = adapter.experience_buffer.sample_sequences(60, 5)
        for i in range(60):
            match = (e.observations == drawn["observations"][i, 0]).all(-1).nonzero()[0]
            row, t = match.tolist()
            state = e.initial_state[:, row : row + 1]
            if t > 0:
                part = e.observations[row : row + 1, :t], state, e.reset[row : row + 1, :t]
                *_, state = model(*part)
            torch.testing.assert_close(drawn["initial_state"][i], state[:, 0])

    def test_policy_objective_takes_importance_ratios(self) -> None:
        # what the old policy did, replayed to another one, is what policy_batch makes of it
        model = policy()
        adapter = HybridAdapter(
            model, HybridAdaptationConfig(sequence_length=30, experience_weight=1.0)
        )
        e = played(model, B=1)
        adapter.add_experience(e)
        with torch.no_grad():
            for p in adapter.model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        x, y, state = policy_batch(adapter.model, e)
        want = PolicyObjective()(adapter.model, x, y, state)
        loss, _ = adapter.update_step(x, y, state, PolicyObjective())
        assert loss == pytest.approx(want.item(), rel=1e-4)
        zero = policy_batch(adapter.model, e)[1]["log_probs"] - e.log_probs
        assert float(zero.abs().max()) == 0.0

    def test_reset_to_meta_keeps_the_buffer_and_forgets_the_unit(self) -> None:
        model = policy()
        buffer = ExperienceBuffer(100)
        adapter = HybridAdapter(model, HybridAdaptationConfig(sequence_length=4), buffer)
        adapter.add_experience(played(model))
        adapter.reward_scale = 7.0
        adapter.update_step(*policy_batch(model, played(model)), PolicyObjective())
        adapter.reset_to_meta()
        torch.testing.assert_close(weights_of(adapter.model), weights_of(model), rtol=0, atol=0)
        assert adapter.experience_buffer is buffer
        assert len(buffer) == 60
        assert adapter.reward_scale == 1.0
        given = HybridAdapter(model, HybridAdaptationConfig(reward_scale=3.0), buffer)
        given.reward_scale = 7.0
        given.reset_to_meta()
        assert given.reward_scale == 3.0

    def test_pieces_shorter_than_a_sequence(self) -> None:
        model = policy()
        adapter = HybridAdapter(model, HybridAdaptationConfig(sequence_length=64))
        for _ in range(3):
            adapter.add_experience(played(model, T=3))
        e = played(model)
        loss, steps = adapter.update_step(*policy_batch(model, e), PolicyObjective())
        assert steps == 5
        assert math.isfinite(loss)

    def test_replay_keeps_what_the_task_before_taught(self) -> None:
        model, x, y = regression()
        other = filled(model)
        errors = []
        for w in (0.0, 0.5):
            config = HybridAdaptationConfig(
                1e-2, 200, experience_weight=w, experience_batch_size=16, sequence_length=8
            )
            adapter = HybridAdapter(model, config, other)
            adapter.update_step(x, y)
            s = filled(model).sample_sequences(64, 8)
            out, _ = adapter.model(s["observations"], s["initial_state"], s["reset"])
            errors.append(nn.functional.mse_loss(out, s["targets"]).item())
        assert errors[1] < 0.7 * errors[0]


class TestErrors:
    def test_fields(self) -> None:
        model, x, y = regression()
        buffer = ExperienceBuffer(10)
        buffer.extend(torch.randn(8, 3), torch.randn(8, 2))
        with pytest.raises(ValueError, match="must store 'state'"):
            HybridAdapter(model, None, buffer).update_step(x, y)
        adapter = HybridAdapter(policy())
        adapter.experience_buffer.add(
            torch.zeros(3), torch.zeros(2), state=torch.zeros(2, 4), reset=torch.tensor(True)
        )
        e = played(policy())
        with pytest.raises(ValueError, match=r"must store \['log_probs', 'rewards'"):
            adapter.update_step(*policy_batch(policy(), e), PolicyObjective())

    def test_classes(self) -> None:
        model = regression()[0]
        with pytest.raises(TypeError, match="config must be a HybridAdaptationConfig"):
            HybridAdapter(model, StandardAdaptationConfig())
        with pytest.raises(TypeError, match=r"model must be an nn.Module, got function"):
            HybridAdapter(lambda x: x)
        with pytest.raises(ValueError, match="model must have parameters"):
            HybridAdapter(nn.Identity())
        with pytest.raises(TypeError, match="must be an ExperienceBuffer, got list"):
            HybridAdapter(model, None, [])
        with pytest.raises(TypeError, match="model must be an ImprovedSSM"):
            HybridAdapter(model).add_experience(played(policy()))

    def test_nan_in_the_buffer(self) -> None:
        model = policy()
        adapter = HybridAdapter(model, HybridAdaptationConfig(sequence_length=4))
        e = played(model)
        adapter.add_experience(e)
        adapter.experience_buffer._fields["rewards"][:] = torch.nan
        with pytest.raises(ValueError, match="rewards must be finite"):
            adapter.update_step(*policy_batch(model, e), PolicyObjective())
        torch.testing.assert_close(weights_of(adapter.model), weights_of(model), rtol=0, atol=0)
        with pytest.raises(ValueError, match="rewards must be finite"):
            replace(e, rewards=e.rewards * torch.nan)

    @pytest.mark.parametrize(
        "option",
        [
            {"experience_batch_size": 0},
            {"sequence_length": 0},
            {"experience_weight": 1.1},
            {"gamma": -0.1},
            {"reward_scale": 0.0},
            {"num_steps": 0},
        ],
    )
    def test_ranges(self, option: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(option))):
            HybridAdaptationConfig(**option)


def test_a_model_that_takes_no_resets() -> None:
    with pytest.raises(TypeError, match="forward of GRU must have the arguments x and reset"):
        HybridAdapter(nn.GRU(3, 2))
