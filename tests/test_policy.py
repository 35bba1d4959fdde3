from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ssm_fast.core import ImprovedSSM, StateSpaceModel
from ssm_fast.policy import Policy, load_policy

IN, ACTIONS = 5, 3
LOW, HIGH = [-0.125, -1.0, -0.25], [0.125, 1.0, 0.3125]  # in every dtype


def improved(**kwargs: Any) -> ImprovedSSM:
    torch.manual_seed(0)
    model = ImprovedSSM(IN, ACTIONS, state_dim=6, hidden_dim=8, **kwargs)
    with torch.no_grad():
        model.actor.weight.mul_(50.0)
    if model.obs_norm is not None:
        model.obs_norm.update(torch.randn(50, IN) * 3.0 + 1.0)
    return model


def standard() -> StateSpaceModel:
    torch.manual_seed(0)
    model = StateSpaceModel(7, IN, ACTIONS)
    with torch.no_grad():
        model.D.mul_(10.0)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "box": lambda: improved(normalize_observations=True),
    "discrete": lambda: improved(discrete=True),
    "standard": standard,
}
every_model = pytest.mark.parametrize("name", list(MODELS))


def observations(T: int, B: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(T, B, IN)).astype(np.float32)


def act(model: Any, x: torch.Tensor, h: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The deterministic action by hand, from the model's forward."""
    out = model(x, h)
    action = out[0] if isinstance(model, ImprovedSSM) and not model.discrete else out[0].argmax(-1)
    return action, out[-1]


def test_a_run_folder_and_what_a_policy_says_of_itself(tmp_path: Path) -> None:
    improved().save(tmp_path / "policy.safetensors")
    assert repr(load_policy(tmp_path)) == (
        "Policy(ImprovedSSM, 5 observations and 3 continuous actions)"
    )
    assert repr(Policy(standard())).startswith("Policy(StateSpaceModel, 5 observations and ")
    (tmp_path / "policy.safetensors").unlink()
    with pytest.raises(ValueError, match=r"policy\.safetensors': cannot be read"):
        load_policy(tmp_path)


@every_model
def test_predict_equals_stepping_the_model_by_hand(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save(tmp_path / "m.safetensors")
    policy = load_policy(tmp_path / "m.safetensors")
    x = observations(6, 4)
    state, h = None, None
    for t in range(6):
        action, state = policy.predict(x[t], state)
        with torch.no_grad():
            expected, h = act(model, torch.from_numpy(x[t]), h)
        np.testing.assert_allclose(action, expected, atol=1e-6)
        np.testing.assert_allclose(state, h, atol=1e-6)
        assert action.dtype == (np.float32 if name == "box" else np.int64)
    assert action.shape == ((4, ACTIONS) if name == "box" else (4,))
    assert state is not None
    assert state.shape == ((4, 7) if name == "standard" else (2, 4, 6))


@every_model
def test_a_single_observation_equals_a_batch_of_one(name: str) -> None:
    policy = Policy(MODELS[name]())
    x = observations(4, 1)
    single = batch = None
    for t in range(4):
        start = t == 2
        action, single = policy.predict(x[t, 0], single, episode_start=start)
        actions, batch = policy.predict(x[t], batch, episode_start=np.array([start]))
        np.testing.assert_array_equal(action, actions[0])
        np.testing.assert_array_equal(single, batch)
        assert np.shape(action) == ((ACTIONS,) if name == "box" else ())


@every_model
def test_episode_start_zeroes_the_state_of_its_rows_only(name: str) -> None:
    policy = Policy(MODELS[name]())
    x = observations(2, 4)
    _, state = policy.predict(x[0])
    kept = state.copy()
    starts = np.array([False, True, False, True])
    actions, after = policy.predict(x[1], state, episode_start=starts)
    fresh_actions, fresh = policy.predict(x[1])
    carried_actions, carried = policy.predict(x[1], state)
    np.testing.assert_array_equal(state, kept)  # never modified
    for row, start in enumerate(starts):
        expected = fresh if start else carried
        np.testing.assert_array_equal(after[..., row, :], expected[..., row, :])
        np.testing.assert_array_equal(
            actions[row], (fresh_actions if start else carried_actions)[row]
        )
    assert not np.array_equal(fresh, carried)
    for all_of_them in (np.ones(4), [True] * 4, np.ones(4, dtype=np.int64)):
        np.testing.assert_array_equal(policy.predict(x[1], state, all_of_them)[1], fresh)


def test_continuous_actions_are_clipped_to_the_bounds_of_the_header(tmp_path: Path) -> None:
    model = improved()
    bounds = {"action_low": json.dumps(LOW), "action_high": json.dumps(HIGH)}
    model.save(tmp_path / "m", bounds | {"env_id": "Mine-v0"})
    x = observations(1, 64)[0]
    clipped, _ = load_policy(tmp_path / "m").predict(x)
    free, _ = Policy(model).predict(x)
    np.testing.assert_array_equal(
        clipped, np.clip(free, np.array(LOW, np.float32), np.array(HIGH, np.float32))
    )
    assert not np.array_equal(clipped, free)
    assert clipped.dtype == np.float32
    model.save(tmp_path / "m", {"action_low": "[-Infinity, -1, -1]"})
    half, _ = load_policy(tmp_path / "m").predict(x)
    np.testing.assert_array_equal(half, np.maximum(free, np.array([-np.inf, -1, -1], np.float32)))


@every_model
def test_samples_follow_the_distribution_and_torchs_seed(name: str) -> None:
    model = MODELS[name]()
    policy = Policy(model)
    x = np.repeat(observations(1, 1)[0], 20_000, axis=0)
    torch.manual_seed(1)
    first, _ = policy.predict(x, deterministic=False)
    torch.manual_seed(1)
    np.testing.assert_array_equal(policy.predict(x, deterministic=False)[0], first)
    assert not np.array_equal(policy.predict(x, deterministic=False)[0], first)
    with torch.no_grad():
        out = model(torch.from_numpy(x[:1]))[0][0]
    if name == "box":
        np.testing.assert_allclose(first.mean(0), out, atol=0.02)
        np.testing.assert_allclose(first.std(0), np.exp(-0.5), atol=0.02)
    else:
        frequencies = np.bincount(first, minlength=ACTIONS) / 20_000
        np.testing.assert_allclose(frequencies, out.softmax(-1), atol=0.02)


def test_observations_of_any_numeric_type() -> None:
    policy = Policy(improved(normalize_observations=True))
    x = np.arange(10).reshape(2, 5)
    expected, _ = policy.predict(x.astype(np.float32))
    frozen = x.astype(np.float64)
    frozen.setflags(write=False)
    for given in (x, frozen, x.astype(np.float16), x.tolist(), np.asfortranarray(x), x[::1, ::1]):
        np.testing.assert_array_equal(policy.predict(given)[0], expected)


def test_a_float64_model_plays_in_float64() -> None:
    policy = Policy(improved().double())
    action, state = policy.predict(np.zeros(IN))
    assert action.dtype == state.dtype == np.float64
    policy.predict(np.zeros(IN), state)


def test_a_clipped_action_keeps_the_dtype_of_the_model() -> None:
    bounds = np.full(ACTIONS, -0.5, np.float32), np.full(ACTIONS, 0.5, np.float32)
    for dtype, expected in ((torch.float64, np.float64), (torch.float16, np.float16)):
        action, _ = Policy(improved().to(dtype), *bounds).predict(np.zeros(IN))
        assert action.dtype == expected


def test_bad_calls() -> None:
    policy = Policy(improved())
    x = observations(1, 4)[0]
    _, state = policy.predict(x)
    for bad in (np.nan, np.inf, -np.inf, 1e300):
        broken = x.astype(np.float64)
        broken[2, 1] = bad
        with pytest.raises(ValueError, match="obs must be finite, got NaN or Inf"):
            policy.predict(broken)
    with pytest.raises(ValueError, match="state must be finite"):
        policy.predict(x, np.full_like(state, np.nan))
    for shape in ((4, 6), (5, 4), (1, 4, 5), (), (0,)):
        with pytest.raises(
            ValueError,
            match=r"obs must have shape \[I\] or \[B, I\] with I = 5, got .*obs.reshape\(-1\)",
        ):
            policy.predict(np.zeros(shape))
    with pytest.raises(ValueError, match=r"hidden_state must have shape \[L, B, N\] = \[2, 4, 6\]"):
        policy.predict(x, state[:, :3])
    with pytest.raises(ValueError, match=r"episode_start must have shape \[B\] = \[4\], got \[3\]"):
        policy.predict(x, state, np.zeros(3))
    for given in (np.array(["a"] * 5), {"position": 1.0}, np.array([None] * 5)):
        with pytest.raises(TypeError, match="obs must be numeric, got dtype"):
            policy.predict(given)


@every_model
def test_bfloat16_which_numpy_does_not_have(name: str, tmp_path: Path) -> None:
    MODELS[name]().to(torch.bfloat16).save(tmp_path / "m.safetensors")
    policy = load_policy(tmp_path / "m.safetensors")
    action, state = policy.predict(observations(1, 4)[0])
    action, state = policy.predict(observations(1, 4)[0], state)
    assert action.dtype == (np.float32 if name == "box" else np.int64)
    assert state.dtype == np.float32


def test_a_bound_beyond_any_float_in_the_header(tmp_path: Path) -> None:
    improved().save(tmp_path / "policy.safetensors", {"action_low": f"[1{'0' * 399}]"})
    with pytest.raises(ValueError, match="action bounds in the header"):
        load_policy(tmp_path / "policy.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.1, 0.7, 1e-9, 3e7])
def test_actions_lie_within_bounds_of_another_dtype(dtype: torch.dtype, bound: float) -> None:
    model = improved().to(dtype)
    space = gymnasium.spaces.Box(-bound, bound, (ACTIONS,), np.float64)
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            model.actor.weight.zero_()
            model.actor.bias.fill_(sign * 6e4)
        policy = Policy(model, space.low, space.high)
        action, _ = policy.predict(np.zeros(IN))
        wide = action.astype(np.float64)
        assert action.dtype == (
            np.float32 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
        )
        assert space.contains(wide)
        reached = min(bound, float(model.actor.bias.detach()[0].abs()))
        np.testing.assert_allclose(np.abs(wide), reached, rtol=1e-3, atol=1e-7)
        assert (policy.action_low == space.low).all()


def test_bounds_without_a_number_between() -> None:
    with pytest.raises(ValueError, match="must have a float32 between them"):
        Policy(improved(), action_low=[0.1] * ACTIONS, action_high=[0.1] * ACTIONS)
    Policy(improved().double(), action_low=[0.1] * ACTIONS, action_high=[0.1] * ACTIONS)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_that_is_wrapped() -> None:
    model = improved()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (averaged, torch.compile(model), torch.nn.DataParallel(model)):
        with pytest.raises(TypeError, match=r"an ImprovedSSM or a StateSpaceModel, got .* inside"):
            Policy(wrapped)
    action, _ = Policy(averaged.module).predict(np.zeros(IN))
    assert action.shape == (ACTIONS,)
    with pytest.raises(TypeError, match=r"got Linear$"):
        Policy(torch.nn.Linear(2, 2))


def test_bad_bounds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="action_low must hold 3 numbers"):
        Policy(improved(), action_low=[0.0])
    with pytest.raises(ValueError, match="action_high must hold 3 numbers"):
        Policy(improved(), action_high=[1.0, np.nan, 1.0])
    with pytest.raises(ValueError, match="action_low must not exceed action_high"):
        Policy(improved(), action_low=HIGH, action_high=LOW)
    for model in (improved(discrete=True), standard()):
        with pytest.raises(ValueError, match="action_low must be None for discrete actions"):
            Policy(model, action_low=LOW)
    path = tmp_path / "m"
    for text in ("[", '{"a": 1}', '["a", "b", "c"]', "[[1], [2, 3]]", "null-", "[" * 100_000):
        improved().save(path, {"action_low": text})
        with pytest.raises(ValueError, match="action bounds in the header") as caught:
            load_policy(path)
        assert str(path) in str(caught.value)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="safetensors file"):
        load_policy(path)
