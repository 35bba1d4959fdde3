"""Functions run in a fresh process, where no other call has left threads or memory behind."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns there.

    Raises:
        EOFError: The process died, or the function raised, which it has said on stderr.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, arguments))
    child.start()
    sender.close()  # a child that dies is then an error here, not a wait for ever
    result = receiver.recv()
    child.join()
    return result


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def added_memory(run: Callable[[], object]) -> float:
    """MiB that a call adds to the resident set of this process at its peak (Linux)."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
