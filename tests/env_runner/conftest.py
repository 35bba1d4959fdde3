from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

NAN_AT_STEP = 5


class Counter(gymnasium.Env):
    """Observation = (seed-dependent offset, step count); ends after `length` steps."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(
        self,
        length=3,
        terminates=True,
        observation_space=None,
        action_space=None,
        nan_in=None,
        nan_seed=None,
        shape=(2,),
        render_mode=None,
    ):
        self.length, self.terminates = length, terminates
        self.nan_in, self.nan_seed, self.shape = nan_in, nan_seed, shape
        self.observation_space = observation_space or spaces.Box(-np.inf, np.inf, shape, np.float64)
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.render_mode = render_mode
        self.received = []
        self.closed = 0

    def _obs(self):
        obs = np.zeros(self.shape)
        obs.flat[:2] = self.offset, self.count
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.seed = seed
        self.offset, self.count = self.np_random.normal(), 0
        return self._obs(), {"count": 0}

    def step(self, action):
        self.received.append(action)
        self.count += 1
        obs, reward = self._obs(), float(self.count)
        if self.count == NAN_AT_STEP and self.nan_seed in (None, self.seed):
            if self.nan_in == "obs":
                obs[1] = np.nan
            if self.nan_in == "reward":
                reward = float("inf")
            if self.nan_in == "large":
                obs[1] = 1e300
            if self.nan_in == "large reward":
                reward = 1e39
        over = self.count >= self.length
        return (
            obs,
            reward,
            over and self.terminates,
            over and not self.terminates,
            {"count": self.count},
        )

    def render(self):
        return np.full((2, 2, 3), self.count, np.uint8)

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def _registered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it stands
    gymnasium.register("Counter-v0", entry_point=Counter, disable_env_checker=True)
    yield
    del gymnasium.registry["Counter-v0"]
