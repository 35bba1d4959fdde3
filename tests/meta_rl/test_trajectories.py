from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssm_fast.meta_rl import trajectories as trajectories_module
from ssm_fast.meta_rl.trajectories import Trajectories, compute_advantages

pytestmark = pytest.mark.isa_independent

G, R, T, I = 2, 3, 40, 3
LIMIT = 45


def trajectories(dtype=torch.float64, ends=True):
    reset = torch.zeros(G, R, T, dtype=torch.bool)
    reset[..., 0] = True
    terminated, truncated = torch.zeros_like(reset), torch.zeros_like(reset)
    if ends:
        terminated[0, 1, [4, 5, 20]] = True  # an episode of one step between two others
        truncated[1, 0, 9] = True
        truncated[1, 2, T - 1] = True
        reset[..., 1:] |= (terminated | truncated)[..., :-1]
    return Trajectories(
        torch.randn(G, R, T, I, dtype=dtype) * 4,
        torch.zeros(G, R, T, dtype=torch.int64),
        torch.zeros(G, R, T, dtype=dtype),
        torch.randn(G, R, T, dtype=dtype),
        terminated,
        truncated,
        reset,
        torch.randn(G, R, I, dtype=dtype),
        torch.zeros(G, R, 1, dtype=dtype),
        LIMIT,
    )


def by_hand(x, gamma, gae_lambda):
    """Loops in NumPy, a task at a time."""
    tasks = []
    for g in range(G):
        obs, last = x.observations[g].numpy(), x.last_observations[g].numpy()
        rewards = x.rewards[g].numpy()
        ends = (x.terminated | x.truncated)[g].numpy()
        time = np.zeros((R, T + 1))
        for r in range(R):
            for t in range(T):
                time[r, t] = 0 if x.reset[g, r, t] else time[r, t]
                time[r, t + 1] = time[r, t] + 1

        def features(o, t):
            o, left, t = np.clip(o, -10, 10), LIMIT - t, t / T
            return np.array([*o, *o**2, t, t**2, t**3, 1.0, gamma**left])

        inside = np.array([[features(obs[r, t], time[r, t]) for t in range(T)] for r in range(R)])
        outside = np.array([features(last[r], time[r, T]) for r in range(R)])
        bootstrap = np.zeros(R)
        for _ in range(2):
            returns = np.zeros((R, T))
            for r in range(R):
                later = bootstrap[r]
                for t in reversed(range(T)):
                    later = rewards[r, t] + gamma * (0.0 if ends[r, t] else later)
                    returns[r, t] = later
            X, y = inside.reshape(R * T, -1), returns.reshape(-1)
            w = np.linalg.solve(X.T @ X + 1e-5 * np.eye(X.shape[1]), X.T @ y)
            values, bootstrap = inside @ w, outside @ w
        advantages = np.zeros((R, T))
        for r in range(R):
            later, next_value = 0.0, bootstrap[r]
            for t in reversed(range(T)):
                goes_on = 0.0 if ends[r, t] else 1.0
                delta = rewards[r, t] + gamma * goes_on * next_value - values[r, t]
                later = delta + gamma * gae_lambda * goes_on * later
                advantages[r, t], next_value = later, values[r, t]
        tasks.append((advantages - advantages.mean()) / advantages.std())
    return np.array(tasks)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 1.0), (0.9, 0.8), (1.0, 1.0)])
def test_compute_advantages(gamma, gae_lambda):
    x = trajectories()
    found = compute_advantages(x, gamma, gae_lambda)
    np.testing.assert_allclose(found.numpy(), by_hand(x, gamma, gae_lambda), atol=1e-6)


def test_a_step_of_a_finished_row_does_not_see_what_follows():
    x = trajectories()
    ended = compute_advantages(x, 0.99, 1.0)
    x.last_observations[1, 2] += 5.0  # the row was cut at T
    assert torch.equal(compute_advantages(x, 0.99, 1.0), ended)
    x.last_observations[1, 1] += 5.0
    assert not torch.equal(compute_advantages(x, 0.99, 1.0), ended)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_nothing_to_choose_between(reward, dtype):
    """Every step earns the same and is followed by as many: what is left is rounding."""
    x = trajectories(dtype, ends=False)
    x.rewards[:] = reward
    x.terminated[:] = x.reset[:] = True
    advantages = compute_advantages(x, 0.99, 1.0)
    assert float(advantages.abs().max()) < 0.01


def steady(T, limit, dtype=torch.float64):
    """Rounds of `T` steps of reward 1, in episodes that the limit alone cuts short."""
    torch.manual_seed(0)
    truncated = torch.zeros(G, R, T, dtype=torch.bool)
    truncated[..., limit - 1 :: limit] = True
    reset = torch.zeros_like(truncated)
    reset[..., ::limit] = True
    return Trajectories(
        torch.randn(G, R, T, I, dtype=dtype),
        torch.zeros(G, R, T, dtype=torch.int64),
        torch.zeros(G, R, T, dtype=dtype),
        torch.ones(G, R, T, dtype=dtype),
        torch.zeros_like(truncated),
        truncated,
        reset,
        torch.randn(G, R, I, dtype=dtype),
        torch.zeros(G, R, 1, dtype=dtype),
        limit,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.99, 0.9, 1.0])
@pytest.mark.parametrize("episodes", [1, 3])
def test_nothing_to_choose_between_up_to_a_time_limit(gamma, dtype, episodes):
    """A task that is solved, where each step earns 1 until the limit, teaches nothing."""
    x = steady(400 * episodes, 400, dtype)
    assert float(compute_advantages(x, gamma, 0.95).abs().max()) < 0.05


def test_a_round_that_ends_before_the_limit_is_bootstrapped(monkeypatch):
    """What lies beyond it is worth about what the regression of cut returns says, and not nothing."""
    found = []
    gae = trajectories_module.ops.gae
    monkeypatch.setattr(trajectories_module.ops, "gae", lambda *a: found.append(a) or gae(*a))
    compute_advantages(steady(1000, 5000), 0.99, 0.95)
    with_limit = found[0][2][..., -1]  # [G, R], the values after the last step
    x = steady(1000, 5000)
    compute_advantages(replace(x, time_limit=None), 0.99, 0.95)
    torch.testing.assert_close(with_limit, found[1][2][..., -1], rtol=1e-6, atol=1e-6)
    assert float(with_limit.min()) > 30.0


def test_steps_into_episode():
    x = trajectories()
    steps = x.steps_into_episode()
    assert steps[0, 0].tolist() == list(range(T))
    assert steps[0, 1].tolist() == [*range(5), 0, *range(15), *range(T - 21)]
    assert steps[1, 0].tolist() == [*range(10), *range(T - 10)]
