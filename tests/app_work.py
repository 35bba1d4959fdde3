"""Work for the jobs of the app's tests; a child process imports it by name."""

from __future__ import annotations

import os
import subprocess
import time
import warnings
from collections.abc import Callable
from typing import Any

Send = Callable[[Any], None]


def count(send: Send, last: int) -> None:
    for i in range(last):
        send(i)


def wait(send: Send) -> None:
    send("waiting")
    time.sleep(600)


def wait_for_another(send: Send, pipe: str) -> None:
    """Waits for a process of its own, which holds a named pipe open."""
    with open(pipe, "wb") as held:
        subprocess.run(["sh", "-c", "echo; exec sleep 600"], stdout=held, check=True)


def warn(send: Send) -> None:
    warnings.warn("the sky is falling", stacklevel=1)


def tell_environment(send: Send, name: str) -> None:
    send(os.environ.get(name))


def raise_value_error(send: Send) -> None:
    raise ValueError("--width must be\nat least 1")


def divide_by_zero(send: Send) -> None:
    send(1 // 0)


def crash(send: Send) -> None:
    os._exit(3)
