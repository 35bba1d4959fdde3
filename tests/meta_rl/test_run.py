from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ssm_fast.meta_rl.run import (
    CheckpointWarning,
    RunDirectory,
    read_checkpoint,
    read_state,
    write_state,
)


def _state(value: float) -> dict[str, object]:
    return {"weights": torch.full((3,), float(value)), "iteration": int(value), "returns": [value]}


def _row(iteration: int, episode_return: float = 1.0) -> dict[str, float]:
    return {
        "iteration": float(iteration),
        "timesteps": iteration * 10.0,
        "episode_return": episode_return,
    }


# Holds a folder, as does, after a fork, nobody else.
_HOLDS = """
import os, sys, time
from ssm_fast.meta_rl.run import RunDirectory
run = RunDirectory(sys.argv[1], resume=True)
if os.fork() == 0:
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """As a full disk: no file grows beyond this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestRunDirectory:
    def test_another_process_has_the_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLDS, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=tmp_path,  # away from the sources
        )
        assert process.stdout is not None
        try:
            assert int(process.stdout.readline()) == process.pid
            for resume in (False, True):
                with pytest.raises(ValueError, match="run is in use: another process trains there"):
                    RunDirectory(folder, resume=resume)
            assert RunDirectory(folder, read_only=True).read_rows() == []
            process.kill()
            process.wait(60)
            RunDirectory(folder)  # its child lives on
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
            process.stdout.close()

    def test_one_process_may_open_a_folder_twice(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        run.append_row(_row(1))
        assert RunDirectory(tmp_path, resume=True).read_rows() == [_row(1)]
        run.close()
        done = subprocess.run(
            [sys.executable, "-c", _HOLDS.partition("if")[0], str(tmp_path)],
            check=False,
            capture_output=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr

    def test_a_relative_folder_stays_where_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        run = RunDirectory("run")
        monkeypatch.chdir("elsewhere")
        run.append_row(_row(1))
        run.save_checkpoint(1, _state(1.0))
        run.write_config({})
        assert [p.name for p in tmp_path.iterdir() if list(p.iterdir())] == ["run"]
        assert str(run.path) == "run"

    def test_a_run_that_learnt_nothing_leaves_the_folder_free(self, tmp_path: Path) -> None:
        RunDirectory(tmp_path).append_row(_row(1))
        run = RunDirectory(tmp_path)
        run.append_row(_row(1))
        assert run.read_rows() == [_row(1)]

    def test_a_full_disk_is_named(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        run.append_row(_row(1))
        state = {"weights": torch.zeros(10_000)}
        with _largest_file(10_000), pytest.raises(OSError, match="File too large") as raised:
            run.save_checkpoint(1, state)
        assert Path(raised.value.filename).name == "training.pt"
        size = run.curve_path.stat().st_size
        with _largest_file(size), pytest.raises(OSError, match="File too large") as raised:
            run.append_row(_row(2))
        assert Path(raised.value.filename) == run.curve_path
        with _largest_file(100), pytest.raises(OSError, match="File too large") as raised:
            run.write_config({"x": "x" * 200})
        assert Path(raised.value.filename) == run.config_path

    def test_keeps_the_last_checkpoints(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path / "a" / "run", keep=2)
        for iteration in (5, 10, 15, 100_000_000):
            run.save_checkpoint(iteration, _state(iteration))
        names = sorted(path.name for path in run.checkpoints_path.iterdir())
        assert names == ["iteration_00000015", "iteration_100000000"]
        latest = run.latest_checkpoint()
        assert latest is not None
        assert latest.iteration == 100_000_000
        assert latest.state["returns"] == [1e8]
        torch.testing.assert_close(latest.state["weights"], torch.full((3,), 1e8))

    def test_may_be_read_by_whom_the_umask_lets(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            checkpoint = RunDirectory(tmp_path / "run").save_checkpoint(1, {"x": 1})
        finally:
            os.umask(before)
        assert checkpoint.stat().st_mode & 0o777 == 0o755

    def test_without_checkpoints(self, tmp_path: Path) -> None:
        assert RunDirectory(tmp_path).latest_checkpoint() is None

    def test_saves_the_model_beside_the_state(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        path = run.save_checkpoint(1, _state(1.0), lambda file: file.write_text("one") and None)
        assert (path / "model.safetensors").read_text() == "one"
        run.save_checkpoint(2, _state(2.0), lambda file: file.write_text("two") and None)
        assert run.model_path.read_text() == "two"

    def test_an_existing_run_needs_resume(self, tmp_path: Path) -> None:
        RunDirectory(tmp_path).write_config({"seed": 1})
        with pytest.raises(ValueError, match="holds a run already"):
            RunDirectory(tmp_path)
        assert RunDirectory(tmp_path, resume=True).read_config() == {"seed": 1}

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(OSError, match="cannot be written to"):
            RunDirectory(tmp_path / "run")

    def test_an_unwritable_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**_: object) -> None:  # the permission bits do not stop root
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        with pytest.raises(OSError, match=r"cannot be written to: .*Permission denied"):
            RunDirectory(tmp_path / "run")

    def test_keep_range(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
            RunDirectory(tmp_path, keep=0)

    @pytest.mark.parametrize("content", [None, "{", "[1]"])
    def test_a_damaged_config(self, tmp_path: Path, content: str | None) -> None:
        run = RunDirectory(tmp_path)
        if content is not None:
            run.config_path.write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            run.read_config()

    def test_a_failed_write_leaves_the_checkpoints_before_it(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        run.save_checkpoint(1, _state(1.0))

        def fail(file: Path) -> None:
            file.write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(2, _state(2.0), fail)
        assert [path.name for path in run.checkpoints_path.iterdir()] == ["iteration_00000001"]

    @pytest.mark.parametrize("kind", ["pipe", "device", "large"])
    def test_a_config_that_is_no_small_file(self, tmp_path: Path, kind: str) -> None:
        run = RunDirectory(tmp_path)
        if kind == "pipe":
            os.mkfifo(run.config_path)
        elif kind == "device":
            run.config_path.symlink_to("/dev/zero")
        else:
            run.config_path.write_bytes(b" " * (2**20 + 1))
        expected = "at most 1048576 bytes" if kind == "large" else "not a regular file"
        with pytest.raises(ValueError, match=rf"config\.json .*{expected}"):
            run.read_config()

    def test_temporary_files_of_a_kill_are_removed(self, tmp_path: Path) -> None:
        kept = [".policy.tmp.safetensors", "notes.0123456789abcdef.tmp.txt", ".hidden"]
        gone = [".policy.0123456789abcdef.tmp.safetensors", ".x.0123456789abcdef.tmp"]
        for name in (*kept, *gone):
            (tmp_path / name).write_text("")
        RunDirectory(tmp_path)
        files = [p.name for p in tmp_path.iterdir() if p.is_file() and p.name != ".lock"]
        assert sorted(files) == sorted(kept)

    def test_what_a_kill_left_behind_is_removed(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        run.save_checkpoint(1, _state(1.0))
        (run.checkpoints_path / ".unfinished-x").mkdir()
        (run.checkpoints_path / ".unfinished-x" / "training.pt").write_bytes(b"half")
        run = RunDirectory(tmp_path, resume=True)
        assert [path.name for path in run.checkpoints_path.iterdir()] == ["iteration_00000001"]


class TestLatestCheckpoint:
    @pytest.mark.parametrize("file", ["training.pt", "manifest.json", "model.safetensors"])
    @pytest.mark.parametrize("damage", ["empty", "half", "flipped", "missing"])
    def test_passes_over_a_damaged_one(self, tmp_path: Path, file: str, damage: str) -> None:
        run = RunDirectory(tmp_path)

        def write_model(path: Path) -> None:
            path.write_bytes(bytes(range(100)))

        run.save_checkpoint(1, _state(1.0), write_model)
        path = run.save_checkpoint(2, _state(2.0), write_model) / file
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        if damage == "missing":
            path.unlink()
        else:
            damaged = {"empty": b"", "half": content[: len(content) // 2], "flipped": flipped}
            path.write_bytes(damaged[damage])
        with pytest.warns(CheckpointWarning, match="iteration_00000002/"):
            latest = run.latest_checkpoint()
        assert latest is not None
        assert latest.iteration == 1

    def test_none_is_intact(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        (run.save_checkpoint(1, _state(1.0)) / "training.pt").write_bytes(b"")
        with (
            pytest.warns(CheckpointWarning),
            pytest.raises(ValueError, match=r"no intact checkpoint in .*training"),
        ):
            run.latest_checkpoint()

    def test_drop_checkpoints_after(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        for iteration in (1, 2, 3):
            run.save_checkpoint(iteration, _state(iteration))
        run.drop_checkpoints_after(1)
        assert [path.name for path in run.checkpoints_path.iterdir()] == ["iteration_00000001"]


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


class TestReadState:
    def test_round_trip(self, tmp_path: Path) -> None:
        write_state(tmp_path / "state.pt", _state(3.0))
        state = read_state(tmp_path / "state.pt")
        assert state["iteration"] == 3
        assert torch.equal(state["weights"], torch.full((3,), 3.0))

    @pytest.mark.parametrize("writer", ["torch", "pickle"])
    def test_a_hostile_file_runs_no_code(self, tmp_path: Path, writer: str) -> None:
        path, marker = tmp_path / "state.pt", tmp_path / "marker"
        if writer == "torch":
            torch.save({"weights": _Attack(marker)}, path)
        else:
            path.write_bytes(pickle.dumps(_Attack(marker)))
        with pytest.raises(ValueError, match=r"state\.pt holds no training state"):
            read_state(path)
        assert not marker.exists()

    def test_a_hostile_checkpoint_runs_no_code(self, tmp_path: Path) -> None:
        marker = tmp_path / "marker"
        run = RunDirectory(tmp_path / "run")
        path = run.save_checkpoint(1, {"weights": _Attack(marker)})
        with pytest.raises(ValueError, match="holds no training state"):
            read_checkpoint(path)
        assert not marker.exists()

    @pytest.mark.parametrize(
        "manifest", ['{"sha256": {}}', "[]", "null", "[" * 60_000, '{"sha256": 1, "iteration": -1}']
    )
    def test_a_hostile_manifest(self, tmp_path: Path, manifest: str) -> None:
        path = RunDirectory(tmp_path).save_checkpoint(1, _state(1.0))
        (path / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match=r"manifest\.json is missing or damaged"):
            read_checkpoint(path)

    def test_a_huge_manifest(self, tmp_path: Path) -> None:
        path = RunDirectory(tmp_path).save_checkpoint(1, _state(1.0))
        (path / "manifest.json").write_text(json.dumps({"iteration": 1}) + " " * (1 << 17))
        with pytest.raises(ValueError, match="must be at most"):
            read_checkpoint(path)

    def test_something_else(self, tmp_path: Path) -> None:
        torch.save(torch.zeros(3), tmp_path / "state.pt")
        with pytest.raises(ValueError, match="must hold a dict, got Tensor"):
            read_state(tmp_path / "state.pt")
        with pytest.raises(ValueError, match="cannot be read"):
            read_state(tmp_path / "missing.pt")


class TestCurve:
    def test_rows_survive_a_reopening(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        run.write_config({})
        run.append_row(_row(1, math.nan))
        run.append_row(_row(2, 0.1 + 0.2))
        run = RunDirectory(tmp_path, resume=True)
        run.append_row(_row(3))
        rows = run.read_rows()
        assert [row["iteration"] for row in rows] == [1.0, 2.0, 3.0]
        assert math.isnan(rows[0]["episode_return"])
        assert rows[1]["episode_return"] == 0.1 + 0.2

    def test_truncate_rows(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        for iteration in range(1, 6):
            run.append_row(_row(iteration))
        before = run.curve_path.read_bytes()
        with run.curve_path.open("a") as file:
            file.write("6.0,6")  # cut short by a kill
        run.truncate_rows(5)
        assert run.curve_path.read_bytes() == before
        run.truncate_rows(2)
        run.append_row(_row(3))
        assert [row["iteration"] for row in run.read_rows()] == [1.0, 2.0, 3.0]

    def test_other_columns(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        run.append_row(_row(1))
        with pytest.raises(ValueError, match="row must have columns"):
            run.append_row({"iteration": 2.0})

    def test_plot_curve(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        run.plot_curve()
        empty = run.figure_path.read_bytes()
        for iteration in range(5):
            run.append_row(_row(iteration, float(iteration) if iteration else math.nan))
        run.plot_curve("HalfCheetah-v5")
        assert run.figure_path.read_bytes().startswith(b"\x89PNG")
        assert run.figure_path.read_bytes() != empty


def test_tensorboard(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reader's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with RunDirectory(tmp_path) as run:
        run.log_scalars({"ignored": 1.0}, 0)
        run.open_tensorboard()
        run.log_scalars({"train/loss": 0.5, "train/nothing": math.nan}, 10)
    run.close()
    events = EventAccumulator(str(run.tensorboard_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (10, 0.5)
