from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aim import Aim, aims
from gymnasium.wrappers import TransformReward

from ssm_fast.adaptation.hybrid_adapter import HybridAdaptationConfig, HybridAdapter
from ssm_fast.adaptation.online import (
    Player,
    _reward_scale,
    adapt_to_environment,
    bootstrapped_returns,
    play_episodes,
)
from ssm_fast.adaptation.standard_adapter import StandardAdaptationConfig, StandardAdapter
from ssm_fast.adaptation.test_time_adapter import TestTimeAdapter
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner import Environment

pytestmark = pytest.mark.isa_independent


def policy(discrete: bool = False) -> ImprovedSSM:
    torch.manual_seed(0)
    return ImprovedSSM(3, 3 if discrete else 2, 4, 8, 2, discrete=discrete, orthogonal_init=False)


def overflowing(adapter: StandardAdapter) -> StandardAdapter:
    """With a policy whose values are not finite, although its actions are."""
    with torch.no_grad():
        adapter.model.critic.weight.fill_(torch.inf)
    return adapter


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

    def test_a_long_episode_after_adapting(self) -> None:
        torch.manual_seed(0)
        model = ImprovedSSM(3, 2, 32, 8, 1)
        config = StandardAdaptationConfig(3e-3, 20, trust_region_eps=0.3)
        adapter = StandardAdapter(model, config)
        adapt_to_environment(adapter, Aim(), 12, 20, gamma=0.5)
        returns = play_episodes(adapter.model, Aim(horizon=300), 1, 0)
        assert np.isfinite(returns).all()

    @pytest.mark.parametrize("reward", [0.0, 1.0, -1e4])
    def test_returns_that_are_all_the_same(self, reward: float) -> None:
        def wrapped() -> Any:
            return TransformReward(Aim(), lambda _: reward)

        _, stats = adapt_to_environment(StandardAdapter(policy()), wrapped(), 2, 20, gamma=0.0)
        assert stats["reward_scale"] == [abs(reward) or 1.0] * 2
        assert max(np.abs(stats["losses"])) < 10.0

    def test_a_critic_that_knows_nothing_tells_no_unit(self) -> None:
        model = policy()
        player = Player(aims(4), model, 30, 0)
        part = player.play(model, 500)
        noise = replace(part, rewards=torch.randn(part.rewards.shape))
        values, _ = model.unroll(noise.observations, noise.initial_state, noise.reset)
        sign = torch.sign(((values - values.mean()) * noise.rewards).sum())  # a scale above 0
        noise = replace(noise, rewards=sign * noise.rewards)
        assert _reward_scale(model, noise, 0.0) == pytest.approx(1.0, rel=0.1)
        known = replace(part, rewards=5.0 * values.detach() + 3.0)
        assert _reward_scale(model, known, 0.0) == pytest.approx(5.0, rel=1e-3)

    def test_errors(self) -> None:
        adapter = StandardAdapter(policy())
        before = {name: x.clone() for name, x in adapter.model.state_dict().items()}
        with pytest.raises(FloatingPointError, match="non-finite reward at step 7"):
            adapt_to_environment(adapter, Aim(nan_at=7), 2, 50)
        torch.testing.assert_close(dict(adapter.model.state_dict()), before, rtol=0, atol=0)
        hybrid = HybridAdapter(policy(), HybridAdaptationConfig(reward_scale=1.0))
        for broken, text in (
            (StandardAdapter(policy()), "the model's values must be finite"),
            (hybrid, "the advantages under the model must be finite"),
        ):
            with pytest.raises(FloatingPointError, match=text):
                adapt_to_environment(overflowing(broken), Aim(), 2, 50)
        with pytest.raises(FloatingPointError, match="the returns overflow"):
            adapt_to_environment(adapter, TransformReward(Aim(), lambda _: 3e38), 2, 50)
        with pytest.raises(TypeError, match="model must be an ImprovedSSM"):
            adapt_to_environment(StandardAdapter(StateSpaceModel()), Environment("CartPole-v1"))
        with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
            adapt_to_environment(adapter, Aim(), seed=-1)
        with pytest.raises(ValueError, match="adapt_every must be at least 1"):
            adapt_to_environment(adapter, Aim(), adapt_every=0)


@pytest.mark.parametrize("kind", [StandardAdapter, HybridAdapter, TestTimeAdapter])
def test_a_breakdown_of_play_restores_the_weights_that_played(
    kind: type[StandardAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the update after the second stretch makes a policy that cannot act
    adapter = kind(policy())
    played, play = [], Player.play

    def recorded(player: Player, model: ImprovedSSM, *arguments: Any, **named: Any) -> Any:
        if len(played) == 2:
            with torch.no_grad():
                model.actor.weight.fill_(torch.nan)
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        experience = play(player, model, *arguments, **named)
        played.append(weights)
        return experience

    monkeypatch.setattr(Player, "play", recorded)
    play_and_learn: Any = partial(adapt_to_environment, adapter)
    if isinstance(adapter, TestTimeAdapter):
        play_and_learn = adapter.adapt_online
    with pytest.raises(FloatingPointError, match="the policy of environment 0 is not finite"):
        play_and_learn(Aim(), 5, 20)
    assert len(played) == 2
    assert not torch.equal(played[0]["actor.weight"], played[1]["actor.weight"])
    torch.testing.assert_close(dict(adapter.model.state_dict()), played[1], rtol=0, atol=0)


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
