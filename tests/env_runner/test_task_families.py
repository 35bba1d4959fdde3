from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from ssm_fast.env_runner import (
    AntDirTask,
    CartPoleTask,
    HalfCheetahBodyTask,
    HalfCheetahDirTask,
    HalfCheetahVelTask,
    TaskFamily,
    Walker2dBodyTask,
    get_family,
    register_family,
)

pytestmark = pytest.mark.isa_independent

DIRECTIONS = ["ssm_fast/HalfCheetahDir-v0", "ssm_fast/AntDir-v0"]
CONTINUOUS = [
    "ssm_fast/CartPoleFamily-v0",
    "ssm_fast/CartPoleUnsignedFamily-v0",
    "ssm_fast/AcrobotFamily-v0",
    "ssm_fast/HalfCheetahVel-v0",
    "ssm_fast/HalfCheetahVel3-v0",
    "ssm_fast/HalfCheetahBody-v0",
    "ssm_fast/Walker2dBody-v0",
]
NAMES = CONTINUOUS + DIRECTIONS
BODY = {"mass": [1.0] * 7, "friction": [1.0] * 9, "damping": [1.0] * 6}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_sets_are_disjoint_and_of_their_sizes(name):
    family = get_family(name)
    sets = family.train_tasks, family.test_tasks, family.out_of_range_tasks
    assert [len(tasks) for tasks in sets] == [100, 40, 20]
    assert len({task for tasks in sets for task in tasks}) == 160
    assert not set(family.sample(300, 0)) & {*family.test_tasks, *family.out_of_range_tasks}


def test_directions_are_all_there_are():
    cheetah, ant = (get_family(name) for name in DIRECTIONS)
    assert {task.direction for task in cheetah.train_tasks} == {1.0, -1.0}
    assert [task.angle for task in ant.train_tasks] == [0.0, 180.0]
    for family in (cheetah, ant):
        assert family.test_tasks == family.train_tasks
        assert set(family.sample(40, 0)) == set(family.train_tasks)
        assert not set(family.out_of_range_tasks) & set(family.train_tasks)
    assert cheetah.out_of_range_tasks == ()
    assert len(ant.out_of_range_tasks) == 6
    np.testing.assert_allclose(AntDirTask(180.0).direction, (-1.0, 0.0), atol=1e-15)


def numbers(task):
    return np.concatenate([np.atleast_1d(value) for value in dataclasses.astuple(task)])


def test_frozen_sets_never_change():
    """Recorded numbers: results of one version are held against those of another."""
    sums = {
        name: [
            round(float(sum(np.sum(numbers(task)) for task in tasks)), 6)
            for tasks in (family.train_tasks, family.test_tasks, family.out_of_range_tasks)
        ]
        for name, family in ((name, get_family(name)) for name in NAMES)
    }
    assert sums == FROZEN


@pytest.mark.parametrize("name", NAMES)
def test_sample_is_seeded_and_grows_at_its_end(name):
    family = get_family(name)
    assert family.sample(10, 3) == family.sample(20, 3)[:10]
    assert family.sample(20, 3) != family.sample(20, 4)
    assert family.sample(0, 3) == ()


def test_draws_lie_in_the_published_ranges():
    for name, highest in (("HalfCheetahVel-v0", 2.0), ("HalfCheetahVel3-v0", 3.0)):
        family = get_family(f"ssm_fast/{name}")
        goals = np.array([task.velocity for task in family.sample(2000, 0)])
        assert 0 <= goals.min() < 0.01 * highest
        assert 0.99 * highest < goals.max() <= highest
        np.testing.assert_allclose(goals.mean(), highest / 2, rtol=0.05)
        beyond = [task.velocity for task in family.out_of_range_tasks]
        assert highest < min(beyond) < max(beyond) <= 1.5 * highest
    for name in ("HalfCheetahBody-v0", "Walker2dBody-v0"):
        family = get_family(f"ssm_fast/{name}")
        for field, base in (("mass", 1.5), ("friction", 1.5), ("damping", 1.3)):
            inside = np.log([getattr(task, field) for task in family.sample(300, 0)]) / np.log(base)
            outside = np.log([getattr(task, field) for task in family.out_of_range_tasks])
            outside = np.abs(outside) / np.log(base)
            assert -3 <= inside.min() < -2.9
            assert 2.9 < inside.max() <= 3
            assert abs(inside.mean()) < 0.15
            assert 3 <= outside.min() < outside.max() <= 4


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_values(name):
    family = get_family(name)
    for task in (*family.sample(5, 0), family.default_task, *family.out_of_range_tasks):
        for copy in (
            pickle.loads(pickle.dumps(task)),
            family.task_type(**json.loads(json.dumps(task.as_dict()))),
        ):
            assert copy == task
            assert hash(copy) == hash(task)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(task, dataclasses.fields(task)[0].name, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_families_pickle_to_themselves(name):
    family = get_family(name)
    assert pickle.loads(pickle.dumps(family)) is family
    assert repr(family) == f"{type(family).__name__}({name!r})"


@pytest.mark.parametrize("name", NAMES)
def test_gymnasiums_checker_finds_nothing(name):
    env = gymnasium.make(name, task=get_family(name).sample(1, 0)[0])
    assert env.spec.max_episode_steps == (500 if "CartPole" in name or "Acrobot" in name else 200)
    with warnings.catch_warnings():
        # all of Gymnasium's own CartPoles and robots have unbounded observations
        warnings.filterwarnings("ignore", message=".*A Box observation space .*infinity")
        check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("name", NAMES)
def test_environments_pickle_with_their_task(name):
    task, other = get_family(name).sample(20, 0)[:2]
    env = gymnasium.make(name, task=task)
    env.unwrapped.set_task(other)
    env.reset(seed=1)
    copy = pickle.loads(pickle.dumps(env))
    for e in (env, copy):
        e.reset(seed=3)
        assert e.unwrapped.task == other
    action = env.action_space.sample()
    for got, want in zip(copy.step(action)[:2], env.step(action)[:2], strict=True):
        np.testing.assert_array_equal(got, want)
    gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json())


@pytest.mark.parametrize("name", NAMES)
def test_a_task_begins_at_the_next_reset(name):
    first = get_family(name).default_task
    second = next(task for task in get_family(name).sample(20, 0) if task != first)

    def steps(env, seed):
        env.reset(seed=seed)
        env.action_space.seed(seed)
        return [env.step(env.action_space.sample())[:2] for _ in range(5)]

    env = gymnasium.make(name)
    want = steps(env, 0)
    env.reset(seed=0)
    env.action_space.seed(0)
    got = [env.step(env.action_space.sample())[:2] for _ in range(2)]
    env.unwrapped.set_task(second)
    got += [env.step(env.action_space.sample())[:2] for _ in range(3)]
    assert env.unwrapped.task == first
    np.testing.assert_array_equal([r for _, r in got], [r for _, r in want])
    np.testing.assert_array_equal([o for o, _ in got], [o for o, _ in want])
    after, fresh = steps(env, 1), steps(gymnasium.make(name, task=second), 1)
    assert env.unwrapped.task == second
    np.testing.assert_array_equal([o for o, _ in after], [o for o, _ in fresh])
    np.testing.assert_array_equal([r for _, r in after], [r for _, r in fresh])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: CartPoleTask(length=float("nan")), ValueError, "length must be finite, got nan"),
        (lambda: CartPoleTask(masspole=0.0), ValueError, r"masspole must be positive, got 0\.0"),
        (lambda: CartPoleTask(masscart=-1), ValueError, "masscart must be positive, got -1"),
        (lambda: CartPoleTask(force_mag=0.0), ValueError, "force_mag must not be 0"),
        (lambda: CartPoleTask(gravity="9.8"), TypeError, "gravity must be a number, got '9.8'"),
        (lambda: CartPoleTask(length=True), TypeError, "length must be a number, got True"),
        (lambda: HalfCheetahDirTask(0.5), ValueError, "direction must be 1 or -1, got 0.5"),
        (lambda: HalfCheetahVelTask(float("inf")), ValueError, "velocity must be finite, got inf"),
        (
            lambda: HalfCheetahBodyTask(**{**BODY, "mass": [1.0] * 6 + [-1.0]}),
            ValueError,
            r"mass\[6\] must be positive, got -1",
        ),
        (
            lambda: HalfCheetahBodyTask(**{**BODY, "damping": [float("nan")] * 6}),
            ValueError,
            r"damping\[0\] must be finite",
        ),
        (lambda: Walker2dBodyTask(**BODY), ValueError, "friction must have 8 entries, got 9"),
        (
            lambda: HalfCheetahBodyTask(**{**BODY, "mass": 1.0}),
            TypeError,
            r"mass must be numbers, got 1\.0",
        ),
        (
            lambda: get_family("CartPole-v1"),
            ValueError,
            r"'CartPole-v1' is no task family; expected one of .*ssm_fast/CartPoleFamily-v0",
        ),
        (lambda: get_family(NAMES[0]).sample(-1, 0), ValueError, "n must not be negative"),
        (lambda: get_family(NAMES[0]).sample(1, -1), ValueError, "seed must not be negative"),
        (lambda: get_family(NAMES[0]).sample(1, 0.5), TypeError, "seed must be an integer"),
        (
            lambda: gymnasium.make(NAMES[0], task=HalfCheetahVelTask(1.0)),
            TypeError,
            "tasks of ssm_fast/CartPoleFamily-v0 must be CartPoleTask, got HalfCheetahVelTask",
        ),
        (
            lambda: gymnasium.make("ssm_fast/Walker2dBody-v0", task=HalfCheetahBodyTask(**BODY)),
            TypeError,
            "must be Walker2dBodyTask, got HalfCheetahBodyTask",
        ),
        (
            lambda: get_family(DIRECTIONS[0]).draw_out_of_range(np.random.default_rng(0)),
            ValueError,
            "has no task out of range",
        ),
    ],
)
def test_wrong_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_numbers_of_numpy_become_pythons():
    task = CartPoleTask(length=np.float32(0.5), masscart=np.int64(2))
    assert type(task.length) is type(task.masscart) is float
    assert task == CartPoleTask(masscart=2)


def test_a_family_of_ones_own():
    class Family(TaskFamily[CartPoleTask]):
        task_type, default_task = CartPoleTask, CartPoleTask()

        def draw(self, generator):
            return CartPoleTask(length=generator.integers(1, 201))  # 200 tasks: draws repeat

        def draw_out_of_range(self, generator):
            return CartPoleTask(length=generator.integers(150, 300))

    module = SimpleNamespace(made=[])
    family = register_family(Family("Mine-v0"), lambda task=None: module.made.append(task), 50)
    try:
        assert get_family("Mine-v0") is family
        assert gymnasium.spec("Mine-v0").max_episode_steps == 50
        held_out = family.test_tasks + family.out_of_range_tasks
        assert len({*family.train_tasks, *held_out}) == 160
        assert not {*family.sample(1000, 0)} & {*held_out}
        family.draw = lambda generator: held_out[0]
        with pytest.raises(ValueError, match="Mine-v0 must have 2 more tasks, found 0"):
            family.sample(2, 0)
    finally:
        from ssm_fast.env_runner import task_families

        del gymnasium.registry["Mine-v0"], task_families._FAMILIES["Mine-v0"]


def test_ids_come_with_the_package_and_gymnasium_only_when_asked_for(tmp_path):
    code = """
import sys, ssm_fast
assert "gymnasium" not in sys.modules
import gymnasium
env = gymnasium.make("ssm_fast.env_runner:ssm_fast/CartPoleFamily-v0")
assert "mujoco" not in sys.modules
assert env.reset(seed=0)[0].shape == (4,)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


FROZEN = {
    "ssm_fast/CartPoleFamily-v0": [1296.64712, 464.620711, 330.537224],
    "ssm_fast/CartPoleUnsignedFamily-v0": [2191.050277, 940.774697, 528.102759],
    "ssm_fast/AcrobotFamily-v0": [537.737015, 216.017814, 109.848841],
    "ssm_fast/HalfCheetahDir-v0": [0.0, 0.0, 0.0],
    "ssm_fast/HalfCheetahVel-v0": [101.70954, 41.381218, 50.564336],
    "ssm_fast/HalfCheetahVel3-v0": [157.869645, 55.972272, 74.254121],
    "ssm_fast/AntDir-v0": [180.0, 180.0, 1080.0],
    "ssm_fast/HalfCheetahBody-v0": [2669.949765, 1118.186032, 888.656903],
    "ssm_fast/Walker2dBody-v0": [2597.313428, 1006.467662, 874.587218],
}
