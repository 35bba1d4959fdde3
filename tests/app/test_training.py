from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import ssm_fast
from ssm_fast.app import training
from ssm_fast.app.adapting import adapt
from ssm_fast.app.training import default_of, options_of, train
from ssm_fast.app.visitors import Visitor

pytestmark = pytest.mark.isa_independent

SMALL = {"state_dim": 4, "hidden_dim": 8}


@pytest.mark.parametrize(
    ("mode", "env_id", "form", "text"),
    [
        ("dqn", "CartPole-v1", {}, "the mode must be one of improved, policy_gradient, meta_rl"),
        ("improved", "", {}, "choose an environment"),
        ("improved", None, {}, "choose an environment"),
        ("improved", "antigravity:CartPole-v1", {}, "would import a module"),
        ("improved", "![x](//somewhere)", {}, "cannot be the id of an environment"),
        ("improved", "CartPole-v1", {"state_dim": 257}, "state_dim must be at most 256, got 257"),
        ("improved", "CartPole-v1", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("improved", "CartPole-v1", {"steps": 10**9}, "steps must be at most"),
    ],
)
def test_options_that_are_refused(
    mode: str, env_id: str | None, form: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        options_of(mode, env_id, form)


def test_options_of_a_mode() -> None:
    form = {"lr": 1e-3, "inner_lr": 0.1, "num_layers": 2, "gamma": None}
    improved = options_of("improved", " CartPole-v1 ", form)
    assert (improved.env, improved.lr, improved.inner_lr, improved.gamma) == (
        *("CartPole-v1", 1e-3),
        *(None, None),
    )
    assert options_of("policy_gradient", "CartPole-v1", form).num_layers is None
    meta_rl = options_of("meta_rl", "CartPole-v1", form)
    assert (meta_rl.env, meta_rl.inner_lr) == ("ssm_fast/CartPoleFamily-v0", 0.1)


@pytest.mark.parametrize(
    ("mode", "name", "value"),
    [
        ("improved", "lr", 2e-4),
        ("policy_gradient", "lr", 5e-3),
        ("meta_rl", "lr", 1e-3),
        ("meta_rl", "batch_size", 20),
        ("improved", "state_dim", 64),
        ("policy_gradient", "num_layers", None),
        ("improved", "inner_steps", None),
    ],
)
def test_defaults(mode: str, name: str, value: float | None) -> None:
    assert default_of(mode, name) == value


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
        ("improved", "CartPole-v1", {"lr": -1.0}, "Learning_rate must be finite and positive"),
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
    assert visitor.policy(adapted.policy).task == "test 1"
