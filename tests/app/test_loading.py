from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ssm_fast.app import loading
from ssm_fast.app.loading import LoadView, load_pretrained, load_upload, pretrained_names
from ssm_fast.app.visitors import Visitor
from ssm_fast.checkpoint import read_metadata
from ssm_fast.env_runner import get_family

pytestmark = pytest.mark.isa_independent

Save = Callable[..., Path]


def upload(visitor: Visitor, path: Path | None, env_id: str | None = None) -> LoadView:
    *_, view = load_upload(visitor, None if path is None else str(path), env_id)
    return view


def test_a_checkpoint(visitor: Visitor, save_policy: Save) -> None:
    view = upload(visitor, save_policy("mine.safetensors", env_id="CartPole-v1"), "ignored")
    assert view.status.kind == "done"
    assert view.status.text.startswith("Loaded mine: ImprovedSSM, ")
    assert visitor.policy(view.policy).env_id == "CartPole-v1"


def test_one_that_does_not_name_its_environment(visitor: Visitor, save_policy: Save) -> None:
    path = save_policy()
    view = upload(visitor, path)
    assert view.status.kind == "error"
    assert "does not say which environment it is for" in view.status.text
    assert visitor.policy(upload(visitor, path, "CartPole-v1").policy).env_id == "CartPole-v1"


@pytest.mark.parametrize(
    ("metadata", "typed", "text"),
    [
        ({"env_id": "antigravity:CartPole-v1"}, None, "which imports a module"),
        ({"env_id": "![x](//somewhere)"}, None, "cannot be the id of an environment"),
        ({"env_id": "CartPole-v1", "trial_episodes": "2"}, None, "plays trials of 2 episodes"),
        ({}, "antigravity:CartPole-v1", "would import a module"),
    ],
)
def test_a_checkpoint_that_is_refused(
    metadata: dict[str, str], typed: str | None, text: str, visitor: Visitor, save_policy: Save
) -> None:
    view = upload(visitor, save_policy(**metadata), typed)
    assert view.status.kind == "error"
    assert text in view.status.text
    assert not visitor.policies


@pytest.mark.parametrize(
    ("name", "contents", "text"),
    [
        ("policy.pt", b"PK\x03\x04", "policy.pt is no .safetensors file"),
        ("policy.safetensors", b"not at all", "truncated, or not a safetensors file"),
        ("policy.safetensors", b"", "truncated, or not a safetensors file"),
        ("policy.safetensors", (2).to_bytes(8, "little") + b"{}", "not an ssm_fast checkpoint"),
    ],
)
def test_a_file_that_is_none(
    name: str, contents: bytes, text: str, visitor: Visitor, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    view = upload(visitor, path)
    assert view.status.kind == "error"
    assert text in view.status.text
    assert str(tmp_path) not in view.status.text
    assert not visitor.policies


def test_a_damaged_checkpoint(visitor: Visitor, save_policy: Save) -> None:
    path = save_policy(env_id="CartPole-v1")
    path.write_bytes(path.read_bytes()[:-8])
    assert upload(visitor, path).status.kind == "error"


def test_no_file(visitor: Visitor) -> None:
    assert upload(visitor, None).status.text == "Choose a file first."


def test_a_file_that_is_too_large(
    visitor: Visitor, save_policy: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LARGEST_UPLOAD", 100)
    view = upload(visitor, save_policy(env_id="CartPole-v1"))
    assert "The file policy.safetensors is larger than" in view.status.text


def test_one_that_was_adapted_to_a_task(visitor: Visitor, save_policy: Save) -> None:
    family = get_family("ssm_fast/CartPoleFamily-v0")
    for task, choice, words in (
        (family.test_tasks[3], "test 3", "for ssm_fast/CartPoleFamily-v0, test task 3."),
        (family.out_of_range_tasks[0], "out_of_range 0", "out of range task 0."),
        (family.train_tasks[0], "", "It was adapted to a task that cannot be chosen here."),
    ):
        path = save_policy(env_id=family.env_name, task=json.dumps(task.as_dict()))
        view = upload(visitor, path)
        assert words in view.status.text
        assert visitor.policy(view.policy).task == choice


def test_pretrained(visitor: Visitor, save_policy: Save, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    (folder / "CartPole").mkdir(parents=True)
    saved = save_policy("CartPole.safetensors", env_id="CartPole-v1")
    saved.rename(folder / "CartPole" / "policy.safetensors")
    assert pretrained_names(folder) == ["CartPole"]
    *_, view = load_pretrained(visitor, "CartPole", folder)
    assert visitor.policy(view.policy).env_id == "CartPole-v1"
    for name in ("../CartPole", "Nope", None):
        *_, view = load_pretrained(visitor, name, folder)
        assert view.status.text == "Choose one of the pretrained policies."


def test_what_is_shipped_loads(visitor: Visitor) -> None:
    for name in pretrained_names():
        *_, view = load_pretrained(visitor, name)
        assert view.status.kind == "done", view.status.text
        assert read_metadata(visitor.policy(view.policy).path)["env_id"]
