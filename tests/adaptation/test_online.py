from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aim import Aim, aims

from ssm_fast.adaptation.hybrid_adapter import HybridAdaptationConfig, HybridAdapter
from ssm_fast.adaptation.online import (
    Player,
    adapt_to_environment,
    bootstrapped_returns,
    play_episodes,
)
from ssm_fast.adaptation.standard_adapter import StandardAdaptationConfig, StandardAdapter
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner import Environment

pytestmark = pytest.mark.isa_independent


def policy(discrete: bool = False) -> ImprovedSSM:
    torch.manual_seed(0)
    return ImprovedSSM(3, 3 if discrete else 2, 4, 8, 2, discrete=discrete, orthogonal_init=False)


class TestPlayer:
    @pytest.mark.parametrize("discrete", [False, True])
    def test_records_what_happened(self, discrete: bool) -> None:
        model = policy(discrete)
        player = Player(aims(3, discrete=discrete, horizon=5), model, 2, 0)
        parts = [player.play(model, 4) for _ in range(3)]
        assert player.is_done
        assert [p.rewards.shape[1] for p in parts] == [4, 4, 2]
        for part in parts:
            log_probs, _, _ = model.evaluate_actions(
                part.observations, part.actions, part.initial_state, part.reset
            )
            torch.testing.assert_close(part.log_probs, log_probs, rtol=1e-4, atol=1e-5)
        rewards = torch.cat([p.rewards for p in parts], 1)  # [3, 10]
        np.testing.assert_allclose(player.returns, rewards.view(3, 2, 5).sum(-1).numpy(), rtol=1e-5)
        truncated = torch.cat([p.truncated for p in parts], 1)
        assert truncated[0].nonzero().flatten().tolist() == [4, 9]
        x = torch.cat([p.observations for p in parts], 1)
        beyond = torch.cat([p.next_observations for p in parts], 1)
        torch.testing.assert_close(beyond[:, :4], x[:, 1:5])
        assert float(beyond[0, 4, 0]) == 1.0, "the episode's last, not the next one's first"
        assert float(x[0, 5, 0]) == 0.0

    def test_noise_is_its_own(self) -> None:
        model = policy()
        torch.manual_seed(1)
        one = play_episodes(model, aims(2), 2, seed=3)
        torch.manual_seed(2)
        assert play_episodes(model, aims(2), 2, seed=3) == one
        assert play_episodes(model, aims(2), 2, seed=4) != one

    def test_a_broken_policy(self) -> None:
        model = policy()
        with torch.no_grad():
            model.actor.bias.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="the policy of environment 0 is not finite"):
            play_episodes(model, Aim(), 1, 0)


class TestAdaptToEnvironment:
    @pytest.mark.parametrize("hybrid", [False, True])
    @pytest.mark.parametrize("discrete", [False, True])
    def test_improves_on_not_adapting(self, hybrid: bool, discrete: bool) -> None:
        model = policy(discrete)
        config = {"learning_rate": 1e-2, "num_steps": 10, "trust_region_eps": 0.1}
        adapter = (
            HybridAdapter(model, HybridAdaptationConfig(**config, sequence_length=20))
            if hybrid
            else StandardAdapter(model, StandardAdaptationConfig(**config))
        )
        before = {name: x.clone() for name, x in model.state_dict().items()}
        env = aims(4, discrete=discrete)
        without = play_episodes(model, env, 20, 0)
        returns, stats = adapt_to_environment(adapter, env, 20, 20, gamma=0.5)
        gain = np.mean(returns[-5:]) - np.mean(np.array(without)[:, -5:])
        assert gain > (4.0 if discrete else 15.0)
        assert len(stats["losses"]) == len(stats["steps"]) == 20
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        if isinstance(adapter, HybridAdapter):
            assert len(adapter.experience_buffer) == 20 * 20 * 4

    def test_a_task_that_ends_at_once(self) -> None:
        returns, stats = adapt_to_environment(
            HybridAdapter(policy()), Aim(ends_after=1), 4, adapt_every=1
        )
        assert len(returns) == 4
        assert stats["episode_lengths"] == [[1, 1, 1, 1]]
        assert all(np.isfinite(stats["losses"]))

    def test_errors(self) -> None:
        adapter = StandardAdapter(policy())
        before = {name: x.clone() for name, x in adapter.model.state_dict().items()}
        with pytest.raises(FloatingPointError, match="non-finite reward at step 7"):
            adapt_to_environment(adapter, Aim(nan_at=7), 2, 50)
        torch.testing.assert_close(dict(adapter.model.state_dict()), before, rtol=0, atol=0)
        with pytest.raises(TypeError, match="model must be an ImprovedSSM"):
            adapt_to_environment(StandardAdapter(StateSpaceModel()), Environment("CartPole-v1"))
        with pytest.raises(ValueError, match="adapt_every must be at least 1"):
            adapt_to_environment(adapter, Aim(), adapt_every=0)


def test_returns_end_where_episodes_do() -> None:
    model = policy()
    player = Player(aims(1, horizon=4), model, 2, 0)
    part = player.play(model, 6)
    got = bootstrapped_returns(part, 0.5, torch.full_like(part.rewards, 8.0))[0]
    r, want, follows = part.rewards[0].tolist(), [0.0] * 6, 8.0
    for t in reversed(range(6)):
        want[t] = r[t] + 0.5 * (8.0 if t in (3, 5) else follows)
        follows = want[t]
    torch.testing.assert_close(got, torch.tensor(want))


def test_import_takes_no_gymnasium(tmp_path: Path) -> None:
    code = "import sys, ssm_fast.adaptation; print('gymnasium' in sys.modules)"
    run = [sys.executable, "-c", code]  # not in the source tree, which has no compiled module
    assert subprocess.check_output(run, cwd=tmp_path, text=True) == "False\n"
