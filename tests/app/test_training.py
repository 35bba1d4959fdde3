from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import ssm_fast
from ssm_fast.app import adapting, training, watching
from ssm_fast.app.adapting import adapt
from ssm_fast.app.training import (
    amount_of,
    default_of,
    learn,
    options_of,
    preset_of,
    settings_in_words,
    train,
)
from ssm_fast.app.visitors import Visitor
from ssm_fast.cli.options import Train
from ssm_fast.cli.settings import settings_of

pytestmark = pytest.mark.isa_independent

Save = Callable[..., Path]

SMALL = {"state_dim": 4, "hidden_dim": 8}


class Endless(gymnasium.Env[Any, Any]):
    """Always the same, with a reward of 1."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 1.0, False, False, {}


@pytest.mark.parametrize(
    ("mode", "env_id", "form", "text"),
    [
        ("dqn", "CartPole-v1", {}, "the mode must be one of improved, policy_gradient, meta_rl"),
        ("improved", "", {}, "choose an environment"),
        ("improved", None, {}, "choose an environment"),
        ("improved", "antigravity:CartPole-v1", {}, "would import a module"),
        ("improved", "![x](//somewhere)", {}, "cannot be the id of an environment"),
        ("improved", "CartPole-v1", {"state_dim": 257}, "State size must be at most 256, got 257"),
        ("improved", "CartPole-v1", {"num_layers": 0}, "Layers must be at least 1, got 0"),
        ("improved", "CartPole-v1", {"steps": 10**9}, "Environment steps must be at most"),
        ("improved", "CartPole-v1", {"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ("improved", "CartPole-v1", {"steps": math.inf}, "steps must be a whole number, got inf"),
        ("improved", "CartPole-v1", {"gamma": 1.5}, "Discount factor must be finite and in [0, 1]"),
        ("improved", "CartPole-v1", {"lr": math.nan}, "Learning rate must be finite and positive"),
    ],
)
def test_options_that_are_refused(
    mode: str, env_id: str | None, form: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        options_of(mode, env_id, form)


def test_options_of_a_mode() -> None:
    form = {"lr": 1e-3, "inner_lr": 0.1, "num_layers": 2}
    improved = options_of("improved", " CartPole-v1 ", form)
    assert (improved.env, improved.lr, improved.inner_lr, improved.gamma) == (
        *("CartPole-v1", 1e-3),
        *(None, None),
    )
    assert options_of("policy_gradient", "CartPole-v1", form).num_layers is None
    meta_rl = options_of("meta_rl", "CartPole-v1", form)
    assert (meta_rl.env, meta_rl.inner_lr) == ("ssm_fast/CartPoleFamily-v0", 0.1)


@pytest.mark.parametrize("mode", training.MODES)
@pytest.mark.parametrize("name", [*training.AMOUNTS, *training.OPTIONS])
def test_a_field_that_was_emptied(mode: str, name: str) -> None:
    fields = training.AMOUNTS | training.OPTIONS
    is_shown = name == training.UNIT_OF[mode]
    if name in training.OPTIONS:
        is_shown = default_of(mode, "CartPole-v1", name) is not None
    if not is_shown:
        options_of(mode, "CartPole-v1", {name: None})
        return
    with pytest.raises(ValueError, match=f"^the field '{fields[name].label}' is empty"):
        options_of(mode, "CartPole-v1", {name: None})


@pytest.mark.parametrize(
    ("mode", "env_id", "name", "value"),
    [
        ("improved", "CartPole-v1", "lr", 2e-4),
        ("policy_gradient", "CartPole-v1", "lr", 5e-3),
        ("meta_rl", "CartPole-v1", "lr", 1e-3),
        ("meta_rl", "CartPole-v1", "batch_size", 20),
        ("improved", "CartPole-v1", "state_dim", 64),
        ("policy_gradient", "CartPole-v1", "num_layers", None),
        ("improved", "CartPole-v1", "inner_steps", None),
        ("improved", "HalfCheetah-v5", "lr", 3e-4),  # from here on of a preset
        ("improved", "HalfCheetah-v5", "gamma", 0.98),
        ("improved", "Hopper-v5", "hidden_dim", 64),
        ("improved", None, "gamma", 0.99),
    ],
)
def test_defaults(mode: str, env_id: str | None, name: str, value: float | None) -> None:
    assert default_of(mode, env_id, name) == value


@pytest.mark.parametrize(
    ("mode", "env_id", "preset", "amount", "words"),
    [
        (
            "improved",
            "HalfCheetah-v5",
            "halfcheetah-v5",
            300_000,
            "with 1,000,000 steps: with fewer",
        ),
        (
            "improved",
            "Ant-v5",
            "ant-v5",
            300_000,
            "with 1,000,000 steps: with fewer it learns less",
        ),
        ("improved", "CartPole-v1", None, 50_000, "no preset for this environment"),
        ("policy_gradient", "HalfCheetah-v5", None, 800, "no preset for this environment"),
        ("meta_rl", "CartPole-v1", "cartpole-family", 20, "measured with 20 epochs"),
        ("meta_rl", "ssm_fast/HalfCheetahDir-v0", "halfcheetah-dir", 20, "60 epochs: with fewer"),
        ("meta_rl", "ssm_fast/AntDir-v0", None, 10, "no preset for this environment"),
        ("improved", None, None, 50_000, "no preset for this environment"),
    ],
)
def test_a_preset_is_taken(
    mode: str, env_id: str | None, preset: str | None, amount: int, words: str, tmp_path: Path
) -> None:
    assert preset_of(mode, env_id) == preset
    assert amount_of(mode, env_id) == amount
    assert words in settings_in_words(mode, env_id)
    if preset is not None:
        unit = training.UNIT_OF[mode]
        shown = {name: default_of(mode, env_id, name) for name in training.OPTIONS}
        given = settings_of(options_of(mode, env_id, shown), tmp_path)
        assert given == settings_of(Train(preset=preset, **{unit: amount}), tmp_path)


def test_a_whole_training(visitor: Visitor) -> None:
    views = list(train(visitor, "policy_gradient", "CartPole-v1", {"episodes": 48, **SMALL}))
    assert [view.status.kind for view in views[:-1]] == ["busy"] * (len(views) - 1)
    last = views[-1]
    assert last.status.kind == "done"
    assert "evaluation of 10 episodes of CartPole-v1: return" in last.status.text
    assert len(last.curve) == 3  # 16 episodes each
    assert [name for *_, name in last.curve] == ["return"] * 3
    steps = [step for step, *_ in last.curve]
    assert steps == sorted(steps)
    policy = visitor.policy(last.policy)
    assert (policy.env_id, policy.model) == ("CartPole-v1", "StateSpaceModel")
    action, _ = ssm_fast.load_policy(policy.path).predict(np.zeros(4))
    assert action in (0, 1)
    assert not visitor.is_busy


def test_stop_keeps_what_was_learnt(visitor: Visitor) -> None:
    form = {"steps": 10_000_000, "batch_size": 4, **SMALL}
    began = None
    for view in train(visitor, "improved", "CartPole-v1", form):
        if view.curve and began is None:
            began = time.monotonic()
            visitor.stop(training.KIND)
    assert began is not None
    assert time.monotonic() - began < 5.0  # half a second where nothing else is at work
    assert view.status.text.startswith("Stopped.")
    assert "of 10,000,000 steps, return" in view.status.text
    assert visitor.policy(view.policy).path.is_file()
    assert not visitor.is_busy


def test_a_breakdown_keeps_what_was_learnt(visitor: Visitor) -> None:
    views = train(visitor, "improved", "CartPole-v1", {"steps": 10_000_000, **SMALL})
    for view in views:
        if view.curve and visitor.is_busy:
            visitor._jobs[training.KIND]._process.kill()  # as the kernel does without memory
    assert view.status.kind == "error"
    assert view.status.text.startswith("The work ended unexpectedly (exit code -9).")
    assert visitor.policy(view.policy).path.is_file()


def test_stop_before_it_begins(visitor: Visitor) -> None:
    visitor.stop(training.KIND)
    *_, view = train(visitor, "improved", "CartPole-v1", {})
    assert (view.status.kind, view.status.text) == ("done", "Stopped before it began.")


@pytest.mark.parametrize(
    ("mode", "env_id", "form", "text"),
    [
        ("improved", "Nope-v0", {}, "Env_name 'Nope-v0' cannot be made: "),
        ("policy_gradient", "Pendulum-v1", {}, "Mode policy_gradient needs discrete actions; "),
        ("meta_rl", "Pendulum-v1", {}, "'Pendulum-v1' "),
        ("improved", "CartPole-v1", {"lr": -1.0}, "Learning rate must be finite and positive"),
        (
            "improved",
            "CartPole-v1",
            {"steps": None},
            "The field 'Environment steps' is empty: type",
        ),
        ("improved", "os:CartPole-v1", {}, "The id 'os:CartPole-v1' would import a module"),
    ],
)
def test_a_mistake_is_a_sentence(
    mode: str, env_id: str, form: dict[str, Any], text: str, visitor: Visitor
) -> None:
    *_, view = train(visitor, mode, env_id, form)
    assert view.status.kind == "error"
    assert text in view.status.text
    assert view.status.text.endswith((".", "?"))
    assert "Traceback" not in view.status.text
    assert not visitor.is_busy


def test_meta_rl_and_its_gradient_steps(visitor: Visitor) -> None:
    form = {"epochs": 1, "batch_size": 2, "tasks_per_epoch": 2, "inner_steps": 1, **SMALL}
    *_, view = train(visitor, "meta_rl", "CartPole-v1", form)
    assert view.status.kind == "done", view.status
    assert "held-out tasks after 0, 1, 2, 3 gradient steps" in view.status.text
    assert [name for *_, name in view.curve] == ["before gradient steps", "after them"]
    *_, adapted = adapt(visitor, view.policy, "gradient", "test 1", {"rows": 2, "episodes": 3})
    assert adapted.status.kind == "done", adapted.status
    assert [row[0] for row in adapted.table[:3]] == [f"after {k} gradient steps" for k in range(3)]
    assert {x for x, *_ in adapted.curve} == {0, 1, 2}
    assert visitor.policy(adapted.adapted).task == "test 1"


def test_an_evaluation_ends_without_a_time_limit(tmp_path: Path) -> None:
    gymnasium.register("test/EndlessCartPole-v0", Endless)
    sent: list[Any] = []
    options = Train(mode="improved", env="test/EndlessCartPole-v0", steps=64, batch_size=2, **SMALL)
    with pytest.warns(UserWarning, match="no time limit: the evaluation ends episodes after"):
        learn(sent.append, options, tmp_path / "run")
    assert "return 10000.0 +- 0.0" in sent[-1]


def test_an_environment_that_cannot_be_made_is_a_sentence(
    visitor: Visitor, save_policy: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "Box2D", None)  # as without the extra
    gymnasium.register("test/MistypedCartPole-v0", "gymnasium.envs.classic_control:CartPol")
    sent: list[Any] = []
    for env_id, reason in (
        ("LunarLander-v3", "Box2D is not installed"),
        ("test/MistypedCartPole-v0", "has no attribute 'CartPol'"),
    ):
        policy = visitor.add_policy(save_policy(), env_id, env_id)
        for work in (
            lambda env_id=env_id: learn(sent.append, options_of("improved", env_id, {}), tmp_path),
            lambda policy=policy: adapting.work(
                sent.append, adapting.options_of(policy, "standard", "", {}, tmp_path / "out")
            ),
            lambda policy=policy: watching.play(
                sent.append, policy, "", 5, 0, True, tmp_path / "film.mp4"
            ),
        ):
            with pytest.raises(ValueError, match=f"^.*'?{env_id}'? cannot be .*{reason}"):
                work()
