from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from aim import Aim, aims
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn

from ssm_fast.adaptation.online import play_episodes
from ssm_fast.adaptation.policy_objective import distribution_of
from ssm_fast.adaptation.test_time_adapter import TestTimeAdapter
from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.env_runner import Environment

pytestmark = pytest.mark.isa_independent


def policy(discrete: bool = False) -> ImprovedSSM:
    torch.manual_seed(0)
    return ImprovedSSM(3, 3 if discrete else 2, 4, 8, 1, discrete=discrete)


def adapter(model: ImprovedSSM, **options: Any) -> TestTimeAdapter:
    return TestTimeAdapter(
        model, **{"adaptation_lr": 1e-2, "max_kl": 0.3, "gamma": 0.5, "seed": 0, **options}
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


class TestAdaptOnline:
    @pytest.mark.parametrize("discrete", [False, True])
    @pytest.mark.parametrize("use_uncertainty", [False, True])
    def test_improves_on_not_adapting(self, discrete: bool, use_uncertainty: bool) -> None:
        model = policy(discrete)
        before = weights_of(model)
        test_time = adapter(model, use_uncertainty=use_uncertainty)
        env = Aim(discrete=discrete)
        rewards, stats = test_time.adapt_online(env, 20, 20, compare=True)
        without = np.mean(stats["episode_returns_without"], 0)
        assert len(rewards) == 20
        assert rewards == pytest.approx(stats["episode_returns"][0])
        assert stats["improvement"] == pytest.approx(np.mean(rewards) - np.mean(without))
        gain = np.mean(rewards[-5:]) - np.mean(without[-5:])
        assert gain > (7.0 if discrete else 20.0)
        assert max(stats["kl"]) <= 0.3
        assert_equal(weights_of(model), before)
        assert not torch.equal(test_time.model.actor.weight, before["actor.weight"])
        test_time.reset_to_meta()
        assert_equal(weights_of(test_time.model), before)

    def test_recurrent_state_is_that_of_playing(self) -> None:
        # with weights that do not move, what the buffer holds gives the recorded log-probabilities
        torch.manual_seed(0)
        model = ImprovedSSM(3, 2, 4, 8, 2, orthogonal_init=False)
        test_time = adapter(model, adaptation_lr=1e-12, buffer_size=45)
        test_time.adapt_online(aims(1, horizon=17), 4, 7)
        e = test_time._recent()
        assert e.rewards.shape == (1, 45)
        assert float(e.temperature.min()) < 0.9
        x = {"x": e.observations, "reset": e.reset, "temperature": e.temperature}
        log_probs = distribution_of(model, x, e.initial_state)[0].log_prob(e.actions)
        torch.testing.assert_close(e.log_probs, log_probs, rtol=1e-4, atol=1e-4)
        assert float(test_time._kl(e)) < 1e-6

    def test_a_long_episode_after_adapting(self) -> None:
        torch.manual_seed(0)
        model = ImprovedSSM(3, 2, 32, 8, 1)
        test_time = adapter(model, adaptation_lr=3e-3, adaptation_steps=20)
        test_time.adapt_online(Aim(), 12, 20)
        assert not torch.equal(test_time.model.layers[0].A, model.layers[0].A)
        returns = play_episodes(test_time.model, Aim(horizon=300), 1, 0)
        assert np.isfinite(returns).all()

    def test_rows_and_episodes_of_different_lengths(self) -> None:
        lengths = [5, 9]
        env = SyncVectorEnv([lambda n=n: Aim(horizon=n) for n in lengths])
        rewards, stats = adapter(policy()).adapt_online(env, 3, 4)
        assert stats["episode_lengths"] == [[5] * 3, [9] * 3]
        assert rewards == pytest.approx(np.mean(stats["episode_returns"], 0))
        assert len(stats["losses"]) == 7  # 27 steps of the slower row, 4 at a time

    @pytest.mark.parametrize("rows", [1, 3])
    def test_a_task_that_ends_at_once(self, rows: int) -> None:
        test_time = adapter(policy())
        rewards, stats = test_time.adapt_online(aims(rows, ends_after=1), 6, 1)
        assert len(rewards) == 6
        assert stats["episode_lengths"] == [[1] * 6] * rows
        assert all(np.isfinite(stats["losses"]))

    def test_seed(self) -> None:
        results = []
        for seed in (1, 1, 2):
            test_time = adapter(policy(), seed=seed)
            torch.manual_seed(len(results))  # torch's global generator has no part in it
            rewards, _ = test_time.adapt_online(aims(2), 3, 20)
            results.append((rewards, test_time.model.actor.weight.detach().clone()))
        assert results[0][0] == results[1][0]
        assert torch.equal(results[0][1], results[1][1])
        assert results[0][0] != results[2][0]

    def test_again_after_reset_to_meta(self) -> None:
        test_time = adapter(policy())
        one = test_time.adapt_online(aims(1), 4, 20)[0]
        test_time.reset_to_meta()
        assert test_time.adapt_online(aims(1), 4, 20)[0] == one

    def test_difficulty_sets_the_step_size(self) -> None:
        # rewards that the features tell, under a meta-critic that does so and one that does not
        test_time = adapter(policy(), adaptation_lr=1e-3, gamma=0.0, buffer_size=400)
        figures = []
        for _ in range(2):
            for _ in range(400):
                x = torch.randn(3)
                test_time.store_transition(x, torch.zeros(2), float(x[1]), x, False)
            figures.append(test_time.adapt())
            heads = test_time.ensemble._heads
            assert heads is not None
            test_time._critic = heads.mean(0).float()
        for figure in figures:
            want = 1e-3 * 2.0 ** (2.0 * figure["difficulty"] - 1.0)
            assert figure["learning_rate"] == pytest.approx(want)
        unfamiliar, familiar = figures
        assert unfamiliar["difficulty"] > 0.6
        assert familiar["difficulty"] < 0.3
        assert familiar["learning_rate"] < 0.7 * unfamiliar["learning_rate"]

    def test_temperature_follows_uncertainty(self) -> None:
        test_time = adapter(policy(), min_temperature=0.3)
        _, stats = test_time.adapt_online(aims(2), 20, 40)
        assert stats["temperature"][0] == 1.0
        assert 0.3 <= stats["temperature"][-1] < 0.9
        plain = adapter(policy(), use_uncertainty=False)
        assert set(plain.adapt_online(aims(2), 3, 20)[1]["temperature"]) == {1.0}


class TestOwnLoop:
    def test_begins_with_empty_buffers_after_adapt_online(self) -> None:
        torch.manual_seed(0)
        one = adapter(ImprovedSSM(4, 2, 8, 16, discrete=True), buffer_size=60)
        one.adapt_online(Environment("CartPole-v1", 3), 1, 10)
        for t in range(40):
            one.store_transition(np.full(4, t / 40), 0, 1.0, np.full(4, t / 40), False)
        assert one._recent().rewards.shape == (1, 40)  # of 60, not 20 of each of three rows
        one.adapt()

    @pytest.mark.parametrize("discrete", [False, True])
    def test_store_and_adapt(self, discrete: bool) -> None:
        model = policy(discrete)
        one, other = adapter(model), adapter(model, use_uncertainty=False)
        env = Environment.wrap(Aim(discrete=discrete, horizon=7))
        x, _ = env.reset(seed=0)
        state = model.init_hidden(1)
        for _ in range(30):
            with torch.no_grad():
                action, log_prob, _, state = model.get_action(torch.from_numpy(x), state)
            x_next, reward, terminated, truncated, info = env.step(action.numpy())
            one.store_transition(
                x[0], action[0], reward[0], info["final_obs"][0], terminated[0], truncated[0]
            )
            other.store_transition(
                *(x[0], action[0].numpy(), reward[0], info["final_obs"][0]),
                *(terminated[0], truncated[0]),
                log_prob=float(log_prob),
            )
            x = x_next
            if terminated[0] or truncated[0]:
                state = model.init_hidden(1)
        a, b = one._recent(), other._recent()
        for name in ("observations", "actions", "log_probs", "reset", "initial_state"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name))
        assert a.reset[0].nonzero().flatten().tolist() == [0, 7, 14, 21, 28]
        figures = one.adapt()
        assert figures["steps"] >= 1
        assert 0.0 < figures["kl"] <= 0.3
        assert not torch.equal(one.model.actor.weight, model.actor.weight)

    def test_the_buffer_forgets(self) -> None:
        test_time = adapter(policy(), buffer_size=10)
        for t in range(25):
            test_time.store_transition(np.full(3, t), np.zeros(2), float(t), np.zeros(3), False)
        assert test_time._recent().rewards.tolist() == [[float(t) for t in range(15, 25)]]


class TestErrors:
    def test_an_empty_buffer(self) -> None:
        with pytest.raises(ValueError, match="the buffer is empty"):
            adapter(policy()).adapt()

    def test_nan_reward(self) -> None:
        model = policy()
        test_time = adapter(model)
        with pytest.raises(FloatingPointError, match="environment 0 returned a non-finite reward"):
            test_time.adapt_online(Aim(nan_at=33), 5, 10)
        assert all(bool(torch.isfinite(p).all()) for p in test_time.model.parameters())
        assert not torch.equal(test_time.model.actor.weight, model.actor.weight)

    @pytest.mark.parametrize("what", ["observation", "action", "reward", "next_observation"])
    def test_nan_in_a_transition(self, what: str) -> None:
        values = {
            "observation": np.zeros(3), "action": np.zeros(2),
            "reward": 1.0, "next_observation": np.zeros(3),
        }  # fmt: skip
        values[what] = values[what] * np.nan
        test_time = adapter(policy())
        with pytest.raises(ValueError, match=f"^{what} must be finite"):
            test_time.store_transition(terminated=False, **values)
        with pytest.raises(ValueError, match="the buffer is empty"):
            test_time.adapt()

    def test_shapes_of_a_transition(self) -> None:
        good = {
            "observation": np.zeros(3), "action": np.zeros(2),
            "reward": 1.0, "next_observation": np.zeros(3),
        }  # fmt: skip
        for bad in (
            {"observation": np.zeros(2)},
            {"action": np.zeros(3)},
            {"reward": np.zeros(2)},
            {"next_observation": np.zeros(4)},
        ):
            test_time = adapter(policy())
            with pytest.raises(ValueError, match=f"^{next(iter(bad))} must have size"):
                test_time.store_transition(terminated=False, **{**good, **bad})
            assert test_time._buffers == {}

    def test_an_overflow_of_the_state(self) -> None:
        test_time = adapter(policy())
        test_time.adapt_online(Aim(), 1, 20)
        with torch.no_grad():
            test_time.model.layers[0].A.fill_(1e20)
        before = weights_of(test_time.model)
        with pytest.raises(FloatingPointError, match="the policy's features must be finite"):
            test_time.adapt()
        assert_equal(weights_of(test_time.model), before)

    def test_an_overflow_of_the_returns(self) -> None:
        test_time = adapter(policy(), gamma=1.0)
        for _ in range(5):
            test_time.store_transition(np.zeros(3), np.zeros(2), 3e38, np.zeros(3), False)
        with pytest.raises(FloatingPointError, match="the returns must be finite"):
            test_time.adapt()

    def test_a_divergence_restores_the_last_good_weights(self) -> None:
        test_time = adapter(policy())
        test_time.adapt_online(Aim(), 1, 20)
        before = weights_of(test_time.model)
        test_time.config = type(test_time.config)(1e38, 5)
        with pytest.raises(FloatingPointError, match="before the call"):
            test_time.adapt()
        assert_equal(weights_of(test_time.model), before)

    def test_an_environment_that_does_not_fit(self) -> None:
        test_time = adapter(policy())
        with pytest.raises(
            ValueError, match=r"Aim has .*, the model is for 3 observations and 2 continuous"
        ):
            test_time.adapt_online(Aim(discrete=True))
        with pytest.raises(ValueError, match="CartPole-v1 has 4 observations"):
            test_time.adapt_online(Environment("CartPole-v1"))
        with pytest.raises(TypeError, match="gymnasium"):
            test_time.adapt_online(None)
        for option in ({"num_episodes": 0}, {"adapt_every": 0}):
            with pytest.raises(ValueError, match=next(iter(option))):
                test_time.adapt_online(Aim(), **option)

    def test_options(self) -> None:
        options: tuple[dict[str, Any], ...] = (
            {"adaptation_lr": 0.0},
            {"adaptation_steps": 0},
            {"buffer_size": 0},
            {"batch_size": 0},
            {"gamma": 1.1},
            {"max_kl": 0.0},
            {"clip_epsilon": 0.0},
            {"min_temperature": 0.0},
            {"min_temperature": 3.0},
            {"seed": -1},
            {"sequence_length": 0},
            {"num_heads": 1},
        )
        for option in options:
            with pytest.raises(ValueError, match=next(iter(option))):
                TestTimeAdapter(policy(), **option)
        with pytest.raises(TypeError, match="seed must be an int, got float"):
            TestTimeAdapter(policy(), seed=1.5)
        with pytest.raises(TypeError, match="model must be an ImprovedSSM, got StateSpaceModel"):
            TestTimeAdapter(StateSpaceModel())
