"""A step of 8 and of 64 HalfCheetahs beside Gymnasium's vector environments and the physics alone.

Every contender plays the same random actions on and on. The floor is `mujoco.rollout`: the same
number of `mj_step` calls on the same number of threads in one call, open loop, with no observation,
no reward and nothing to wait for between the steps. A step on two threads takes as long as the
thread that got less of its core, so rounds in which another process held a core do not count.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from mujoco.rollout import Rollout

from ssm_fast.env_runner.environment import Environment
from ssm_fast.env_runner.vector_physics import MujocoVectorEnv

ENV = "HalfCheetah-v5"
CALLS = 20  # steps in a round
SECONDS = 40.0  # for all contenders
CALM = 0.03  # of a round's time, that the threads of a counting round waited for a core

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
    """`mj_step` alone on all threads: a round's first call runs all its steps, the others none."""

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


def waited():
    """Seconds that the threads of this process stood ready without a core (Linux; 0 elsewhere)."""
    schedstats = Path("/proc/self/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[1]) for path in schedstats) / 1e9


def calm_rounds(contenders):
    """Returns the seconds a step of the calm rounds, or the calmest three, of each contender."""
    rounds = {name: [] for name in contenders}
    for run in contenders.values():
        for _ in range(CALLS):
            run()
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        for name, run in contenders.items():
            before, began = waited(), time.perf_counter()
            for _ in range(CALLS):
                run()
            seconds = time.perf_counter() - began
            rounds[name].append(((waited() - before) / seconds, seconds / CALLS))
    return {
        name: [s for wait, s in measured if wait < CALM] or [s for _, s in sorted(measured)[:3]]
        for name, measured in rounds.items()
    }


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
    rounds = calm_rounds(contenders)
    medians = {name: statistics.median(seconds) * 1e3 for name, seconds in rounds.items()}
    ours = next(iter(envs))
    benchmark.extra_info |= {
        "ours": ours,
        "floor": floor,
        "median_ms": medians,
        "over_ours": {name: ms / medians[ours] for name, ms in medians.items()},
        "steps_per_second": {name: B / ms * 1e3 for name, ms in medians.items()},
        "rounds": {name: len(seconds) for name, seconds in rounds.items()},
    }
    benchmark.pedantic(contenders[ours], rounds=5, iterations=1)
    for env in envs.values():
        env.close()
