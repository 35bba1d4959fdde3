from __future__ import annotations

import numpy as np
import pytest

from ssm_fast.env_runner import Environment, TrialEnvironment, get_family

pytestmark = pytest.mark.isa_independent

CARTPOLE = "ssm_fast/CartPoleFamily-v0"


def play(env, actions, seed=3):
    obs, _ = env.reset(seed=seed)
    steps = [env.step(action) for action in actions]
    return obs, steps


@pytest.mark.parametrize(
    ("name", "episodes", "limit"), [(CARTPOLE, 3, None), ("Pendulum-v1", 2, 7), (CARTPOLE, 1, 9)]
)
def test_step(name, episodes, limit):
    B, T = 4, 120
    rows = Environment(name, B, limit)
    trial = TrialEnvironment(Environment(name, B, limit), episodes)
    draws = np.random.default_rng(0)
    if rows.discrete:
        actions = draws.integers(rows.action_dim, size=(T, B))
        taken = np.eye(rows.action_dim)[actions]  # [T, B, K]
    else:
        actions = draws.normal(size=(T, B, rows.action_dim)) * 3
        taken = actions.clip(rows.action_low, rows.action_high)
    first, steps = play(rows, actions)
    obs, trials = play(trial, actions)
    assert obs.shape == (B, trial.input_dim) == (B, rows.input_dim + rows.action_dim + 2)
    assert obs.dtype == np.float32
    np.testing.assert_array_equal(obs[:, : rows.input_dim], first)
    assert not obs[:, rows.input_dim :].any()
    played, ends = np.zeros(B, dtype=int), 0
    for t in range(T):
        (now, reward, terminated, truncated, info), step = trials[t], steps[t]
        for i in range(B):
            assert info["episode_index"][i] == played[i]
            done = step[2][i] or step[3][i]
            played[i] += done
            over = played[i] == episodes
            last = [*taken[t, i], step[1][i], float(done)]
            after = step[4]["final_obs"][i] if over else step[0][i]
            np.testing.assert_allclose(info["final_obs"][i], [*after, *last], rtol=1e-6)
            last = np.zeros_like(last) if over else last
            np.testing.assert_allclose(now[i], [*step[0][i], *last], rtol=1e-6)
            assert terminated[i] == (over and step[2][i])
            assert truncated[i] == (over and step[3][i])
            played[i], ends = (0, ends + 1) if over else (played[i], ends)
        np.testing.assert_array_equal(reward, step[1])
        np.testing.assert_array_equal(info["episode_return"], step[4]["episode_return"])
    assert ends >= 4


def test_attributes():
    with TrialEnvironment(Environment(CARTPOLE, 2), 3) as env:
        tasks = env.family.sample(2, 0)
        env.set_tasks(tasks)
        env.reset()
        assert env.tasks == tasks
        assert env.family is get_family(CARTPOLE)
        assert env.max_episode_steps == 1500
        assert env.policy_metadata() == {"env_id": CARTPOLE, "trial_episodes": "3"}
        assert repr(env).startswith("TrialEnvironment(Environment(")
    with pytest.raises(RuntimeError, match="is closed"):
        env.reset()
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        TrialEnvironment(Environment(CARTPOLE), 0)


def test_a_reset_begins_a_trial():
    with TrialEnvironment(Environment("Pendulum-v1", 2, 5), 2) as env:
        play(env, np.zeros((7, 2, 1)))
        _, steps = play(env, np.zeros((10, 2, 1)))
        assert [step[3].tolist() for step in steps] == [[False, False]] * 9 + [[True, True]]
