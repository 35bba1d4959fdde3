from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssm_fast.app import adapting
from ssm_fast.app.adapting import (
    adapt,
    default_of,
    first_method,
    first_task,
    options_of,
    task_choices,
)
from ssm_fast.app.loading import PRETRAINED, load_pretrained, load_upload
from ssm_fast.app.visitors import StoredPolicy, Visitor
from ssm_fast.checkpoint import read_metadata, save_model
from ssm_fast.core import StateSpaceModel

pytestmark = pytest.mark.isa_independent

Save = Callable[..., Path]


@pytest.mark.parametrize("method", ["test_time", "standard", "hybrid"])
def test_before_and_after(method: str, visitor: Visitor, save_policy: Save) -> None:
    policy = visitor.add_policy(save_policy(env_id="CartPole-v1"), "mine", "CartPole-v1")
    form = {"episodes": 2, "rows": 2, "adapt_every": 10, "steps": 2, "lr": 0.01}
    views = list(adapt(visitor, policy.name, method, "test 3", form))
    assert [view.status.kind for view in views[:-1]] == ["busy"] * (len(views) - 1)
    last = views[-1]
    assert last.status.kind == "done", last.status
    assert [row[0] for row in last.table] == [
        *("episode 1", "episode 2"),
        *("mean", "deterministic, before and after"),
    ]
    for _, without, adapting_, difference in last.table:
        assert difference == pytest.approx(adapting_ - without, abs=0.11)
    assert {(x, name) for x, _, name in last.curve} == {
        (i, name) for i in (1, 2) for name in ("not adapting", "adapting")
    }
    adapted = visitor.policy(last.adapted)
    assert adapted.name == f"mine, {method} in test task 3"
    assert adapted.env_id == "ssm_fast/CartPoleFamily-v0"
    assert "task" in read_metadata(adapted.path)
    assert adapted.path.read_bytes() != policy.path.read_bytes()


def test_a_critic_that_was_not_trained_is_noted(visitor: Visitor, save_policy: Save) -> None:
    path = save_policy(env_id="CartPole-v1", critic="untrained")
    visitor.add_policy(path, "mine", "CartPole-v1")
    *_, view = adapt(visitor, "mine", "standard", "test 0", {"episodes": 1, "rows": 1, "steps": 1})
    assert view.status.kind == "done"
    (note,) = view.status.notes
    assert note.startswith("The critic of the policy was not trained")


def test_a_meta_policy_takes_the_steps_that_it_has_learnt(visitor: Visitor) -> None:
    *_, loaded = load_pretrained(visitor, "cartpole-family")
    policy = visitor.policy(loaded.policy)
    contents = policy.path.read_bytes()
    assert first_method(policy, "hybrid") == "gradient"
    for _ in range(2):  # the policy stays what it was
        *_, view = adapt(visitor, policy.name, "gradient", "test 3", {"episodes": 3})
        assert view.status.kind == "done", view.status
        assert view.status.notes == ()
        by_round = {row[0]: row[1:3] for row in view.table}
        without, adapting_ = by_round["after 2 gradient steps"]
        assert adapting_ > 400 > 4 * without
    assert policy.path.read_bytes() == contents
    adapted = visitor.policy(view.adapted)
    assert adapted.name == "cartpole-family, gradient in test task 3 #2"
    assert (adapted.has_steps, adapted.is_adapted) == (True, True)


def test_a_meta_policy_that_was_downloaded_takes_its_steps(visitor: Visitor) -> None:
    path = PRETRAINED / "cartpole-family" / "policy.safetensors"  # as the button gives it
    *_, loaded = load_upload(visitor, str(path), None)
    *_, view = adapt(visitor, loaded.policy, "gradient", "test 3", {"episodes": 2})
    assert view.status.kind == "done", view.status
    assert [row[0] for row in view.table[:2]] == [f"after {k} gradient steps" for k in range(2)]


def test_stop(visitor: Visitor, save_policy: Save) -> None:
    visitor.add_policy(save_policy(env_id="CartPole-v1"), "mine", "CartPole-v1")
    form = {"episodes": 20, "rows": 64, "adapt_every": 1, "steps": 200}
    for view in adapt(visitor, "mine", "test_time", "", form):
        if view.status.text.startswith("Playing"):
            visitor.stop(adapting.KIND)
    assert view.status.text == "Stopped; nothing has changed."
    assert list(visitor.policies) == ["mine"]


@pytest.mark.parametrize(
    ("name", "method", "task", "form", "text"),
    [
        (None, "test_time", "", {}, "There is no policy yet"),
        ("mine", "maml", "", {}, "The method must be one of test_time, standard, hybrid, gradient"),
        ("mine", "gradient", "", {}, "Gradient takes steps that meta_rl trains, and mine has"),
        ("small", "standard", "", {}, "has no critic"),
        ("mine", "standard", "secret 1", {}, "There is no task 'secret 1'."),
        ("mine", "standard", "test -1", {}, "There is no task 'test -1'."),
        ("mine", "standard", "test 99", {}, "Task must lie in [0, 40) of the test tasks, got 99."),
        ("mine", "standard", "", {"rows": 65}, "Copies of the task must be at most 64, got 65."),
        ("mine", "standard", "", {"rows": None}, "The field 'Copies of the task' is empty: type"),
        (
            "mine",
            "standard",
            "",
            {"lr": -1.0},
            "Learning rate must be finite and positive, got -1.",
        ),
        ("mine", "hybrid", "", {"experience_weight": 2}, "Weight of the replay must be finite and"),
        (
            "wrong",
            "standard",
            "",
            {},
            "has 17 observations and 6 continuous actions, the model is for 4",
        ),
    ],
)
def test_a_mistake_is_a_sentence(
    name: str | None,
    method: str,
    task: str,
    form: dict[str, Any],
    text: str,
    visitor: Visitor,
    save_policy: Save,
    tmp_path: Path,
) -> None:
    visitor.add_policy(save_policy(env_id="CartPole-v1"), "mine", "CartPole-v1")
    visitor.add_policy(save_policy(env_id="CartPole-v1"), "wrong", "HalfCheetah-v5")
    save_model(tmp_path / "small.safetensors", StateSpaceModel(4, 4, 2))
    visitor.add_policy(tmp_path / "small.safetensors", "small", "CartPole-v1")
    *_, view = adapt(visitor, name, method, task, form)
    assert view.status.kind == "error"
    assert text in view.status.text
    assert not visitor.is_busy


def test_options_of_gradient(visitor: Visitor, tmp_path: Path) -> None:
    load = next(iter(load_pretrained(visitor, "cartpole-family")))
    policy = visitor.policy(load.policy)
    form = {"lr": None, "steps": 5, "episodes": 3}
    options = options_of(policy, "gradient", "out_of_range 2", form, tmp_path / "out.safetensors")
    assert (options.path, options.split, options.task) == (policy.path, "out_of_range", 2)
    assert (options.lr, options.steps, options.episodes, options.rows) == (None, None, 3, 20)
    assert default_of("gradient", "lr") is None
    assert default_of("standard", "lr") == 1e-4


@pytest.mark.parametrize("method", adapting.METHODS)
@pytest.mark.parametrize("name", adapting.OPTIONS)
def test_a_field_that_was_emptied(
    method: str, name: str, visitor: Visitor, save_policy: Save, tmp_path: Path
) -> None:
    policy = StoredPolicy("mine", save_policy(), "ImprovedSSM", 1, "CartPole-v1", has_steps=True)
    if default_of(method, name) is None:  # the method has no such field
        options_of(policy, method, "", {name: None}, tmp_path / "out.safetensors")
        return
    with pytest.raises(ValueError, match=f"'{adapting.OPTIONS[name].label}' is empty"):
        options_of(policy, method, "", {name: None}, tmp_path / "out.safetensors")


def test_what_is_offered_first(visitor: Visitor, save_policy: Save) -> None:
    path = save_policy()
    plain = visitor.add_policy(path, "plain", "CartPole-v1")
    adapted = visitor.add_policy(path, "adapted", "CartPole-v1", task="test 3")
    alone = visitor.add_policy(path, "alone", "Pendulum-v1")
    assert default_of("standard", "adapt_every", "CartPole-v1", "test 0") == 100  # of 500 steps
    assert default_of("standard", "adapt_every", "HalfCheetah-v5") == 200  # of 1000
    assert default_of("standard", "adapt_every", "HalfCheetah-v5", "test 0") == 40  # of 200
    assert default_of("gradient", "adapt_every", "CartPole-v1") is None
    # A held-out task; the one that it has been adapted to; what the environment plays anyway.
    assert [first_task(policy) for policy in (plain, adapted, alone)] == ["test 0", "test 3", ""]
    assert [first_method(plain, method) for method in ("gradient", "hybrid")] == [
        *("test_time", "hybrid")
    ]


def test_task_choices() -> None:
    assert task_choices("Pendulum-v1") == [("as it was trained", "")]
    choices = task_choices("CartPole-v1")
    assert len(choices) == 1 + 40 + 20
    assert choices[1][0].startswith("test task 0: length 0.233, ")
    assert choices[41][1] == "out_of_range 0"
    assert task_choices("HalfCheetah-v5")[1] == ("test task 0", "test 0")  # too many numbers
