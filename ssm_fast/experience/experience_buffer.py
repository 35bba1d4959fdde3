"""A ring of experience in preallocated tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from ssm_fast.checkpoint import write_atomic
from ssm_fast.checks import check_count

FORMAT = "ssm_fast.experience"
VERSION = 1

_FIRST = ("observations", "targets")
_RESERVED = ("initial_state", "_run", "_generator")  # in sequences, and in the file
_LARGEST = 2**40  # steps, of a file
_LONGEST = 2**62  # steps in a row, of a file: others may follow


class ExperienceBuffer:
    """Keeps the last ``max_size`` steps, for replay.

    A step has an observation, a target and any further fields by name (actions, rewards, ...),
    each of one shape and dtype, which the first step sets. Memory is taken once, then; a full
    buffer forgets its oldest step for each new one. To insert a step takes the same time whatever
    the size, and to sample copies only what is sampled.

    Two fields have a meaning in `sample_sequences`: ``reset``, a boolean that is set where the
    observation is the first of an episode, and ``state``, the recurrent state before the step.

    Args:
        max_size: Steps to keep.
        device: Where they lie; what is added moves there.
        seed: Of the sampling; drawn from torch's global generator if None. The same seed gives the
            same samples on every device.

    Raises:
        ValueError: ``max_size`` is less than 1, or ``seed`` negative.
        TypeError: ``max_size`` or ``seed`` is no integer.
    """

    def __init__(
        self, max_size: int, device: str | torch.device = "cpu", *, seed: int | None = None
    ) -> None:
        self.max_size = check_count("max_size", max_size)
        seed = check_count("seed", int(torch.randint(2**31, ())) if seed is None else seed, 0)
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._fields: dict[str, Tensor] = {}  # [max_size, ...]
        self._run = torch.zeros(0, dtype=torch.int64, device="cpu")  # [max_size], see _advance
        self._size = 0
        self._next = 0  # where the next step goes
        self._last_run = 0  # of the last step

    def __len__(self) -> int:
        """Steps that can be sampled."""
        return self._size

    def __repr__(self) -> str:
        fields = {name: list(x.shape[1:]) for name, x in self._fields.items()}
        return f"ExperienceBuffer({self._size} of {self.max_size} steps, {self.device}, {fields})"

    def add(
        self, observations: Any, targets: Any, *, continues: bool = True, **fields: Any
    ) -> None:
        """Insert one step.

        Args:
            observations: One observation, without a batch dimension: a tensor, array or number.
            targets: Its target.
            continues: Whether the step follows the one added before it in time. A sequence never
                crosses to a step that does not, unless that is the first of an episode.
            **fields: Anything else, by name.

        Raises:
            ValueError: A shape differs from that of the first step, or the fields do.
            TypeError: A dtype does.
        """
        given = {"observations": observations, "targets": targets, **fields}
        steps = {name: _tensor(name, x).unsqueeze(0) for name, x in given.items()}
        self._insert(steps, continues)

    def extend(
        self, observations: Any, targets: Any, *, continues: bool = False, **fields: Any
    ) -> None:
        """Insert steps that follow each other in time, such as what one environment did.

        Args:
            observations: ``[M, ...]``.
            targets: ``[M, ...]``.
            continues: Whether the first one follows the step added last; the others follow each
                other.
            **fields: Anything else, ``[M, ...]`` each.

        Raises:
            ValueError: A shape differs from that of the first step, the fields do, or the lengths
                ``M`` differ.
            TypeError: A dtype does.
        """
        given = {"observations": observations, "targets": targets, **fields}
        steps = {name: _tensor(name, x) for name, x in given.items()}
        for name, x in steps.items():
            if x.dim() == 0 or len(x) != len(steps["observations"]):
                M = len(steps["observations"]) if steps["observations"].dim() > 0 else "M"
                raise ValueError(f"{name} must have shape [{M}, ...], got {list(x.shape)}")
        self._insert(steps, continues)

    def get_batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Observations and targets ``[n, ...]`` of steps drawn uniformly, with replacement.

        Raises:
            ValueError: The buffer is empty, or ``n`` less than 1.
        """
        indices = self._draw_steps(n)
        return self._fields["observations"][indices], self._fields["targets"][indices]

    def sample(self, n: int) -> dict[str, Tensor]:
        """Every field ``[n, ...]`` of steps drawn uniformly, with replacement.

        Raises:
            ValueError: The buffer is empty, or ``n`` less than 1.
        """
        indices = self._draw_steps(n)
        return {name: x[indices] for name, x in self._fields.items()}

    def sample_sequences(self, n: int, length: int) -> dict[str, Tensor]:
        """Sequences of consecutive steps, drawn uniformly with replacement.

        They may begin anywhere and run over the ends of episodes.

        Args:
            n: Sequences.
            length: Steps of each, ``L``.

        Returns:
            Every field ``[n, L, ...]``; ``reset`` is there in any case, all false if it is not
            stored. Where ``state`` is stored, it comes as ``initial_state`` ``[n, ...]``, that of
            each first step alone.

        Raises:
            ValueError: No sequence of that length is stored, or a number is less than 1.
        """
        check_count("n", n)
        check_count("length", length)
        first = self._draw_ends(n, length) - (length - 1)  # [n]
        steps = (first.unsqueeze(1) + torch.arange(length, device="cpu")) % self.max_size  # [n, L]
        steps = steps.to(self.device)
        sequences = {name: x[steps] for name, x in self._fields.items() if name != "state"}
        if "reset" not in sequences:
            sequences["reset"] = torch.zeros(n, length, dtype=torch.bool, device=self.device)
        if "state" in self._fields:
            sequences["initial_state"] = self._fields["state"][steps[:, 0]]
        return sequences

    def longest_sequence(self) -> int:
        """The most consecutive steps that are stored; 0 in an empty buffer."""
        if self._size == 0:
            return 0
        steps_back = self._run[self._places(torch.arange(self._size, device="cpu"))]
        # What came before the oldest step is gone.
        stored = torch.arange(1, self._size + 1, device="cpu")
        return int(torch.minimum(steps_back, stored).max())

    def save(self, path: str | PathLike[str]) -> None:
        """Write the steps and the state of the sampling to one safetensors file, atomically.

        Raises:
            OSError: If the file cannot be written; an old one is then untouched.
        """
        from safetensors.torch import save

        order = self._places(torch.arange(self._size, device="cpu"))
        tensors = {name: x[order.to(self.device)].cpu() for name, x in self._fields.items()}
        tensors["_run"] = self._run[order]
        tensors["_generator"] = self._generator.get_state()
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "max_size": str(self.max_size),
            "fields": json.dumps(list(self._fields)),
        }
        contents = save(tensors, header)
        write_atomic(path, lambda temporary: temporary.write_bytes(contents))

    @classmethod
    def load(
        cls, path: str | PathLike[str], device: str | torch.device = "cpu"
    ) -> ExperienceBuffer:
        """Rebuild a buffer from its file alone; it goes on to sample as the saved one would.

        Args:
            path: A file of `save`.
            device: Where the steps shall lie.

        Raises:
            ValueError: If it is no such file.
            OSError: If it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._restore(header, tensors, device)
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{fspath(path)!r} is not an experience buffer: {error}") from error

    @classmethod
    def _restore(
        cls, header: Mapping[str, str], tensors: dict[str, Tensor], device: str | torch.device
    ) -> ExperienceBuffer:
        if header.get("format") != FORMAT or header.get("version") != str(VERSION):
            raise ValueError(f"its format must be {FORMAT} version {VERSION}")
        max_size, names = (
            json.loads(header.get("max_size", "")),
            json.loads(header.get("fields", "")),
        )
        if type(max_size) is not int or not 1 <= max_size <= _LARGEST:
            raise ValueError(f"max_size must lie in [1, {_LARGEST}]")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("fields must be a list of names")
        if sorted(tensors) != sorted([*names, "_run", "_generator"]):
            raise ValueError("its tensors must be those of its fields")
        run, generator = tensors.pop("_run"), tensors.pop("_generator")
        if run.dtype != torch.int64 or run.dim() != 1 or len(run) > max_size:
            raise ValueError("_run must be int64 [steps], at most max_size")
        if any(x.dim() == 0 or len(x) != len(run) for x in tensors.values()):
            raise ValueError("its fields must have the same number of steps")
        if not names and len(run) > 0:
            raise ValueError("its steps must have fields")
        buffer = cls(max_size, device, seed=0)
        try:
            buffer._generator.set_state(generator.clone())
            if names:
                buffer._insert({name: tensors[name] for name in names}, continues=False)
        except (RuntimeError, TypeError) as error:  # the generator's, or no memory for max_size
            raise ValueError(str(error)) from error
        if bool(((run < 1) | (run > _LONGEST)).any()):
            raise ValueError(f"_run must be positive, at most {_LONGEST}")
        if len(run) > 0:
            buffer._run[: len(run)] = run
            buffer._last_run = int(run[-1])
        return buffer

    @torch.inference_mode(False)  # what is stored is good outside of it, too
    def _insert(self, steps: dict[str, Tensor], continues: bool) -> None:
        """Check steps ``[M, ...]`` and write them, in at most two pieces."""
        M = len(steps["observations"]) if "observations" in steps else 0
        self._check(steps)
        if not self._fields:
            self._fields = {
                name: torch.empty(self.max_size, *x.shape[1:], dtype=x.dtype, device=self.device)
                for name, x in steps.items()
            }
            self._run = torch.zeros(self.max_size, dtype=torch.int64, device="cpu")
        if M == 0:
            return
        steps["_run"] = self._advance(M, continues or bool(steps.get("reset", _FALSE)[0]))
        kept = min(M, self.max_size)  # of more than fit, the last
        first = (self._next + M - kept) % self.max_size
        head = min(kept, self.max_size - first)
        for name, x in steps.items():
            store = self._run if name == "_run" else self._fields[name]
            store[first : first + head] = x[M - kept : M - kept + head]
            store[: kept - head] = x[M - kept + head :]
        self._next = (first + kept) % self.max_size
        self._size = min(self._size + M, self.max_size)

    def _advance(self, M: int, continues: bool) -> Tensor:
        """For each of M new steps, how many steps one can go back to from it, itself included."""
        before = self._last_run if continues else 0
        self._last_run = before + M
        return torch.arange(before + 1, before + M + 1, device="cpu")

    def _check(self, steps: dict[str, Tensor]) -> None:
        for name in _RESERVED:
            if name in steps:
                raise ValueError(f"no field can have the name {name!r}")
        if not self._fields:
            missing = [name for name in _FIRST if name not in steps]
            if missing:
                raise ValueError(f"the fields {missing} are missing")
            reset = steps.get("reset")
            if reset is not None and (reset.dtype != torch.bool or reset.dim() != 1):
                error = TypeError if reset.dtype != torch.bool else ValueError
                raise error(
                    f"reset must be one boolean a step, got {reset.dtype} {list(reset.shape[1:])}"
                )
            return
        if steps.keys() != self._fields.keys():
            raise ValueError(f"the fields must be {list(self._fields)}, got {list(steps)}")
        for name, x in steps.items():
            expected = self._fields[name]
            if x.shape[1:] != expected.shape[1:]:
                raise ValueError(
                    f"{name} must have shape {list(expected.shape[1:])} a step, as the first one, "
                    f"got {list(x.shape[1:])}"
                )
            if x.dtype != expected.dtype:
                raise TypeError(
                    f"{name} must have dtype {expected.dtype}, as the first step, got {x.dtype}"
                )

    def _draw_steps(self, n: int) -> Tensor:
        check_count("n", n)
        if self._size == 0:
            raise ValueError("the buffer is empty")
        chosen = torch.randint(self._size, (n,), generator=self._generator, device="cpu")
        return self._places(chosen).to(self.device)

    def _draw_ends(self, n: int, length: int) -> Tensor:
        """Last steps of stored sequences, uniformly: ``[n]``."""
        if self._size < length:
            raise ValueError(f"length must be at most the {self._size} steps stored, got {length}")

        # Most draws fit, unless the pieces are hardly longer than a sequence.
        ends = self._places(
            torch.randint(length - 1, self._size, (2 * n,), generator=self._generator, device="cpu")
        )
        ends = ends[self._run[ends] >= length]
        if len(ends) < n:
            order = self._places(torch.arange(length - 1, self._size, device="cpu"))
            possible = order[self._run[order] >= length]
            if len(possible) == 0:
                raise ValueError(f"no {length} consecutive steps are stored")
            more = torch.randint(
                len(possible), (n - len(ends),), generator=self._generator, device="cpu"
            )
            ends = torch.cat([ends, possible[more]])
        return ends[:n]

    def _places(self, numbers: Tensor) -> Tensor:
        """Where the steps lie that are counted from the oldest."""
        return (numbers + (self._next - self._size)) % self.max_size


_FALSE = (False,)


def _tensor(name: str, x: Any) -> Tensor:
    try:
        tensor = x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
        return tensor.detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor, array or number, got {x!r:.80}") from error
