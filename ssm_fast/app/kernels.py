"""The tab Kernels: how fast this machine is, beside the eager loop and nn.GRU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ssm_fast import SSM, _native
from ssm_fast.app.jobs import Note, Send
from ssm_fast.app.status import Status, View, with_errors_as_sentences
from ssm_fast.app.visitors import Visitor
from ssm_fast.bench.timing import take_turns
from ssm_fast.cli.messages import check_option
from ssm_fast.ops import dense_scan, norm_scan

KIND = "measuring"
BATCHES, STEPS, STATES = (1, 16, 64), (64, 256), (32, 64, 128)
ROUNDS = 15
_SECONDS_OF_CONTEST = 2.5  # of the six


@dataclass(frozen=True)
class Row:
    """A line of the table, medians in milliseconds; None where there is no such peer."""

    what: str
    native: float
    eager: float
    gru: float | None


@dataclass(frozen=True)
class KernelsView(View):
    """What the tab shows."""

    rows: tuple[Row, ...] = ()


@with_errors_as_sentences(KernelsView)
def measure(visitor: Visitor, B: int, T: int, N: int, threads: int) -> Iterator[KernelsView]:
    """Measures the kernels in sizes of a visitor's choice.

    Args:
        visitor: Who asks.
        B: Rows, one of `BATCHES`.
        T: Steps, one of `STEPS`.
        N: State size, one of `STATES`.
        threads: Of torch and the kernels.
    """
    for name, value, sizes in (("batch", B, BATCHES), ("steps", T, STEPS), ("state", N, STATES)):
        if value not in sizes:
            raise ValueError(f"{name} must be one of {sizes}, got {value}")
    check_option("threads", threads, 1, os.cpu_count() or 1)
    view = KernelsView(Status("Measuring ...", "busy", 0.0))
    yield view
    job = visitor.start(KIND, contests, B, T, N, threads)
    if job is None:
        yield KernelsView(Status("Stopped before it began.", "done"))
        return
    rows: list[Row] = []
    try:
        for batch in job.batches():
            rows += [message for message in batch if not isinstance(message, Note)]
            view = KernelsView(Status("Measuring ...", "busy", len(rows) / 6), tuple(rows))
            yield view
    finally:
        visitor.end(KIND)
    text = "Stopped." if job.is_stopped else "Medians of alternating rounds."
    yield KernelsView(Status(f"{text} {machine(threads)}", "done"), tuple(rows))


def machine(threads: int) -> str:
    """What the numbers are of."""
    return (
        f"float32, {threads} of {os.cpu_count()} processors, {_native.isa()} instructions, "
        f"torch {torch.__version__}."
    )


def contests(send: Send, B: int, T: int, N: int, threads: int) -> None:
    """Measures one op after the other, in a child process, and sends a `Row` of each."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    u = torch.randn(B, T, N, requires_grad=True)
    A = (0.9 * torch.linalg.qr(torch.randn(N, N))[0]).requires_grad_()
    weight, bias = torch.ones(N, requires_grad=True), torch.zeros(N, requires_grad=True)
    ssm, gru = SSM(N, N, batch_first=True), nn.GRU(N, N, batch_first=True)

    def eager_ssm() -> Tensor:
        h, outputs = None, []
        for t in range(T):
            y, h = ssm.step(u[:, t], h)
            outputs.append(y)
        return torch.stack(outputs, 1)

    ways: dict[str, dict[str, Callable[[], Tensor]]] = {
        "dense_scan": {
            "native": lambda: dense_scan(u, A),
            "eager": lambda: dense_scan(u, A, impl="reference"),
        },
        "norm_scan": {
            "native": lambda: norm_scan(u, A, weight, bias),
            "eager": lambda: norm_scan(u, A, weight, bias, impl="reference"),
        },
        "SSM layer": {"native": lambda: ssm(u)[0], "eager": eager_ssm, "gru": lambda: gru(u)[0]},
    }
    for what, contenders in ways.items():
        send(_row(f"{what}, forward", contenders, _forward))
        send(_row(f"{what}, forward and backward", contenders, _forward_and_backward))


def _forward(run: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        run()


def _forward_and_backward(run: Callable[[], Tensor]) -> None:
    run().sum().backward()  # type: ignore[no-untyped-call]


def _row(
    what: str,
    contenders: dict[str, Callable[[], Tensor]],
    call: Callable[[Callable[[], Tensor]], None],
) -> Row:
    """Medians over rounds in which the contenders take turns."""
    runs = {name: partial(call, run) for name, run in contenders.items()}
    medians = take_turns(runs, rounds=ROUNDS, seconds=_SECONDS_OF_CONTEST).milliseconds
    return Row(what, medians["native"], medians["eager"], medians.get("gru"))
