from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import app_work
import pytest

from ssm_fast.app import visitors as visitors_module
from ssm_fast.app.visitors import Visitor, Visitors

pytestmark = pytest.mark.isa_independent

Save = Callable[..., Path]


def test_policies_are_copies_with_names_of_their_own(visitor: Visitor, save_policy: Save) -> None:
    path = save_policy()
    first = visitor.add_policy(path, "improved CartPole-v1", "CartPole-v1")
    second = visitor.add_policy(path, "improved CartPole-v1", "CartPole-v1")
    third = visitor.add_policy(path, f"../../{'x' * 300}", "CartPole-v1")
    path.unlink()
    assert [first.name, second.name] == ["improved CartPole-v1", "improved CartPole-v1 #2"]
    assert first.path.name == "improved-CartPole-v1.safetensors"
    assert first.model == "ImprovedSSM"
    for policy in (first, second, third):
        assert visitor.policy(policy.name) is policy
        assert policy.path.is_file()
        assert visitor.folder in policy.path.parents
    assert first.path != second.path


def test_a_policy_that_is_not_there(visitor: Visitor) -> None:
    with pytest.raises(ValueError, match="there is no policy yet"):
        visitor.policy(None)
    with pytest.raises(ValueError, match="'mine' is not here any more"):
        visitor.policy("mine")


def test_what_would_be_lost(visitor: Visitor, save_policy: Save) -> None:
    visitor.add_policy(save_policy(), "loaded", "CartPole-v1")
    assert not visitor.would_lose
    visitor.add_policy(save_policy(), "trained", "CartPole-v1", is_new=True)
    visitor.downloaded("loaded")
    assert visitor.would_lose
    visitor.downloaded("trained")
    assert not visitor.would_lose
    visitor.start("training", app_work.wait)
    assert visitor.would_lose
    visitor.end("training")
    assert not visitor.would_lose


def test_one_work_of_a_kind(visitor: Visitor) -> None:
    job = visitor.start("training", app_work.wait)
    assert job is not None
    with pytest.raises(ValueError, match="training is under way already"):
        visitor.start("training", app_work.wait)
    visitor.end("training")
    assert visitor.start("training", app_work.wait) is not None


def test_stop_before_it_begins(visitor: Visitor) -> None:
    visitor.announce("training")
    visitor.stop("training")
    assert visitor.start("training", app_work.wait) is None
    assert visitor.start("training", app_work.wait) is not None  # the next is another one


def test_visitors_are_apart(tmp_path: Path, save_policy: Save) -> None:
    visitors = Visitors(tmp_path / "visitors")
    one, other = visitors.of("one"), visitors.of("other")
    assert visitors.of("one") is one
    one.add_policy(save_policy(), "mine", "CartPole-v1")
    assert not other.policies
    job = one.start("training", app_work.wait)
    assert job is not None
    visitors.leave("one")
    assert list(job.batches())[-1] == []  # stopped
    assert not one.folder.exists()
    assert other.folder.exists()
    with pytest.raises(ValueError, match="the visit is over"):
        one.start("training", app_work.wait)
    assert visitors.of("one") is not one
    visitors.close()
    assert not any((tmp_path / "visitors").iterdir())


def test_who_is_away_for_long_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors_module, "_LONGEST_ABSENCE", -1.0)
    visitors = Visitors(tmp_path / "visitors")
    absent, busy = visitors.of("absent"), visitors.of("busy")
    busy.start("training", app_work.wait)
    assert not absent.folder.exists()  # since the second one came
    visitors.of("new")
    assert visitors.of("busy") is busy
    visitors.close()
