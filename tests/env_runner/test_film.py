from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import imageio_ffmpeg
import pytest
import torch
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

from ssm_fast.core import ImprovedSSM
from ssm_fast.env_runner import evaluate, get_family
from ssm_fast.env_runner import film as film_module
from ssm_fast.env_runner.film import NoOpenGL, _set_camera, film, is_mujoco, usable_backend
from ssm_fast.policy import Policy

pytestmark = pytest.mark.isa_independent


@pytest.fixture(autouse=True)
def _no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def _policy() -> Policy:
    torch.manual_seed(1)
    return Policy(ImprovedSSM(4, 2, state_dim=4, hidden_dim=8, num_layers=1, discrete=True))


def test_an_episode(tmp_path: Path) -> None:
    path, seen = tmp_path / "episode.mp4", []
    filmed = film(_policy(), "CartPole-v1", path, seed=7, on_step=seen.append)
    expected = evaluate(_policy(), "CartPole-v1", 1, 7)
    assert (filmed.steps, filmed.episode_return) == (expected.lengths[0], expected.returns[0])
    assert filmed.has_ended
    assert seen == list(range(1, filmed.steps))  # a frame each, after that of the reset
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == filmed.steps


def test_no_longer_than_asked_and_in_a_task(tmp_path: Path) -> None:
    family = get_family("ssm_fast/CartPoleFamily-v0")
    path = tmp_path / "start.mp4"
    filmed = film(_policy(), family.env_name, path, steps=3, seed=7, task=family.test_tasks[0])
    assert (filmed.steps, filmed.has_ended) == (3, False)
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 4


def test_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "none.mp4"
    with pytest.raises(ValueError, match=r"Nope-v0 cannot be drawn"):
        film(_policy(), "Nope-v0", path)
    with pytest.raises(ValueError, match="obs must have shape"):
        film(_policy(), "Acrobot-v1", path)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        film(_policy(), "CartPole-v1", path, steps=0)
    for wrong in ("film.gif", "film", "."):
        with pytest.raises(ValueError, match=r"must be an \.mp4 file"):
            film(_policy(), "CartPole-v1", tmp_path / wrong)
    with pytest.raises(ValueError, match="there is no folder"):
        film(_policy(), "CartPole-v1", tmp_path / "nowhere" / "film.mp4")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_film_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"before")

    def stop(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        film(_policy(), "CartPole-v1", path, on_step=stop)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_backend("CartPole-v1") is None
    monkeypatch.setattr(film_module, "backends", lambda _: ["nowhere", "nothing"])
    with pytest.raises(NoOpenGL, match=r"apt-get install libegl1 .* \(MUJOCO_GL=nothing: Runtime"):
        usable_backend("HalfCheetah-v5")


class Robot(HalfCheetahEnv):
    """A MuJoCo task of somebody's own."""


def test_robots_are_found_by_what_they_derive_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gymnasium.register("Robot-v0", entry_point=Robot)
    gymnasium.register("Lost-v0", entry_point="no_such_mujoco_module:Robot")
    gymnasium.register("Mistyped-v0", entry_point="gymnasium.envs.mujoco.ant_v5:AnEnv")
    gymnasium.register("Colonless-v0", entry_point="gymnasium.envs.mujoco.ant_v5.AntEnv")
    monkeypatch.setitem(sys.modules, "Box2D", None)  # an extra that is missing
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
    try:
        for env_id in ("HalfCheetah-v5", "ssm_fast/HalfCheetahPositions-v0", "Robot-v0"):
            assert is_mujoco(env_id)
        for env_id in ("CartPole-v1", "ssm_fast/CartPolePositions-v0", "NoSuchEnv-v0"):
            assert not is_mujoco(env_id)
        for env_id in ("Lost-v0", "Mistyped-v0", "Colonless-v0", "LunarLander-v3"):
            assert not is_mujoco(env_id)
            with pytest.raises(ValueError, match=f"{env_id} cannot be drawn: "):
                film(_policy(), env_id, tmp_path / "none.mp4")
    finally:
        for name in ("Robot-v0", "Lost-v0", "Mistyped-v0", "Colonless-v0"):
            del gymnasium.registry[name]


@pytest.mark.parametrize(("env_id", "camera"), [("HalfCheetah-v5", 0), ("InvertedPendulum-v5", -1)])
def test_the_camera_follows_where_it_can(env_id: str, camera: int) -> None:
    with gymnasium.make(env_id, render_mode="rgb_array") as env:
        _set_camera(env.unwrapped)
        assert env.unwrapped.mujoco_renderer.camera_id == camera  # type: ignore[attr-defined]
