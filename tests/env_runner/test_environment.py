from __future__ import annotations

import copy
import re
from contextlib import closing

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from ssm_fast.env_runner.cartpole_family import CartPoleFamilyEnv, CartPoleVectorEnv
from ssm_fast.env_runner.environment import Environment, MetaEnvironment
from ssm_fast.env_runner.task_families import get_family
from ssm_fast.env_runner.vector_physics import MujocoVectorEnv

pytestmark = pytest.mark.isa_independent
FAMILIES = ["ssm_fast/CartPoleFamily-v0", "ssm_fast/HalfCheetahVel-v0", "ssm_fast/Walker2dBody-v0"]


def by_hand(name, seed, actions, **kwargs):
    """One row stepped with gymnasium.make alone: an independent account of same-step autoreset."""
    env = gymnasium.make(name, **kwargs)
    space = env.action_space
    obs, _ = env.reset(seed=seed)
    rows, total, length = [obs], 0.0, 0
    record = []
    for action in actions:
        if isinstance(space, spaces.Box):
            action = np.clip(action, space.low, space.high).astype(space.dtype)
        final, reward, terminated, truncated, _ = env.step(action)
        total, length = total + reward, length + 1
        obs, episode = final, (np.nan, 0)
        if terminated or truncated:
            episode, total, length = (total, length), 0.0, 0
            obs, _ = env.reset()
        rows.append(obs)
        record.append((obs, final, reward, terminated, truncated, *episode))
    env.close()
    return rows[0], [np.array(column) for column in zip(*record, strict=True)]


@pytest.mark.parametrize(
    ("name", "kwargs", "steps"),
    [
        ("CartPole-v1", {}, 120),
        ("CartPole-v1", {"max_episode_steps": 7}, 40),
        ("Pendulum-v1", {"max_episode_steps": 11}, 40),
        ("HalfCheetah-v5", {"max_episode_steps": 13}, 30),
        ("Walker2d-v5", {"healthy_angle_range": (-0.3, 0.3)}, 60),
    ],
)
@pytest.mark.parametrize("physics", ["auto", "gymnasium"])
def test_rows_equal_gymnasium_stepped_by_hand(name, kwargs, steps, physics):
    B, seed = 3, 41
    rng = np.random.default_rng(0)
    with Environment(name, B, seed=seed, physics=physics, **kwargs) as env:
        if env.discrete:
            actions = rng.integers(env.action_dim, size=(steps, B))
        else:  # beyond the bounds on purpose: they are clipped
            actions = rng.normal(size=(steps, B, env.action_dim)).astype(np.float32) * 2
        first, _ = env.reset()
        columns = []
        for action in actions:
            obs, rewards, terminated, truncated, info = env.step(action)
            assert obs.dtype == np.float32
            assert info["final_obs"].dtype == np.float32
            columns.append(
                (
                    obs,
                    info["final_obs"],
                    rewards,
                    terminated,
                    truncated,
                    info["episode_return"],
                    info["episode_length"],
                )
            )
    got = [np.array(column) for column in zip(*columns, strict=True)]  # each [T, B, ...]
    assert (got[3] | got[4]).any(), "the run must cross the end of an episode"
    for i in range(B):
        want_first, want = by_hand(name, seed + i, actions[:, i], **kwargs)
        np.testing.assert_array_equal(first[i], want_first.astype(np.float32))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g[:, i], w.astype(g.dtype))


@pytest.mark.parametrize("physics", ["vector", "gymnasium"])
def test_elapsed_steps_cut_the_first_episodes_short(physics):
    elapsed = np.array([0, 2, 4])
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 3, 6))
    with (
        Environment("HalfCheetah-v5", 3, 5, seed=0, physics=physics) as env,
        Environment("HalfCheetah-v5", 3, 5, seed=0, physics=physics) as other,
    ):
        np.testing.assert_array_equal(env.reset(elapsed=elapsed)[0], other.reset()[0])
        for t in range(12):
            _, _, _, truncated, info = env.step(actions[t])
            expected = other.step(actions[t])[4]["final_obs"]
            np.testing.assert_array_equal(truncated, (t + 1 + elapsed) % 5 == 0)
            first = t + elapsed < 5
            np.testing.assert_array_equal(info["final_obs"][first], expected[first])
            lengths = np.where(first, 5 - elapsed, 5) * truncated
            np.testing.assert_array_equal(info["episode_length"], lengths)
        env.reset()  # counts from zero again
        assert [env.step(actions[t])[3].all() for t in range(5)] == [False] * 4 + [True]
        for wrong in ([0, 2], [0, 2, 5], [0, 2, -1]):
            with pytest.raises(ValueError, match=r"elapsed must .*, got \["):
                env.reset(elapsed=wrong)
        with pytest.raises(TypeError, match="elapsed must be integers, got float64"):
            env.reset(elapsed=[0.0, 1.0, 2.0])
    with (
        Environment("Counter-v0", 1, length=3) as env,
        pytest.raises(ValueError, match="elapsed needs a time limit"),
    ):
        env.reset(elapsed=[0])


def test_elapsed_counts_in_the_time_limit_alone():
    env = gymnasium.make("Counter-v0", length=9, max_episode_steps=4)
    env._elapsed_steps = 7  # somebody else's
    with Environment.wrap(gymnasium.Wrapper(env)) as wrapped:
        wrapped.reset(elapsed=[3])
        assert wrapped.step(np.zeros((1, 2)))[3].all()
    with (
        Environment.wrap(env.unwrapped) as bare,  # its spec still names a limit
        pytest.raises(ValueError, match="elapsed needs a time limit"),
    ):
        bare.reset(elapsed=[0])
    makers = [
        lambda limit=limit: gymnasium.make("Counter-v0", length=9, max_episode_steps=limit)
        for limit in (4, 2)
    ]
    with Environment.wrap(SyncVectorEnv(makers)) as rows:
        rows.reset(elapsed=[3, 1])
        assert rows.step(np.zeros((2, 2)))[3].all()
        with pytest.raises(ValueError, match=r"elapsed must lie in \[0, \[4, 2\]\), got \[3, 2\]"):
            rows.reset(elapsed=[3, 2])
    with closing(MujocoVectorEnv("HalfCheetah-v5", 2, max_episode_steps=5)) as vector:
        vector.reset(seed=0)
        vector.step(np.zeros((2, 6)))
        options = {"reset_mask": np.array([False, True]), "elapsed": [0, 4]}
        vector.reset(options=options)  # of the second row alone
        assert vector.step(np.zeros((2, 6)))[3].tolist() == [False, True]
        with pytest.raises(ValueError, match=r"elapsed must have shape \[B\] = \[2\], got \[1\]"):
            vector.reset(options={"elapsed": [0]})


def test_time_limit_truncates_and_termination_terminates():
    with Environment("Counter-v0", 2, seed=0, length=3, max_episode_steps=5) as env:
        env.reset()
        for t in range(1, 7):
            obs, _, terminated, truncated, info = env.step(np.zeros((2, 2)))
            assert terminated.tolist() == [t % 3 == 0] * 2
            assert not truncated.any()
            assert (info["final_obs"][:, 1] == (t - 1) % 3 + 1).all()
            assert (obs[:, 1] == t % 3).all()
    with Environment("Counter-v0", 2, seed=0, length=9, max_episode_steps=4) as env:
        env.reset()
        for t in range(1, 9):
            _, _, terminated, truncated, info = env.step(np.zeros((2, 2)))
            assert truncated.tolist() == [t % 4 == 0] * 2
            assert not terminated.any()
            if t % 4 == 0:
                assert info["episode_return"].tolist() == [10.0, 10.0]
                assert info["episode_length"].tolist() == [4, 4]
            else:
                assert np.isnan(info["episode_return"]).all()
                assert info["episode_length"].tolist() == [0, 0]
    assert env.get_episode_statistics() == {
        "episodes": 4.0,
        "mean_return": 10.0,
        "std_return": 0.0,
        "min_return": 10.0,
        "max_return": 10.0,
        "mean_length": 4.0,
    }


def test_rows_have_distinct_seeds_and_a_seed_reproduces_the_run():
    def run(seed, reset_seed=None):
        with Environment("CartPole-v1", 4, seed=seed) as env:
            obs = [env.reset(seed=reset_seed)[0]]
            actions = [env.sample_action() for _ in range(40)]
            obs += [env.step(action)[0] for action in actions]
        return np.array(obs), np.array(actions)

    obs, actions = run(7)
    again, actions_again = run(7)
    np.testing.assert_array_equal(obs, again)
    np.testing.assert_array_equal(actions, actions_again)
    assert not np.array_equal(obs, run(8)[0])
    np.testing.assert_array_equal(obs[0], run(None, 7)[0][0])
    assert len(np.unique(obs[0], axis=0)) == 4
    with Environment("CartPole-v1", 4, seed=7) as env:
        np.testing.assert_array_equal(env.reset()[0], obs[0])
        assert not np.array_equal(env.reset()[0], obs[0])  # the generators run on
        np.testing.assert_array_equal(env.reset(seed=[10, 9, 8, 7])[0], obs[0][::-1])
        np.testing.assert_array_equal(env.reset(seed=np.arange(7, 11))[0], obs[0])


def test_attributes_follow_the_spaces():
    with Environment("HalfCheetah-v5", 2) as env:
        assert (env.input_dim, env.action_dim, env.discrete, env.batch_size) == (17, 6, False, 2)
        assert env.observation_space.shape == (2, 17)
        assert env.action_space.shape == (2, 6)
        np.testing.assert_array_equal(env.action_low, -np.ones(6))
        np.testing.assert_array_equal(env.action_high, np.ones(6))
    with Environment("Acrobot-v1") as env:
        assert (env.input_dim, env.action_dim, env.discrete) == (6, 3, True)
        assert env.action_low is None
        assert env.single_action_space.n == 3
        assert env.max_episode_steps == 500
        assert env.policy_metadata() == {"env_id": "Acrobot-v1"}
    with Environment("Pendulum-v1", max_episode_steps=9) as env:
        assert env.max_episode_steps == 9
        assert env.policy_metadata() == {
            "env_id": "Pendulum-v1",
            "action_low": "[-2.0]",
            "action_high": "[2.0]",
        }


def test_observations_of_other_shapes_and_dtypes_are_flattened():
    with Environment("Counter-v0", 2, seed=0, shape=(2, 3), length=2) as env:
        obs, _ = env.reset()
        assert obs.shape == (2, 6)
        env.step(np.zeros((2, 2)))
        assert env.step(np.zeros((2, 2)))[4]["final_obs"][:, 1].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NoSuchEnv-v0", "NoSuchEnv-v0"),
        ("CartPole-v99", "CartPole-v99"),
        ("no_such_module:Env-v0", "no_such_module"),
        ("not an id", "not an id"),
        ("", "''"),
    ],
)
def test_unknown_id_is_an_error_that_names_it(name, text):
    with pytest.raises(ValueError, match=f"env_name .*{text}.* cannot be made"):
        Environment(name)


def test_id_of_a_lost_module_says_where_modules_are_found():
    with pytest.raises(ValueError, match=r"No module named 'no_such_module'.* PYTHONPATH names"):
        Environment("no_such_module:Env-v0")


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"observation_space": spaces.Discrete(4)},
            r"observation space must be a Box.*Discrete\(4",
        ),
        ({"observation_space": spaces.Dict(a=spaces.Box(0, 1))}, "observation space must be a Box"),
        ({"action_space": spaces.MultiDiscrete([2, 3])}, r"action space .*MultiDiscrete"),
        ({"action_space": spaces.Box(-1, 1, (2, 2))}, r"action space .*\(2, 2\)"),
        ({"action_space": spaces.Box(0, 9, (2,), np.int64)}, r"action space .*int64"),
        ({"action_space": spaces.Discrete(3, start=1)}, r"action space .*start=1"),
    ],
)
def test_unsupported_spaces_are_named_and_the_environments_closed(kwargs, text, monkeypatch):
    closed = []
    entry = gymnasium.spec("Counter-v0").entry_point
    monkeypatch.setattr(entry, "close", lambda self: closed.append(self))
    with pytest.raises(ValueError, match=text):
        Environment("Counter-v0", 3, **kwargs)
    assert len(closed) == 3


@pytest.mark.parametrize("nan_in", ["obs", "reward", "large", "large reward"])
def test_nan_from_an_environment_names_its_index_and_step(nan_in):
    env = Environment("Counter-v0", 3, seed=20, nan_in=nan_in, nan_seed=21, length=9)
    env.reset()
    for _ in range(4):
        env.step(np.zeros((3, 2)))
    what = "reward" if "reward" in nan_in else "observation"
    with pytest.raises(
        FloatingPointError, match=rf"Counter-v0: environment 1 .*non-finite {what} at step 5 "
    ):
        env.step(np.zeros((3, 2)))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros((3, 2)))
    env.reset()  # usable again
    env.step(np.zeros((3, 2)))
    env.close()


def test_wrong_actions_are_refused_before_an_environment_moves():
    with Environment("Counter-v0", 2, seed=0) as env:
        raw = [sub.unwrapped for sub in env._envs]
        with pytest.raises(RuntimeError, match=r"reset\(\) before step"):
            env.step(np.zeros((2, 2)))
        env.reset()
        with pytest.raises(ValueError, match=r"\[B, action_dim\] = \[2, 2\], got \[2, 3\]"):
            env.step(np.zeros((2, 3)))
        with pytest.raises(ValueError, match="got \\[2\\]"):
            env.step(np.zeros(2))
        with pytest.raises(TypeError, match="floating for Box, got int64"):
            env.step(np.zeros((2, 2), np.int64))
        for bad in (np.nan, np.inf):
            with pytest.raises(ValueError, match=r"finite.*row 1"):
                env.step(np.array([[0.0, 0.0], [0.0, bad]]))
        assert raw[0].received == raw[1].received == []
    with Environment("CartPole-v1", 2, seed=0) as env:
        env.reset()
        with pytest.raises(TypeError, match="integers for Discrete, got float64"):
            env.step(np.zeros(2))
        with pytest.raises(TypeError, match="integers for Discrete, got bool"):
            env.step(np.zeros(2, bool))
        with pytest.raises(ValueError, match=r"\[0, 2\), got \[0, 2\]"):
            env.step([0, 2])
        with pytest.raises(ValueError, match=r"\[0, 2\)"):
            env.step([0, -1])
        with pytest.raises(ValueError, match=r"\[B\] = \[2\], got \[2, 1\]"):
            env.step(np.zeros((2, 1), int))
        obs = env.step([1, 1])[0]
        want = by_hand("CartPole-v1", 0, [1])[1][0][0]
        np.testing.assert_array_equal(obs[0], want)
        assert env.get_episode_statistics()["episodes"] == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, torch.float32])
def test_floating_actions_are_clipped_and_cast(dtype):
    raw = [[0.25, 3.0], [-7.0, 1.0]]
    actions = torch.tensor(raw) if isinstance(dtype, torch.dtype) else np.array(raw, dtype)
    with Environment("Counter-v0", 2, seed=0) as env:
        env.reset()
        env.step(actions)
        received = np.array([sub.unwrapped.received[0] for sub in env._envs])
    assert received.dtype == np.float32
    assert received.tolist() == [[0.25, 1.0], [-1.0, 1.0]]
    assert actions.tolist() == raw  # the caller's own array stays


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, torch.int64])
def test_discrete_actions_of_any_integer_dtype(dtype):
    actions = torch.tensor([1, 0]) if isinstance(dtype, torch.dtype) else np.array([1, 0], dtype)
    with Environment("CartPole-v1", 2, seed=3) as env:
        env.reset()
        obs = env.step(actions)[0]
    for i, action in enumerate((1, 0)):
        np.testing.assert_array_equal(obs[i], by_hand("CartPole-v1", 3 + i, [action])[1][0][0])


def test_arrays_of_a_step_are_the_callers_own():
    with Environment("Counter-v0", 2, seed=0, length=9) as env:
        env.reset()
        a = env.step(np.zeros((2, 2)))
        copies = [np.copy(a[0]), np.copy(a[4]["final_obs"])]
        a[0][0] = 99.0
        np.testing.assert_array_equal(a[4]["final_obs"], copies[1])
        env.step(np.zeros((2, 2)))
        np.testing.assert_array_equal(a[4]["final_obs"], copies[1])
        np.testing.assert_array_equal(a[0][1], copies[0][1])


class OneSeed(VectorEnv):
    """Noise, seeded as the `reset` of Gymnasium's `VectorEnv` is: with one number or none."""

    num_envs = 2
    single_observation_space = spaces.Box(0.0, 1.0, (3,), np.float32)
    single_action_space = spaces.Discrete(2)
    observation_space = spaces.Box(0.0, 1.0, (2, 3), np.float32)
    action_space = spaces.MultiDiscrete([2, 2])

    def __init__(self):
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        return self.np_random.random((2, 3), np.float32), {}


class Frugal(gymnasium.Env):
    """Reports in a dict, an array and an observation that it makes once."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))
    action_space = spaces.Discrete(2)
    shared = np.zeros(1)

    def __init__(self):
        self.info = {"count": 0, "at": np.zeros(1), "inner": {"count": 0}}

    def _tell(self, count, state):
        self.info["count"] = self.info["inner"]["count"] = count
        self.info["at"][0] = count
        self.shared[0] = state
        return self.shared, self.info

    def reset(self, *, seed=None, options=None):
        self.start = seed if seed is not None else self.start + 10
        return self._tell(0, self.start)

    def step(self, action):
        obs, info = self._tell(self.info["count"] + 1, -1)
        return obs, 1.0, self.info["count"] == 2, False, info


def test_info_is_kept_where_an_environment_uses_its_dict_again():
    gymnasium.register("Frugal-v0", Frugal, disable_env_checker=True)
    try:
        with Environment("Frugal-v0", 2) as env:
            obs, start = env.reset(seed=3)
            assert obs.tolist() == [[3.0], [4.0]]
            first = env.step([0, 0])[4]
            obs, _, terminated, _, last = env.step([0, 0])
    finally:
        del gymnasium.registry["Frugal-v0"]
    assert terminated.all()
    assert obs.tolist() == [[13.0], [14.0]]  # the rows share the memory of their observations
    assert last["final_obs"].tolist() == [[-1.0], [-1.0]]
    for count, info in enumerate((start, first, last)):
        for row in info["env_info"]:
            assert row == {"count": count, "at": count, "inner": {"count": count}}


class Strange(gymnasium.Env):
    """Its second row does something else from the second step on."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))
    action_space = spaces.Discrete(2)
    returns = (np.zeros(2), 1.0, False, False, {})

    def __init__(self, what, call="step"):
        self.what, self.call = what, call

    def _act(self, usual):
        if isinstance(self.what, Exception):
            raise self.what
        return self.what(*usual)

    def reset(self, *, seed=None, options=None):
        self.row, self.count, self.options = seed, 0, options
        usual = np.zeros(2), {}
        return self._act(usual) if self.call == "reset" and seed == 1 else usual

    def step(self, action):
        self.count += 1
        is_strange = self.call == "step" and self.row == 1 and self.count == 2
        return self._act(self.returns) if is_strange else self.returns


@pytest.fixture
def _strange():
    gymnasium.register("Strange-v0", Strange, disable_env_checker=True)
    yield
    del gymnasium.registry["Strange-v0"]


@pytest.mark.usefixtures("_strange")
@pytest.mark.parametrize(
    "error", [TypeError("a"), KeyError("b"), ValueError("not enough values to unpack")]
)
@pytest.mark.parametrize("limit", [None, 9])
def test_an_error_of_an_environment_names_it_and_asks_for_a_reset(error, limit):
    with Environment("Strange-v0", 3, limit, seed=0, what=error) as env:
        env.reset()
        env.step([0, 0, 0])
        with pytest.raises(type(error)) as raised:
            env.step([0, 0, 0])
        assert raised.value is error
        note = "in environment 1 of Strange-v0, at step 2 of its episode"
        assert error.__notes__[-1] == note
        assert raised.traceback[-1].name == "_act"
        with pytest.raises(RuntimeError, match=r"reset\(\) before step"):
            env.step([0, 0, 0])
        env.reset(seed=5)  # the rows start together
        env.step([0, 0, 0])
        assert [row.unwrapped.count for row in env._envs] == [1, 1, 1]
    with Environment("Strange-v0", 3, limit, seed=0, what=error, call="reset") as env:
        with pytest.raises(type(error)):
            env.reset()
        assert error.__notes__[-1] == "in environment 1 of Strange-v0, at its reset"
        with pytest.raises(RuntimeError, match=r"reset\(\) before step"):
            env.step([0, 0, 0])
        with pytest.raises(type(error)):
            env.reset()  # still by the constructor's seed


@pytest.mark.usefixtures("_strange")
@pytest.mark.parametrize("limit", [None, 9])
@pytest.mark.parametrize(
    ("what", "text"),
    [
        (
            lambda o, r, e, t, i: (o, np.ones(1), e, t, i),
            r"number as reward.* got reward array.*float",
        ),
        (lambda o, r, e, t, i: (o, "x", e, t, i), "number as reward.* got reward 'x'"),
        (
            lambda o, r, e, t, i: (o, r, np.ones(2), t, i),
            "bool each as terminated.* terminated array",
        ),
        (lambda o, r, e, t, i: (o, r, e, i), r"step must return \(observation.*got 4.*done in the"),
        (lambda o, r, e, t, i: o, r"step must return \(observation, reward, terminated"),
    ],
)
def test_what_is_no_step_of_gymnasiums_is_named(what, text, limit):
    with Environment("Strange-v0", 3, limit, seed=0, what=what) as env:
        env.reset()
        env.step([0, 0, 0])
        with pytest.raises(ValueError, match=f"Strange-v0: environment 1.*{text}"):
            env.step([0, 0, 0])
        with pytest.raises(RuntimeError, match=r"reset\(\) before step"):
            env.step([0, 0, 0])


@pytest.mark.usefixtures("_strange")
def test_a_reset_of_the_old_interface_is_named():
    with (
        Environment("Strange-v0", 3, seed=0, what=lambda obs, info: obs, call="reset") as env,
        pytest.raises(
            ValueError, match=r"environment 1: reset must return \(observation, info\), got nd"
        ),
    ):
        env.reset()


class BrokenVector(OneSeed):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def step(self, actions):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (KeyError("x"), "'x'"),
        (
            (np.zeros((2, 3)), np.zeros(2), np.zeros(2, bool), {}),
            "step must return .* got 4 values",
        ),
        (
            (np.zeros((2, 3)), np.zeros((2, 1)), np.zeros(2, bool), np.zeros(2, bool), {}),
            r"rewards must have shape \[2\], got \[2, 1\]",
        ),
        (
            (np.zeros((3, 2)), np.zeros(2), np.zeros(2, bool), np.zeros(2, bool), {}),
            r"observations must have shape \[2, 3\], got \[3, 2\]",
        ),
        (
            (np.zeros((2, 3)), np.zeros(2), np.ones(2, bool), np.zeros(2, bool), {}),
            "info must have 'final_obs' where episodes end",
        ),
    ],
)
def test_an_error_of_a_vector_environment_names_it_and_asks_for_a_reset(result, text):
    with Environment.wrap(BrokenVector(result), seed=0) as env:
        env.reset()
        kind = type(result) if isinstance(result, Exception) else ValueError
        with pytest.raises(kind, match=text) as raised:
            env.step([0, 0])
        assert "BrokenVector" in "".join(
            [str(raised.value), *getattr(raised.value, "__notes__", [])]
        )
        with pytest.raises(RuntimeError, match=r"reset\(\) before step"):
            env.step([0, 0])


@pytest.mark.parametrize("physics", ["vector", "gymnasium"])
def test_an_interrupted_step_asks_for_a_reset(physics, monkeypatch):
    with Environment(FAMILIES[0], 2, seed=0, physics=physics) as env:
        env.reset()
        kind = CartPoleVectorEnv if physics == "vector" else CartPoleFamilyEnv
        name = "_advance" if physics == "vector" else "step"
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, lambda self, action: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                env.step([0, 0])
        with pytest.raises(RuntimeError, match=r"reset\(\) before step"):
            env.step([0, 0])
        if physics == "vector":
            with pytest.raises(RuntimeError, match=r"reset\(\) before step"):
                env._vector.step(np.zeros(2, int))
        env.reset()
        env.step([0, 0])


@pytest.mark.usefixtures("_strange")
def test_options_of_a_reset():
    with Environment("Strange-v0", 2, seed=0, what=None, call=None) as env:
        env.reset(options={"low": 1})
        assert [row.unwrapped.options for row in env._envs] == [{"low": 1}] * 2
        with pytest.raises(ValueError, match="options must not have 'reset_mask'"):
            env.reset(options={"reset_mask": np.ones(2, bool)})
    with Environment.wrap(gymnasium.make_vec("CartPole-v1", 2, "sync")) as env:
        obs, _ = env.reset(seed=0, options={"low": 0.01, "high": 0.02})
        assert ((obs >= 0.01) & (obs <= 0.02)).all()
    with Environment(FAMILIES[0], 2) as env:
        with pytest.raises(ValueError, match=r"options must be None .*\['low'\].* physics='gymn"):
            env.reset(options={"low": 0.01})
        env.reset(options={})


def test_an_environment_that_cannot_be_made_is_named():
    gymnasium.register("Mistyped-v0", "gymnasium.envs.classic_control:CartPoolEnv")
    gymnasium.register("Colonless-v0", "gymnasium.envs.classic_control.CartPoleEnv")
    gymnasium.register("Raises-v0", Strange)
    try:
        for name, text in (("Mistyped-v0", "'CartPoolEnv'"), ("Colonless-v0", "'module:class'")):
            with pytest.raises(ValueError, match=f"'{name}' cannot be made: .*{text}"):
                Environment(name)
        with pytest.raises(TypeError, match="'what'") as raised:
            Environment("Raises-v0")
        assert raised.value.__notes__ == ["in the making of Raises-v0"]
    finally:
        for name in ("Mistyped-v0", "Colonless-v0", "Raises-v0"):
            del gymnasium.registry[name]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0, 1000, "[0, 1000]"), (100, 101, "[100, 101]"), (-0.01, 0.01, "[-0.01, 0.01]")],
)
def test_actions_far_from_what_a_policy_starts_with_are_said(low, high, shown):
    box = spaces.Box(np.array([-1, low], np.float32), np.array([1, high], np.float32))
    pattern = (
        rf"Counter-v0: component 1 of the actions .*{re.escape(shown)}.*RescaleAction\(env, -1, 1\)"
    )
    with pytest.warns(UserWarning, match=pattern):
        env = Environment("Counter-v0", action_space=box)
    env.close()
    rescaled = gymnasium.wrappers.RescaleAction(
        gymnasium.make("Counter-v0", action_space=box), np.float32(-1), np.float32(1)
    )
    with Environment.wrap(rescaled) as env:  # without a warning
        env.reset()
        env.step(np.ones((1, 2)))
        np.testing.assert_allclose(rescaled.unwrapped.received[0], [1, high], rtol=1e-5)


def test_no_warning_of_ranges_that_a_policy_can_learn_in():
    for low, high in ((-3, 3), (0, 1), (-0.4, 0.4), (-np.inf, np.inf), (0, np.inf)):
        box = spaces.Box(low, high, (2,))
        Environment("Counter-v0", action_space=box).close()


def test_flattened_pictures_are_said():
    box = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    text = r"Counter-v0: .* shape \[64, 64, 3\] are flattened to 12,288 inputs.*ResizeObservation"
    with pytest.warns(UserWarning, match=text):
        env = Environment("Counter-v0", observation_space=box, shape=(64, 64, 3))
    assert env.input_dim == 12288
    env.close()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_changes_that_float32_rounds_away_are_said(wrapped, dtype):
    class Clock(gymnasium.Env):
        observation_space = spaces.Box(0, 1e18, (2,), dtype)
        action_space = spaces.Discrete(2)

        def __init__(self, start=1.7e9):
            self.start = start

        def reset(self, *, seed=None, options=None):
            self.count = 0
            return np.array([0, self.start], dtype), {}

        def step(self, action):
            self.count += 1
            obs = np.array([self.count, self.start + self.count], dtype)
            return obs, 0.0, False, False, {}

    def make(start):
        makers = [lambda: Clock(start)] * 2
        if not wrapped:
            return Environment.wrap(SyncVectorEnv(makers))
        return Environment.wrap(AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP))

    with make(1.7e9) as env:
        env.reset()
        with pytest.warns(UserWarning, match=r"component \[1\] .* 1700000000.0 to 1700000001.0"):
            env.step([0, 0])
        env.step([0, 0])  # once is enough
        env.reset()
        env.step([0, 0])
    with make(2.0**23) as env:  # float32 tells these apart
        env.reset()
        assert env.step([0, 0])[0].tolist() == [[1.0, 2.0**23 + 1]] * 2


def test_wrong_observation_shape_is_named():
    box = spaces.Box(-1, 1, (4,))
    with (
        Environment("Counter-v0", 2, observation_space=box, shape=(2,)) as env,
        pytest.raises(ValueError, match=r"environment 0 must return .* shape \[4\], got \[2\]"),
    ):
        env.reset()


def test_close_twice_and_use_after_close():
    env = Environment("Counter-v0", 2)
    raw = [sub.unwrapped for sub in env._envs]
    env.reset()
    env.close()
    env.close()
    assert [sub.closed for sub in raw] == [1, 1]
    for call in (env.reset, env.render, lambda: env.step(np.zeros((2, 2)))):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_render():
    with Environment("Counter-v0", 2, seed=0, render_mode="rgb_array") as env:
        env.reset()
        env.step(np.zeros((2, 2)))
        frames = env.render()
    assert [frame.shape for frame in frames] == [(2, 2, 3)] * 2
    assert frames[0].max() == 1
    with (
        Environment("Counter-v0") as env,
        pytest.raises(RuntimeError, match="render_mode='rgb_array'"),
    ):
        env.render()


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"batch_size": 0}, ValueError),
        ({"max_episode_steps": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 1.5}, TypeError),
        ({"seed": True}, TypeError),
        ({"physics": "native"}, ValueError),
        ({"num_threads": 0}, ValueError),
    ],
)
def test_wrong_arguments(kwargs, error):
    with pytest.raises(error, match=next(iter(kwargs))):
        Environment("CartPole-v1", **kwargs)


def _run(env, steps=30, seed=5):
    rng = np.random.default_rng(1)
    out = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        obs, rewards, terminated, truncated, info = env.step(rng.integers(2, size=env.batch_size))
        out += [obs, rewards, terminated, truncated, info["final_obs"], info["episode_return"]]
    return out


def test_wrap_equals_the_environment_made_by_id():
    with Environment("CartPole-v1", 3) as env:
        want = _run(env)
    assert any(np.isfinite(a).any() for a in want[6::6]), "an episode must end"
    makers = [lambda: gymnasium.make("CartPole-v1")] * 3
    vectors = [
        SyncVectorEnv(makers),
        SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP),
        AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP),
    ]
    for vector in vectors:
        with Environment.wrap(vector) as env:
            assert env.batch_size == 3
            for got, expected in zip(_run(env), want, strict=True):
                np.testing.assert_array_equal(got, expected)
        assert vector.closed
    with Environment("CartPole-v1") as env:
        want = _run(env)
    with Environment.wrap(gymnasium.make("CartPole-v1")) as env:
        assert env.env_name == "CartPole-v1"
        for got, expected in zip(_run(env), want, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_wrap_seeds_a_vector_environment_as_gymnasium_does():
    with Environment.wrap(OneSeed()) as env:
        want = OneSeed().reset(seed=5)[0]
        np.testing.assert_array_equal(env.reset(seed=5)[0], want)
        assert not np.array_equal(env.reset()[0], want)
        np.testing.assert_array_equal(env.reset(seed=5)[0], want)


class DoubledRewards(SyncVectorEnv):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, 2 * rewards, *rest


class ShiftedResets(SyncVectorEnv):
    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs + 1, info


def test_wrap_calls_the_methods_of_a_subclass():
    makers = [lambda: gymnasium.make("CartPole-v1")] * 2
    mode = AutoresetMode.SAME_STEP
    with Environment.wrap(DoubledRewards(makers, autoreset_mode=mode)) as env:
        assert env.env_name == "CartPole-v1"
        assert env.max_episode_steps == 500
        first = env.reset(seed=0)[0]
        for _ in range(30):  # the pole falls
            _, rewards, terminated, _, info = env.step([1, 1])
            assert rewards.tolist() == [2.0, 2.0]
            if terminated[0]:
                assert info["episode_return"][0] == 2 * info["episode_length"][0]
                break
        assert terminated[0]
    with Environment.wrap(ShiftedResets(makers, autoreset_mode=mode)) as env:
        np.testing.assert_array_equal(env.reset(seed=0)[0], first + 1)
    vector = SyncVectorEnv(makers, autoreset_mode=mode)
    stepped = vector.step
    vector.step = lambda actions: (*stepped(actions)[:1], np.full(2, 7.0), *stepped(actions)[2:])
    with Environment.wrap(vector) as env:
        env.reset(seed=0)
        assert env.step([1, 1])[1].tolist() == [7.0, 7.0]
    vector = DoubledRewards(makers)
    with pytest.raises(ValueError, match=r"SAME_STEP, got AutoresetMode\.NEXT_STEP"):
        Environment.wrap(vector)
    vector.close()


def test_wrap_calls_the_methods_of_a_subclass_of_an_array_version():
    class Doubled(CartPoleVectorEnv):
        def step(self, actions):
            obs, rewards, terminated, truncated, info = super().step(actions)
            return obs, 2 * rewards, terminated, truncated, info | {"mine": 2 * rewards}

    with Environment.wrap(Doubled(FAMILIES[0], 2), seed=0) as env:
        env.reset()
        _, rewards, _, _, info = env.step([1, 0])
        assert rewards.tolist() == [2.0, 2.0]
        assert info["env_info"][1] == {"mine": 2.0}


def test_set_tasks_calls_the_method_of_a_wrapper():
    received = []

    class Listens(gymnasium.Wrapper):
        def set_task(self, task):
            received.append(task)
            self.env.unwrapped.set_task(task)

    tasks = get_family(FAMILIES[0]).sample(1, 0)
    with Environment.wrap(Listens(gymnasium.make(FAMILIES[0]))) as env:
        env.set_tasks(tasks)
        env.reset()
        assert env.tasks == tuple(received) == tasks


def test_wrappers_of_vector_environments_by_the_message_that_refuses_them():
    outer = gymnasium.wrappers.vector
    vector = outer.NormalizeObservation(gymnasium.make_vec("Pendulum-v1", 2))
    with pytest.raises(
        ValueError, match=r"SAME_STEP, got .*NEXT_STEP: .*wrappers=\[gymnasium.wrappers.Norm"
    ):
        Environment.wrap(vector)
    vector.close()
    follow = {
        "wrappers": [gymnasium.wrappers.NormalizeObservation],
        "vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP},
    }
    vector = outer.RecordEpisodeStatistics(gymnasium.make_vec("Pendulum-v1", 2, "sync", **follow))
    with Environment.wrap(vector, seed=0) as env:
        env.reset()
        for _ in range(200):
            info = env.step(np.zeros((2, 1)))[4]
        np.testing.assert_allclose(info["env_info"]["episode"]["r"], info["episode_return"], 1e-6)


def test_auto_takes_the_vector_physics_where_it_can():
    pytest.importorskip("mujoco.batch", reason="vector physics needs mujoco 3.17 or later")

    def taken(*args, **kwargs):
        with Environment(*args, **kwargs) as env:
            assert repr(env) == f"Environment({args[0]!r}, batch_size=1, physics={env.physics!r})"
            return env.physics

    assert taken("HalfCheetah-v5") == "vector"
    assert taken("HalfCheetah-v5", physics="vector", num_threads=2) == "vector"
    assert taken("HalfCheetah-v5", forward_reward_weight=2.0, max_episode_steps=5) == "vector"
    assert taken("HalfCheetah-v5", physics="gymnasium") == "gymnasium"
    assert taken("HalfCheetah-v5", render_mode="rgb_array") == "gymnasium"
    assert taken("CartPole-v1") == "gymnasium"
    for name, kwargs in (("CartPole-v1", {}), ("Ant-v5", {"width": 32})):
        with pytest.raises(ValueError, match=f"physics='vector' cannot run env_name '{name}': "):
            Environment(name, physics="vector", **kwargs)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Humanoid-v5"])
def test_vector_physics_reports_the_same_rows_as_gymnasium(name):
    pytest.importorskip("mujoco.batch", reason="vector physics needs mujoco 3.17 or later")
    envs = [Environment(name, 3, 25, seed=2, physics=p) for p in ("vector", "gymnasium")]
    resets = [env.reset()[1]["env_info"] for env in envs]
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(60):
        actions = 0.4 * rng.uniform(-1, 1, (3, envs[0].action_dim)).astype(np.float32)
        (*ours, info), (*gymnasiums, want) = (env.step(actions) for env in envs)
        for a, b in zip(ours, gymnasiums, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(info["final_obs"], want["final_obs"])
        ends += np.isfinite(info["episode_return"]).sum()
        resets += [info["env_info"], want["env_info"]]
    assert ends >= 6
    for got, expected in zip(resets[::2], resets[1::2], strict=True):
        assert len(got) == len(got[:]) == 3
        for a, b in zip(got, expected, strict=True):
            assert a.keys() == b.keys()
            for key in b:
                np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-12)
    for env in envs:
        env.close()


def test_wrap_takes_rows_with_models_of_their_own():
    pytest.importorskip("mujoco.batch", reason="vector physics needs mujoco 3.17 or later")
    vector = MujocoVectorEnv("Hopper-v5", 2)
    models = [copy.copy(vector.model) for _ in range(2)]
    models[1].body_mass[:] *= 2
    vector.set_models(models)
    with Environment.wrap(vector, seed=0) as env, Environment("Hopper-v5", 2, seed=0) as usual:
        assert env.physics == "vector"
        env.reset()
        usual.reset()
        actions = np.full((2, 3), 0.3)
        heavy, light = env.step(actions)[0], usual.step(actions)[0]
        np.testing.assert_array_equal(heavy[0], light[0])
        assert not np.array_equal(heavy[1], light[1])
    assert vector.closed


def test_wrap_refuses_what_it_cannot_step_correctly():
    vector = gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point")
    with pytest.raises(ValueError, match=r"SAME_STEP, got AutoresetMode.NEXT_STEP"):
        Environment.wrap(vector)
    vector.close()
    with pytest.raises(TypeError, match=r"must be a gymnasium\.Env"):
        Environment.wrap("CartPole-v1")


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_play_tasks_of_their_own_whatever_steps_them(name):
    if "CartPole" not in name:
        pytest.importorskip("mujoco.batch", reason="vector physics needs mujoco 3.17 or later")
    tasks = get_family(name).sample(6, 0)
    first, second = tasks[:3], tasks[3:]
    kwargs = {"max_episode_steps": 25, "seed": 2, "tasks": first}
    envs = [Environment(name, 3, physics=p, **kwargs) for p in ("auto", "gymnasium")]
    assert [env.physics for env in envs] == ["vector", "gymnasium"]
    assert envs[0].tasks == envs[1].tasks == first
    for env in envs:
        env.action_space.seed(0)
    ends = 0
    for now, then in ((first, second), (second, first)):
        obs, want = (env.reset()[0] for env in envs)
        np.testing.assert_array_equal(obs, want)
        for env in envs:
            assert env.tasks == now
            env.set_tasks(then)  # has no effect till the next reset
        for _ in range(60):
            actions = envs[0].sample_action()
            (*ours, info), (*rows, want) = (env.step(actions) for env in envs)
            for a, b in zip(ours, rows, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
            np.testing.assert_array_equal(info["final_obs"], want["final_obs"])
            assert [set(row) for row in info["env_info"]] == [set(row) for row in want["env_info"]]
            ends += np.isfinite(info["episode_return"]).sum()
        assert envs[0].tasks == envs[1].tasks == now
    assert ends >= 12
    for env in envs:
        env.close()


def test_tasks_of_a_wrapped_environment():
    tasks = get_family(FAMILIES[0]).sample(2, 0)
    makers = [lambda: gymnasium.make(FAMILIES[0])] * 2
    for vector in (SyncVectorEnv(makers), CartPoleVectorEnv(FAMILIES[0], 2)):
        with Environment.wrap(vector) as env:
            assert env.family is get_family(FAMILIES[0])
            env.set_tasks(tasks)
            env.reset()
            assert env.tasks == tasks
    single = gymnasium.make(FAMILIES[0])
    with Environment.wrap(single) as env:
        env.set_tasks(tasks[:1])
        env.reset()
        single.unwrapped.set_task(tasks[1])  # the latest word counts
        env.reset()
        assert env.tasks == tasks[1:]
    # Other libraries change the start method of the process; a spawned child knows no id but by module.
    makers = [lambda: gymnasium.make(f"ssm_fast.env_runner:{FAMILIES[0]}")] * 2
    vector = AsyncVectorEnv(makers, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
    with Environment.wrap(vector) as env:
        with pytest.raises(ValueError, match="'AsyncVectorEnv' is no task family"):
            env.set_tasks(tasks)
        assert env.tasks == ()


def test_wrong_tasks():
    name = FAMILIES[0]
    task = get_family(name).default_task
    for physics in ("vector", "gymnasium"):
        with Environment(name, 2, physics=physics) as env:
            assert env.tasks == (task, task)
            with pytest.raises(ValueError, match="tasks must have 2 entries, got 1"):
                env.set_tasks([task])
            with pytest.raises(TypeError, match=r"must be CartPoleTask, got 3\.0"):
                env.set_tasks([task, 3.0])
        with pytest.raises(RuntimeError, match="closed"):
            env.set_tasks([task, task])
    with pytest.raises(ValueError, match="tasks must have 2 entries, got 1"):
        Environment(name, 2, tasks=[task])
    with Environment("CartPole-v1") as env:
        assert env.family is None
        assert env.tasks == ()
        with pytest.raises(ValueError, match="'CartPole-v1' is no task family"):
            env.set_tasks([task])


def test_meta_environment_draws_tasks_that_differ():
    name = FAMILIES[0]
    with MetaEnvironment(name, num_tasks=12, batch_size=8, seed=3) as env:
        family = get_family(name)
        assert len(set(env.tasks_to_learn)) == 12
        assert not {*env.tasks_to_learn} & {*family.test_tasks, *family.out_of_range_tasks}
        drawn = [env.sample_task() for _ in range(200)]
        assert set(drawn) == set(env.tasks_to_learn)
        env.reset()
        assert env.tasks == (drawn[-1],) * 8
        rows = env.sample_tasks()
        assert len(set(rows)) == 8
        obs, _ = env.reset(seed=[0] * 8)
        assert env.tasks == rows
        assert len(np.unique(obs, axis=0)) == 1
        obs = env.step(np.ones(8, dtype=int))[0]
        assert len(np.unique(obs, axis=0)) == 8, "one action in eight tasks"
    with MetaEnvironment(name, num_tasks=12, batch_size=8, seed=3) as again:
        assert [again.sample_task() for _ in range(200)] == drawn
        assert again.sample_tasks() == rows
    with MetaEnvironment(name, num_tasks=12, seed=4) as other:
        assert not set(other.tasks_to_learn) & set(env.tasks_to_learn)
    with MetaEnvironment(name, batch_size=101) as env:
        assert env.tasks_to_learn == get_family(name).train_tasks
        assert set(env.sample_tasks()) <= set(get_family(name).train_tasks)


def test_meta_environment_refuses_what_has_no_tasks():
    with pytest.raises(ValueError, match="'CartPole-v1' is no task family; expected one of"):
        MetaEnvironment("CartPole-v1", num_tasks=5)
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        MetaEnvironment(FAMILIES[0], num_tasks=0)
    with pytest.raises(ValueError, match=r"num_tasks must be at most 2 for .*Dir-v0, got 3"):
        MetaEnvironment("ssm_fast/HalfCheetahDir-v0", num_tasks=3)
    with MetaEnvironment("ssm_fast/HalfCheetahDir-v0", num_tasks=2, seed=0) as env:
        assert {task.direction for task in env.tasks_to_learn} == {1.0, -1.0}
