from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from ssm_fast.env_runner.environment import Environment
from ssm_fast.env_runner.evaluation import evaluate, longest_evaluation

pytestmark = pytest.mark.isa_independent


class Tilt:
    """Pushes CartPole's cart towards the lean, and every third step the other way.

    Counts the steps of each row in its state, so that a lost state or episode start shows.
    """

    def __init__(self):
        self.flags = []

    def predict(self, obs, state=None, episode_start=None, deterministic=True):
        self.flags.append(deterministic)
        count = np.zeros(len(obs)) if state is None else state[0]
        count = np.where(episode_start, 0, count) + 1
        push = (obs[:, 2] > 0) ^ (count % 3 == 0)
        return push.astype(np.int64), (count,)


class Still:
    def predict(self, obs, state=None, episode_start=None, deterministic=True):
        return np.zeros((len(obs), 2)), state


def by_hand(seed):
    env = gymnasium.make("CartPole-v1")
    obs, _ = env.reset(seed=seed)
    total, count = 0.0, 0
    while True:
        count += 1
        obs, reward, terminated, truncated, _ = env.step(int((obs[2] > 0) ^ (count % 3 == 0)))
        total += reward
        if terminated or truncated:
            return total


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_each_episode_counts_once_with_its_own_seed(batch_size):
    got = evaluate(Tilt(), "CartPole-v1", episodes=7, seed=11, batch_size=batch_size)
    want = np.array([by_hand(11 + i) for i in range(7)])
    assert len(set(want)) > 3, "the episodes must differ for this test to see anything"
    np.testing.assert_array_equal(got.returns, want)
    np.testing.assert_array_equal(got.lengths, want.astype(int))
    assert got.mean == pytest.approx(want.mean())
    assert got.std == pytest.approx(want.std())


def test_deterministic_is_handed_on_and_the_limit_applies():
    policy = Tilt()
    got = evaluate(policy, "CartPole-v1", 2, seed=0, deterministic=False, max_episode_steps=4)
    assert got.lengths.tolist() == [4, 4]
    assert policy.flags == [False] * 4


def test_episodes_without_a_time_limit_end_with_a_warning(monkeypatch):
    monkeypatch.setattr("ssm_fast.env_runner.evaluation.LONGEST_EVALUATION", 2)
    with pytest.warns(UserWarning, match=r"Counter-v0 has no time limit: .* after 2 steps") as said:
        got = evaluate(Still(), "Counter-v0", 5, batch_size=2)  # ends by itself after 3
    assert len(said) == 1
    assert got.lengths.tolist() == [2] * 5
    assert got.returns.tolist() == [1.0 + 2.0] * 5
    assert evaluate(Still(), "Counter-v0", 1, max_episode_steps=9).lengths.tolist() == [3]
    with Environment("Counter-v0") as env, Environment("CartPole-v1") as limited:
        assert longest_evaluation(env) == 2
        assert longest_evaluation(limited) is None


def test_wrong_arguments():
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        evaluate(Tilt(), "CartPole-v1", episodes=0)
    with pytest.raises(ValueError, match="NoSuch-v0"):
        evaluate(Tilt(), "NoSuch-v0")
