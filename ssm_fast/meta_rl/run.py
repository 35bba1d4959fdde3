"""The folder of a training run: configuration, checkpoints, learning curve, TensorBoard."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ssm_fast.checkpoint import named_in_errors, read_limited, write_atomic
from ssm_fast.checks import check_count

if TYPE_CHECKING:
    from typing_extensions import Self

_STATE_FILE = "training.pt"
_MODEL_FILE = "model.safetensors"
_MANIFEST_FILE = "manifest.json"
_CHECKPOINT_NAME = re.compile(r"iteration_(\d{8,})")
_TEMPORARY_PREFIX = ".unfinished-"
_MANIFEST_LIMIT = 1 << 16  # bytes; ours are below 400
_CONFIG_LIMIT = 1 << 20  # bytes
_CURVE_LIMIT = 1 << 28  # bytes
_CURVE_COLUMNS = ("iteration", "timesteps", "episode_return")  # what is read of any curve
_LEFTOVER_NAME = re.compile(r"\..+\.[0-9a-f]{16}\.tmp(\.[^.]*)?")  # of write_atomic
_STATE_LIMIT = 1 << 31  # bytes
_LOCK_FILE = ".lock"


class CheckpointWarning(UserWarning):
    """A checkpoint of a run is damaged and was passed over for an older one."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match their checksums.

    Attributes:
        path: Its folder.
        iteration: How many iterations the run had done.
        state: The training state, as it was given to `RunDirectory.save_checkpoint`.
    """

    path: Path
    iteration: int
    state: dict[str, Any]


class RunDirectory:
    """The files of one training run.

    ```
    config.json                      what the run was started with
    checkpoints/iteration_00000020/  model.safetensors, training.pt, manifest.json (SHA-256 of both)
    policy.safetensors               the newest weights, for `ssm_fast.load_policy`
    curve.csv, curve.png             the learning curve, a row an iteration
    tensorboard/                     event files
    evaluation.json                  returns of the final policy, of `ssm-fast train`
    ```

    A checkpoint is built under a temporary name, synced and renamed, so that a kill at any moment
    leaves the ones before it whole. A state is read with `weights_only=True`: a checkpoint runs no
    code. One process has the folder at a time, until `close` or its own end, however it ends.

    Args:
        path: The folder; it is made where it is missing. A relative path counts from the folder in
            which this object is made.
        resume: Continue the run that is there. Without it, a folder that holds a run is refused.
        overwrite: Replace the run that is there: the files of a run are removed, others stay.
        read_only: Look at the run that is there, maybe while it is training. Nothing is made,
            removed or written; the folder may be on a read-only disk.
        keep: How many checkpoints are kept.

    Raises:
        ValueError: The folder holds a run and none of `resume`, `overwrite` and `read_only` is set,
            `overwrite` is and config.json is not that of a run, another process has the folder, or
            `keep` is below 1.
        TypeError: `keep` is no integer.
        OSError: The folder cannot be made or written to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        read_only: bool = False,
        keep: int = 3,
    ) -> None:
        self.path = Path(path)
        self.keep = check_count("keep", keep)
        folder = self.path.absolute()  # an environment may change the working directory
        self._folder = folder
        self.config_path = folder / "config.json"
        self.checkpoints_path = folder / "checkpoints"
        self.model_path = folder / "policy.safetensors"
        self.curve_path = folder / "curve.csv"
        self.figure_path = folder / "curve.png"
        self.tensorboard_path = folder / "tensorboard"
        self.evaluation_path = folder / "evaluation.json"
        self._columns: list[str] | None = None
        self._notes: dict[str, str] = {}
        self._writer: Any = None
        self._lock: _Lock | None = None
        if not read_only:
            self._prepare(resume, overwrite)

    def _prepare(self, resume: bool, overwrite: bool) -> None:
        """Makes the folders, checks that they can be used, and clears what a kill has left."""
        try:
            self.checkpoints_path.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryFile(dir=self._folder),
                tempfile.TemporaryFile(dir=self.checkpoints_path),
            ):
                pass
            self._lock = _Lock.of(self._folder)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use: another process trains there; wait for its end or choose "
                "another folder (--out)"
            ) from None
        except OSError as error:
            raise OSError(f"run folder {self.path} cannot be written to: {error}") from error
        if overwrite:
            self._remove_run()
        elif not resume and (self.config_path.exists() or self._checkpoint_paths()):
            self.close()
            raise ValueError(
                f"{self.path} holds a run already; resume it (--resume), replace it (--overwrite) or "
                "choose another folder (--out)"
            )
        if not resume:
            self.curve_path.unlink(missing_ok=True)  # of one that ended before its first checkpoint
        for leftover in self.checkpoints_path.glob(f"{_TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self._folder.iterdir():
            if _LEFTOVER_NAME.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)

    def _remove_run(self) -> None:
        """Removes what `ssm-fast train` has written; what else is in the folder stays."""
        if not self.config_path.exists() and not self._checkpoint_paths():
            return
        versions = self.read_config().get("versions")
        if not isinstance(versions, dict) or "ssm_fast" not in versions:
            raise ValueError(
                f"{self.path} is not overwritten: {self.config_path} is not of ssm-fast train"
            )
        for checkpoint in self._checkpoint_paths():
            shutil.rmtree(checkpoint)
        for file in (self.model_path, self.curve_path, self.figure_path, self.evaluation_path):
            file.unlink(missing_ok=True)
        for events in self.tensorboard_path.glob("events.out.tfevents.*"):
            events.unlink()
        self.config_path.unlink()  # last: with it, what a kill leaves can be overwritten

    # Configuration

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes `config` (JSON values) to config.json."""
        _write_text(self.config_path, json.dumps(config, indent=2, sort_keys=True) + "\n")

    def note(self, name: str, value: str) -> None:
        """Adds an entry to config.json, if there is one."""
        if self._notes.get(name) == value:
            return
        self._notes[name] = value
        if self.config_path.exists():
            self.write_config({**self.read_config(), name: value})

    def read_config(self) -> dict[str, Any]:
        """Returns the configuration.

        Raises:
            ValueError: config.json is missing, too large, or not a JSON object.
        """
        try:
            config = json.loads(read_limited(self.config_path, _CONFIG_LIMIT))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.config_path} cannot be read: {error}") from error
        if isinstance(config, dict):
            return config
        raise ValueError(f"{self.config_path} must hold a JSON object")

    # Checkpoints

    def save_checkpoint(
        self,
        iteration: int,
        state: Mapping[str, Any],
        write_model: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes a checkpoint whole, then drops the oldest beyond `keep`.

        Args:
            iteration: How many iterations are done; names the checkpoint.
            state: What a resume needs: tensors, numbers, strings, and lists and dicts of them.
            write_model: Writes the model's weights to the path it is given: once beside the state,
                once as the run's newest weights.

        Returns:
            The folder of the checkpoint.
        """
        final = self.checkpoints_path / f"iteration_{iteration:08d}"
        # Not mkdtemp's, which others may not read whatever the umask says.
        building = self.checkpoints_path / f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        building.mkdir()
        try:
            _write_synced(building / _STATE_FILE, _dump_state(state))
            if write_model is not None:
                write_model(building / _MODEL_FILE)
            digests = {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in building.iterdir()
            }
            manifest = {"format": "ssm_fast run", "iteration": iteration, "sha256": digests}
            _write_synced(building / _MANIFEST_FILE, json.dumps(manifest).encode())
            if final.exists():
                shutil.rmtree(final)
            os.replace(building, final)
            _sync_folder(self.checkpoints_path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if write_model is not None:
            write_model(self.model_path)
        for old in self._checkpoint_paths()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def has_checkpoint(self, iteration: int) -> bool:
        """Whether there is one after so many iterations."""
        return iteration in map(_iteration_of, self._checkpoint_paths())

    def has_checkpoints(self) -> bool:
        """Whether there are any, intact or not."""
        return bool(self._checkpoint_paths())

    def latest_checkpoint(self) -> Checkpoint | None:
        """Returns the newest intact checkpoint, or None where the run has none yet.

        A damaged one is passed over with a `CheckpointWarning`.

        Raises:
            ValueError: There are checkpoints and none of them is intact.
        """
        paths = self._checkpoint_paths()
        for path in reversed(paths):
            try:
                return read_checkpoint(path)
            except ValueError as error:
                damage = str(error)
                warnings.warn(f"skipped a damaged checkpoint: {error}", CheckpointWarning, 2)
        if paths:
            raise ValueError(f"no intact checkpoint in {self.path}; the last: {damage}")
        return None

    def drop_checkpoints_after(self, iteration: int) -> None:
        """Removes the checkpoints past `iteration`, from which a run is resumed."""
        for path in self._checkpoint_paths():
            if _iteration_of(path) > iteration:
                shutil.rmtree(path)

    def _checkpoint_paths(self) -> list[Path]:
        if not self.checkpoints_path.is_dir():
            return []
        paths = [p for p in self.checkpoints_path.iterdir() if _CHECKPOINT_NAME.fullmatch(p.name)]
        return sorted(paths, key=_iteration_of)

    # Learning curve

    def append_row(self, row: Mapping[str, float]) -> None:
        """Adds a row to curve.csv (NaN as an empty field); the first row sets the columns.

        Raises:
            ValueError: `row` has other columns than the rows before it.
        """
        if self._columns is None:
            self._columns = self._read_columns() or self._write_columns(row)
        if list(row) != self._columns:
            raise ValueError(f"row must have columns {self._columns}, got {list(row)}")
        with (
            named_in_errors(self.curve_path),
            self.curve_path.open("a", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerow([_field(row[column]) for column in self._columns])

    def read_rows(self) -> list[dict[str, float]]:
        """Returns the rows of curve.csv; a row that a kill cut short is left out.

        Raises:
            ValueError: It is no table with the columns of a learning curve.
        """
        table = self._read_table()
        if not table:
            return []
        columns, *lines = table
        missing = [name for name in _CURVE_COLUMNS if name not in columns]
        if missing:
            raise ValueError(f"{self.curve_path} is damaged: it lacks the columns {missing}")
        rows = []
        for line in lines:
            if len(line) != len(columns):
                continue
            try:
                rows.append({k: float(x or "nan") for k, x in zip(columns, line, strict=True)})
            except ValueError:
                continue
        return rows

    def truncate_rows(self, iteration: int) -> None:
        """Drops the rows past `iteration`, which a resumed run writes anew."""
        columns = self._read_columns()
        if columns is None:
            return
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(columns)
        for row in self.read_rows():
            if row["iteration"] <= iteration:
                table.writerow([_field(row[column]) for column in columns])
        _write_text(self.curve_path, text.getvalue())

    def plot_curve(self, title: str = "") -> None:
        """Draws the episode returns of curve.csv over environment steps to curve.png."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = [row for row in self.read_rows() if math.isfinite(row["episode_return"])]
        figure = Figure(figsize=(7.0, 4.0), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot([row["timesteps"] for row in rows], [row["episode_return"] for row in rows])
        axes.set_xlabel("environment steps")
        axes.set_ylabel("episode return")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        image = io.BytesIO()
        canvas.print_png(image)  # type: ignore[no-untyped-call]
        _write_bytes(self.figure_path, image.getvalue())

    def _read_columns(self) -> list[str] | None:
        return next(iter(self._read_table()), None)

    def _read_table(self) -> list[list[str]]:
        if not self.curve_path.exists():
            return []
        try:
            text = read_limited(self.curve_path, _CURVE_LIMIT).decode()
            return list(csv.reader(io.StringIO(text, newline="")))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{self.curve_path} is damaged: {error}") from error

    def _write_columns(self, row: Mapping[str, float]) -> list[str]:
        text = io.StringIO(newline="")
        csv.writer(text).writerow(list(row))
        _write_text(self.curve_path, text.getvalue())
        return list(row)

    # TensorBoard

    def open_tensorboard(self, purge_step: int | None = None) -> None:
        """Opens the event writer; events at and past `purge_step` are hidden (for a resume)."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.tensorboard_path), purge_step=purge_step)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Writes the finite ones of `scalars` to TensorBoard, where it is open."""
        if self._writer is None:
            return
        for name, value in scalars.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the event writer and leaves the folder to others; may be called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Lock:
    """Keeps other processes out of a run folder while an object of this process holds it.

    The kernel drops the lock of a process that dies, by SIGKILL too.
    """

    _held: ClassVar[weakref.WeakValueDictionary[tuple[int, int], _Lock]] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, descriptor: int) -> None:
        self.close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, folder: Path) -> _Lock:
        """That of a folder.

        Raises:
            BlockingIOError: Another process holds it.
            OSError: The folder cannot be written to.
        """
        descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        info = os.fstat(descriptor)
        held = cls._held.get((info.st_dev, info.st_ino))
        if held is not None:
            os.close(descriptor)
            return held
        lock = cls(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # as on some network disks
            warnings.warn(
                f"{folder} cannot be locked ({error}): train there with one process at a time",
                stacklevel=2,
            )
        cls._held[info.st_dev, info.st_ino] = lock
        return lock

    @classmethod
    def leave_all(cls) -> None:
        """In a forked child, which must not hold what its parent has."""
        for lock in list(cls._held.values()):
            lock.close()
        cls._held.clear()


os.register_at_fork(after_in_child=_Lock.leave_all)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the checkpoint folder `path` and verifies its checksums.

    Raises:
        ValueError: A file is missing, too large or damaged, or asks for code to be run. The message
            names the path.
    """
    folder = Path(path)
    try:
        manifest = json.loads(read_limited(folder / _MANIFEST_FILE, _MANIFEST_LIMIT))
        digests, iteration = dict(manifest["sha256"]), manifest["iteration"]
        if not {_STATE_FILE} <= digests.keys() <= {_STATE_FILE, _MODEL_FILE}:
            raise ValueError(f"unexpected files {sorted(digests)}")
        if not isinstance(iteration, int) or iteration < 0:
            raise ValueError(f"iteration must be a count, got {iteration!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / _MANIFEST_FILE} is missing or damaged: {error!r}") from error
    contents = {name: _read_state_file(folder / name) for name in digests}
    for name, expected in digests.items():
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    state = _parse_state(folder / _STATE_FILE, contents[_STATE_FILE])
    return Checkpoint(folder, iteration, state)


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a training state to one file, whole or not at all."""
    _write_bytes(Path(path), _dump_state(state))


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file of `write_state`; it runs no code.

    Raises:
        ValueError: The file is missing, damaged, or holds something else.
    """
    return _parse_state(Path(path), _read_state_file(Path(path)))


def _dump_state(state: Mapping[str, Any]) -> bytes:
    contents = io.BytesIO()
    torch.save(dict(state), contents)
    return contents.getvalue()


def _read_state_file(path: Path) -> bytes:
    try:
        return read_limited(path, _STATE_LIMIT)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _parse_state(path: Path, contents: bytes) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} holds no training state: {reason}") from error
    if isinstance(state, dict):
        return state
    raise ValueError(f"{path} must hold a dict, got {type(state).__name__}")


def _iteration_of(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _field(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _write_text(path: Path, text: str) -> None:
    _write_bytes(path, text.encode())


def _write_bytes(path: Path, contents: bytes) -> None:
    write_atomic(path, lambda temporary: Path(temporary).write_bytes(contents))


def _write_synced(path: Path, contents: bytes) -> None:
    with named_in_errors(path), path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
