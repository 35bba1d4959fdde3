from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
from off_screen import draws_off_screen

from ssm_fast.app import watching
from ssm_fast.app.loading import load_pretrained
from ssm_fast.app.visitors import Visitor
from ssm_fast.app.watching import watch
from ssm_fast.checkpoint import load_checkpoint, load_inner_rates, save_model

pytestmark = pytest.mark.isa_independent

Save = Callable[..., Path]


@pytest.mark.parametrize("task", ["", "test 2"])
def test_cartpole(task: str, visitor: Visitor, save_policy: Save) -> None:
    visitor.add_policy(save_policy(env_id="CartPole-v1"), "mine", "CartPole-v1")
    views = list(watch(visitor, "mine", task, 20, 0, True))
    last = views[-1]
    assert last.status.kind == "done", last.status
    assert last.status.text.startswith("Return ")
    assert last.video is not None
    assert last.video.suffix == ".mp4"
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(last.video))
    assert 5 <= frames <= 21
    assert seconds == pytest.approx(frames / 50, abs=0.05)


def test_a_whole_episode(visitor: Visitor, save_policy: Save) -> None:
    visitor.add_policy(save_policy(env_id="CartPole-v1"), "mine", "CartPole-v1")
    *_, view = watch(visitor, "mine", "", 1000, 0, False)
    assert "the whole episode" in view.status.text
    steps = int(view.status.text.split(" steps")[0].split()[-1])
    assert view.video is not None
    assert imageio_ffmpeg.count_frames_and_secs(str(view.video))[0] == steps


def test_a_meta_policy_plays_before_its_gradient_steps(visitor: Visitor, tmp_path: Path) -> None:
    *_, loaded = load_pretrained(visitor, "cartpole-family")
    assert loaded.status.text.endswith("It has learnt gradient steps, which Adapt takes.")
    path = visitor.policy(loaded.policy).path
    model, metadata = load_checkpoint(path)
    save_model(tmp_path / "a", model, metadata | {"adapted": "gradient"}, load_inner_rates(path))
    adapted = visitor.add_policy(tmp_path / "a", "adapted", "ssm_fast/CartPoleFamily-v0")
    for name, is_before in ((loaded.policy, True), (adapted.name, False)):
        *_, view = watch(visitor, name, "test 0", 5, 0, True)
        assert view.status.kind == "done", view.status
        assert ("This is before any gradient step" in view.status.text) == is_before


def test_mujoco(visitor: Visitor, save_cheetah: Save) -> None:
    if not draws_off_screen():
        pytest.skip("needs an OpenGL that draws off-screen: libegl1 and libgl1-mesa-dri")
    visitor.add_policy(save_cheetah(), "cheetah", "HalfCheetah-v5")
    *_, view = watch(visitor, "cheetah", "test 0", 5, 0, True)
    assert view.status.kind == "done", view.status
    assert view.video is not None
    frame = next(imageio_ffmpeg.read_frames(str(view.video), pix_fmt="gray"))
    assert frame["size"] == (480, 360)


def test_mujoco_without_opengl(
    visitor: Visitor, save_cheetah: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "backends", lambda _: ["nowhere", "nothing"])
    visitor.add_policy(save_cheetah(), "cheetah", "HalfCheetah-v5")
    *_, view = watch(visitor, "cheetah", "", 5, 0, True)
    assert view.status.kind == "error"
    assert "apt-get install libegl1 libgl1-mesa-dri" in view.status.text
    assert not visitor.is_busy


def test_a_driver_that_fails_to_import(
    visitor: Visitor, save_cheetah: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(watching, "route_mujoco_warnings", fail)
    visitor.add_policy(save_cheetah(), "cheetah", "HalfCheetah-v5")
    sent: list[object] = []
    policy = visitor.policy("cheetah")
    watching.play(sent.append, policy, "", 5, 0, True, policy.path.with_suffix(".mp4"))
    assert [type(message) for message in sent] == [watching._NoOpenGL]


@pytest.mark.parametrize(
    ("name", "task", "steps", "text"),
    [
        (None, "", 10, "There is no policy yet"),
        ("mine", "test 99", 10, "There is no task 'test 99' in ssm_fast/CartPoleFamily-v0."),
        ("mine", "", 1001, "Steps at most must be at most 1000, got 1001."),
        ("wrong", "", 10, "Obs must have shape"),
        ("nowhere", "", 10, "Nope-v0 cannot be drawn: "),
    ],
)
def test_a_mistake_is_a_sentence(
    name: str | None, task: str, steps: Any, text: str, visitor: Visitor, save_policy: Save
) -> None:
    path = save_policy()
    for label, env_id in (("mine", "CartPole-v1"), ("wrong", "Acrobot-v1"), ("nowhere", "Nope-v0")):
        visitor.add_policy(path, label, env_id)
    *_, view = watch(visitor, name, task, steps, 0, True)
    assert view.status.kind == "error"
    assert text in view.status.text
    assert view.video is None
