"""The processes that train one policy together: who has what, and what they tell each other."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ssm_fast.checks import check_number

if TYPE_CHECKING:
    from typing_extensions import Self

    from ssm_fast.meta_rl.training_state import Resumable
    from ssm_fast.nn.running_norm import RunningNorm

T = TypeVar("T")

_TIMEOUT = 300.0  # seconds: more than any rank lets the others wait, a checkpoint's disk included
_PAUSE = 0.01  # seconds between two looks for a rank that is not there yet
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
_SHARED_ERRORS = (FloatingPointError, ValueError, OSError)


class LostRank(ConnectionError):
    """Another process of the run has died, or has not answered for too long."""


class Part(NamedTuple):
    """What a rank computes of a minibatch, and its weight in the mean over all of it.

    A rank that has nothing of it computes the first item at weight 0: every rank takes the same
    path, and no mean is over nothing.
    """

    items: Tensor  # [M], their numbers
    weight: float


@dataclass(frozen=True)
class Rows:
    """The rows `first` to `first + count` of `total` ones, which a rank has of a whole."""

    first: int
    count: int
    total: int

    def of(self, x: Tensor) -> Tensor:
        """The own rows of a tensor of all of them."""
        return x if self.count == self.total else x[self.first : self.first + self.count]

    def part(self, chosen: Tensor, each: int = 1) -> Part:
        """Those that are the rank's own among chosen items, of which every row has `each`.

        Args:
            chosen: Numbers of items `[M]`, those of row 0 first.
            each: Items of a row.

        Returns:
            The own ones, counted from the first item of the own rows.
        """
        if self.count == self.total:
            return Part(chosen, 1.0)
        start, stop = self.first * each, (self.first + self.count) * each
        own = chosen[(chosen >= start) & (chosen < stop)] - start
        return Part(own if len(own) else own.new_zeros(1), len(own) / len(chosen))


class World:
    """The processes of a run: one, which has everything and talks to nobody.

    What the trainers do with the processes of a run is a method here, and costs nothing where there
    is one. `join_world` gives the world of several.

    Attributes:
        rank: Number of this process, below `size`. Rank 0 alone logs and writes.
        size: Number of processes.
        local_rank: Number of this process on its machine: its GPU.
    """

    rank = 0
    size = 1
    local_rank = 0

    # Who has what

    def share(self, total: int) -> range:
        """The own ones of `total` items: one stretch a rank, none longer than another by two."""
        each, more = divmod(total, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def rows(self, count: int) -> Rows:
        """The own `count` rows among those of all ranks, in the order of the ranks."""
        return Rows(0, count, count)

    def split(self, batch: Tensor) -> Part:
        """An even part of a minibatch `[M]` that all ranks have."""
        return Part(batch, 1.0)

    # Numbers

    def average(self, x: Tensor, weight: float | Tensor) -> Tensor:
        """The sum over ranks of `weight * x`, where the weights of all ranks sum to one.

        `x` is overwritten.
        """
        return x

    def average_all(self, tensors: Sequence[Tensor], weight: float) -> Sequence[Tensor]:
        """`average` of several tensors in one call."""
        return tensors

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks, joined along `dim`, in which alone they may differ."""
        return x

    def standardize(self, parts: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        """Shifts and scales each minibatch to mean 0 and deviation 1.

        Args:
            parts: What this rank has of each.
            weights: Their weights; at 0, a part is scaled as the others are and not counted.
        """
        return [(x - x.mean()) / (x.std(correction=0) + 1e-8) for x in parts]

    def variances(self, *samples: Tensor) -> list[float]:
        """The population variance of each sample over all ranks."""
        return [float(x.var(correction=0)) for x in samples]

    def update(self, norm: RunningNorm, x: Tensor) -> None:
        """Takes the observations `[..., F]` of all ranks into the statistics."""
        norm.update(x)

    # Agreement

    def first(self, value: T) -> T:
        """What rank 0 says: numbers, strings, and lists and dicts of them."""
        return value

    def exchange(self, value: Any) -> list[Any]:
        """What every rank says, in the order of the ranks; tuples become lists."""
        return [value]

    def share_errors(self) -> AbstractContextManager[None]:
        """Raises an error that one rank meets inside on all of them.

        These are `FloatingPointError`, `ValueError` and `OSError`. Nothing inside may need another
        rank, and all ranks have to come through.
        """
        return nullcontext()

    def synchronize(self, trainer: Resumable) -> None:
        """Gives the trainers of all ranks the training state of rank 0.

        Raises:
            ValueError: A rank was started with other settings or another model.
        """

    def is_first_to_say(self, text: str) -> bool:
        """Whether no rank has asked this of the same text before: then this one may write it."""
        return True

    def close(self) -> None:
        """Leaves the other processes; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def join_world(timeout: float = _TIMEOUT) -> World:
    """The processes that `torchrun` started with this one; a world of one without it.

    Tensors in main memory travel by gloo, those of GPUs by NCCL.

    Args:
        timeout: Seconds after which a rank that does not answer is given up.

    Raises:
        ValueError: Some of the environment variables that torchrun sets are missing, or no number.
        LostRank: The other processes did not come.
    """
    check_number("timeout", timeout, above=0.0)
    given = [name for name in _VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} <= set(given) or os.environ["WORLD_SIZE"] == "1":
        return World()
    missing = set(_VARIABLES) - set(given)
    if missing:
        raise ValueError(f"RANK and WORLD_SIZE are set and {sorted(missing)} not: use torchrun")
    return _Processes(timeout)


class _Processes(World):
    """The world of several processes."""

    def __init__(self, timeout: float) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        patience = timedelta(seconds=timeout)
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        self._dist = dist
        with _or_lost():
            store, self.rank, self.size = next(rendezvous("env://", timeout=patience))
            store.set_timeout(patience)
            prefix = _meet(store, self.rank, self.size, timeout)
            self._store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                timeout=patience,
                store=self._store,
                rank=self.rank,
                world_size=self.size,
            )
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))

    def rows(self, count: int) -> Rows:
        counts = self.gather(torch.tensor([count], device="cpu")).tolist()
        return Rows(sum(counts[: self.rank]), count, sum(counts))

    def split(self, batch: Tensor) -> Part:
        own = self.share(len(batch))
        items = batch[own.start : own.stop] if own else batch[:1]
        return Part(items, len(own) / len(batch))

    def average(self, x: Tensor, weight: float | Tensor) -> Tensor:
        x = x.mul_(weight)
        with _or_lost():
            self._dist.all_reduce(x)
        return x

    def average_all(self, tensors: Sequence[Tensor], weight: float) -> Sequence[Tensor]:
        flat = self.average(torch.cat([x.reshape(-1) for x in tensors]), weight)
        parts = torch.split(flat, [x.numel() for x in tensors])
        return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        sizes = torch.cat(self._gather(torch.tensor([x.shape[dim]], device="cpu"))).tolist()
        rows = x.movedim(dim, 0)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # [most, ...]
        padded[: len(rows)] = rows
        parts = self._gather(padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]).movedim(0, dim)

    def _gather(self, x: Tensor) -> list[Tensor]:
        """Tensors of the same shape, in the order of the ranks."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _or_lost():
            self._dist.all_gather(parts, x)
        return parts

    def standardize(self, parts: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
        counts = [x.numel() if weight else 0 for x, weight in zip(parts, weights, strict=True)]
        _, mean, variance = self._moments(parts, counts)  # [P]
        scales = zip(parts, mean.tolist(), variance.sqrt().tolist(), strict=True)
        return [(x - shift) / (deviation + 1e-8) for x, shift, deviation in scales]

    def variances(self, *samples: Tensor) -> list[float]:
        _, _, variance = self._moments(samples, [x.numel() for x in samples])
        values: list[float] = variance.tolist()
        return values

    def _moments(
        self, samples: Sequence[Tensor], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, means and population variances `[P]` of `P` samples over all ranks."""
        moments = [torch.var_mean(x.double(), correction=0) for x in samples]
        variances, means = (torch.stack(column) for column in zip(*moments, strict=True))
        return self._merge(torch.tensor(counts, device="cpu"), means, variances)

    def update(self, norm: RunningNorm, x: Tensor) -> None:
        count, mean, variance = norm.moments(x)
        counts = torch.full(mean.shape, count, device="cpu")
        total, mean, variance = self._merge(counts, mean, variance)
        norm.merge(int(total[0]), mean, variance)

    def _merge(
        self, count: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, means and variances `[P]` of what all ranks have together, the same on each."""
        own = torch.stack([x.to("cpu", torch.float64) for x in (count, mean, variance)])
        counts, means, variances = torch.stack(self._gather(own)).unbind(1)  # [ranks, P]
        total = counts.sum(0)
        merged = (counts * means).sum(0) / total
        squares = (counts * (variances + (means - merged).square())).sum(0)
        return total, merged, squares / total

    def first(self, value: T) -> T:
        chosen: T = self.exchange(value if self.rank == 0 else None)[0]
        return chosen

    def exchange(self, value: Any) -> list[Any]:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.cat(self._gather(torch.tensor([len(text)], device="cpu"))).tolist()
        texts = torch.split(self.gather(text), lengths)
        return [json.loads(bytes(text.tolist())) for text in texts]

    @contextmanager
    def share_errors(self) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except _SHARED_ERRORS as error:
            failure = error
        own = torch.tensor([failure is not None], device="cpu")
        failed = torch.cat(self._gather(own))  # [ranks]
        if not bool(failed.any()):
            return
        rank = int(failed.nonzero()[0])
        kind = next((i for i, k in enumerate(_SHARED_ERRORS) if isinstance(failure, k)), None)
        kind, text = self.exchange([kind, str(failure)])[rank]
        where = f"rank {rank}: " if rank else ""
        raise _SHARED_ERRORS[kind](f"{where}{text}") from failure

    def synchronize(self, trainer: Resumable) -> None:
        contents = io.BytesIO()
        if self.rank == 0:
            torch.save(trainer.state_dict(), contents)
        data = bytearray(contents.getvalue())
        data.extend(bytes(self.first(len(data)) - len(data)))
        received = torch.frombuffer(data, dtype=torch.uint8)
        with _or_lost():
            self._dist.broadcast(received, 0)
        with self.share_errors():
            if self.rank:
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                trainer.load_state_dict(state)

    def is_first_to_say(self, text: str) -> bool:
        try:
            key = f"said/{hashlib.sha256(text.encode()).hexdigest()}"
            return bool(self._store.add(key, 1) == 1)
        except RuntimeError:  # whoever holds the list is gone
            return True

    def close(self) -> None:
        if self._dist.is_initialized():
            self._dist.destroy_process_group()


def _meet(store: Any, rank: int, size: int, timeout: float) -> str:
    """A name that the processes of this start share, and no other start with the same store.

    torchrun keeps its store over restarts, with the addresses of the processes before: gloo takes
    these for the new ones. So each process leaves a name that nobody knows yet, rank 0 answers all
    that it finds with a name of its own, and the right ones acknowledge that.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", name)
        shared: str = store.get(f"welcome/{name}").decode()
        store.set(f"met/{shared}/{rank}", "")
        return shared
    deadline = time.monotonic() + timeout
    missing, welcomed = set(range(1, size)), set()
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                found = store.get(f"hello/{other}").decode()
                if found not in welcomed:
                    store.set(f"welcome/{found}", name)
                    welcomed.add(found)
        missing = {other for other in missing if not store.check([f"met/{name}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not come within {timeout:.0f} s")
        time.sleep(_PAUSE if missing else 0.0)
    return name


@contextmanager
def _or_lost() -> Iterator[None]:
    """Says of a call that did not reach the other ranks what that means."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        line = str(error).partition("\n")[0].partition(". This is typically")[0]
        reason = re.sub(r"^\[\S+:\d+\] ", "", line)  # a line of gloo's source
        raise LostRank(f"another process of this run is lost: {reason}") from error
