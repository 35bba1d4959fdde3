"""Work in child processes, which answer in messages and can be stopped at any moment.

In a thread of the server, training would share the interpreter and torch's threads with every page,
could not be stopped inside an iteration of many seconds, and a crash of an OpenGL driver would take
all visitors along. The children are forked from a server process that has imported torch and does
nothing else, so that one starts in milliseconds and inherits no threads.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, TypeAlias, cast

import torch

from ssm_fast.cli.messages import sentence

Send: TypeAlias = Callable[[Any], None]

UPDATE_SECONDS = 0.5  # between two updates of a page

_LOGGER = logging.getLogger(__name__)
_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTS = [f"ssm_fast.app.{name}" for name in ("training", "adapting", "watching", "kernels")]
_IMPORTS += ["torch._dynamo"]  # which takes seconds, and which every optimizer imports


class JobError(Exception):
    """The work broke down; the message is a sentence for the visitor."""


@dataclass(frozen=True)
class Note:
    """A warning that the work gave, as a sentence."""

    text: str


@dataclass(frozen=True)
class _Failure:
    text: str


def prepare() -> None:
    """Starts the process that the children are forked from, so that the first need not wait."""
    _CONTEXT.set_forkserver_preload(_IMPORTS)
    forkserver.ensure_running()


class Job:
    """A function at work in a process of its own.

    Args:
        work: A function of a module. It is called with a function that sends a message, and the
            arguments.
        arguments: What else it takes.
        environment: Environment variables of the process.
    """

    def __init__(
        self,
        work: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._inbox, outbox = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_run, args=(outbox, work, arguments, dict(environment or {})), daemon=True
        )
        self._process.start()
        outbox.close()
        self.is_stopped = False
        self._is_over = False

    def batches(self) -> Iterator[list[Any]]:
        """The messages, those of `UPDATE_SECONDS` at a time, until the work is done or stopped.

        Raises:
            JobError: The work broke down.
        """
        ended = False
        while not ended:
            batch: list[Any] = []
            due = time.monotonic() + UPDATE_SECONDS
            try:
                while self._inbox.poll(max(0.0, due - time.monotonic())):
                    batch.append(self._inbox.recv())
                    if time.monotonic() >= due:
                        break
            except (EOFError, OSError):
                ended = True
            failures = [message for message in batch if isinstance(message, _Failure)]
            yield [message for message in batch if not isinstance(message, _Failure)]
            if failures:
                self._wait()
                raise JobError(failures[0].text)
        self._wait()
        if self._process.exitcode != 0 and not self.is_stopped:
            raise JobError(f"The work ended unexpectedly (exit code {self._process.exitcode}).")

    def _wait(self) -> None:
        """For the end of the process, whose work is over."""
        self._is_over = True
        self._process.join()

    def stop(self) -> None:
        """Ends the work at once, if it is not over, and what it has started, as a film's ffmpeg."""
        if not self._is_over:
            self.is_stopped = True
            try:
                os.killpg(cast(int, self._process.pid), signal.SIGKILL)
            except ProcessLookupError:  # it has no group yet, or is over
                self._process.kill()


def _run(
    outbox: Connection,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
) -> None:
    """In the child: works, and turns warnings and errors into sentences."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which stops its children
    os.setpgrp()
    os.environ.update(environment)
    torch.set_num_threads(1)

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        outbox.send(Note(as_sentence(message)))

    with warnings.catch_warnings():
        warnings.showwarning = note
        try:
            work(outbox.send, *arguments)
        except (ValueError, OSError, FloatingPointError) as error:
            outbox.send(_Failure(as_sentence(error)))
        except MemoryError:
            outbox.send(_Failure("There is not enough memory for this."))
        except Exception as error:
            _LOGGER.exception("work failed")
            outbox.send(_Failure(unexpected(error)))


def as_sentence(error: object) -> str:
    """An error as the command line words it, for a page: a capital, a full stop, no dashes."""
    text = sentence(error).replace("--", "")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def unexpected(error: Exception) -> str:
    """What a visitor reads of an error that nobody foresaw; the log has its traceback."""
    return f"Something went wrong ({type(error).__name__}): {as_sentence(error)}"
