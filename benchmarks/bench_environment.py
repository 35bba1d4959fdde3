"""A step of 8 and of 64 HalfCheetahs beside Gymnasium's vector environments and the physics alone.

Every contender plays the same random actions on and on. The floor is `mujoco.rollout`: the same
number of `mj_step` calls on the same number of threads in one call, open loop, with no observation,
no reward and nothing to wait for between the steps.
"""

from __future__ import annotations

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from contest import contest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from mujoco.rollout import Rollout

from ssm_fast.env_runner.environment import Environment
from ssm_fast.env_runner.vector_physics import MujocoVectorEnv

ENV = "HalfCheetah-v5"
CALLS = 50  # steps in a round

pytestmark = pytest.mark.filterwarnings("ignore")  # Python warns of the fork of AsyncVectorEnv


class Stepping:
    """Steps an environment through the actions `[CALLS, B, 6]`, one step a call."""

    def __init__(self, env, actions):
        self.env, self.actions, self.t = env, actions, 0
        env.reset(seed=0)

    def __call__(self):
        self.env.step(self.actions[self.t % CALLS])
        self.t += 1


class RawSteps:
    """`mj_step` in a Python loop over the rows, on one thread."""

    def __init__(self, model, frame_skip, actions):
        self.model, self.frame_skip, self.actions, self.t = model, frame_skip, actions, 0
        self.rows = [mujoco.MjData(model) for _ in range(actions.shape[1])]

    def __call__(self):
        for data, action in zip(self.rows, self.actions[self.t % CALLS], strict=True):
            data.ctrl[:] = action
            mujoco.mj_step(self.model, data, nstep=self.frame_skip)
        self.t += 1


class OpenLoop:
    """`mj_step` alone on all threads: every CALLS-th call runs that many steps, the others none."""

    def __init__(self, model, frame_skip, actions, threads):
        B, spec = actions.shape[1], mujoco.mjtState.mjSTATE_FULLPHYSICS
        self.model, self.t, self.chunk = model, 0, -(-B // threads)
        self.rows = [mujoco.MjData(model) for _ in range(threads)]
        self.pool = Rollout(nthread=threads if threads > 1 else 0)
        ctrl = actions.transpose(1, 0, 2).astype(np.float64)  # [B, CALLS, 6]
        self.ctrl = np.repeat(ctrl, frame_skip, axis=1)
        first = np.empty(mujoco.mj_stateSize(model, spec))
        mujoco.mj_getState(model, self.rows[0], first, spec)
        self.state = np.tile(first, (B, 1))

    def __call__(self):
        if self.t % CALLS == 0:
            states, _ = self.pool.rollout(
                self.model, self.rows, self.state, self.ctrl, chunk_size=self.chunk
            )
            self.state = states[:, -1].copy()
        self.t += 1


@pytest.mark.parametrize("B", [8, 64])
def test_environment_step(benchmark, B):
    def make():
        return gymnasium.make(ENV)

    mode = AutoresetMode.SAME_STEP
    threads = min(B, torch.get_num_threads())
    floor = f"mj_step, {threads} threads, open loop"
    envs = {
        f"Environment, {threads} threads": Environment(ENV, B),
        "Environment, 1 thread": Environment(ENV, B, num_threads=1),
        f"MujocoVectorEnv, {threads} threads": MujocoVectorEnv(ENV, B),
        "Environment, physics='gymnasium'": Environment(ENV, B, physics="gymnasium"),
        "SyncVectorEnv": SyncVectorEnv([make] * B, autoreset_mode=mode),
        "AsyncVectorEnv": AsyncVectorEnv([make] * B, autoreset_mode=mode),
    }
    own = make().unwrapped
    shape = (CALLS, B, own.model.nu)
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    contenders = {name: Stepping(env, actions) for name, env in envs.items()}
    contenders["mj_step, 1 thread, loop"] = RawSteps(own.model, own.frame_skip, actions)
    contenders[floor] = OpenLoop(own.model, own.frame_skip, actions, threads)
    medians = contest(benchmark, next(iter(envs)), contenders, floor=floor, calls=CALLS)
    benchmark.extra_info["steps_per_second"] = {
        name: B / (ms / 1e3) for name, ms in medians.items()
    }
    for env in envs.values():
        env.close()
