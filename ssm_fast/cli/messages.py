"""What the commands write, and their checks of numbers."""

from __future__ import annotations

import io
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import ssm_fast

_COLOUR = re.compile(r"\x1b\[[\d;]*m")  # as Gymnasium writes warnings


def say(text: str) -> None:
    """Writes a line of the result."""
    _write(sys.stdout, text)


def say_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes a table: the first column of words, the others of numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.ASCII2)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(table)
    say(captured.get().rstrip())


def note(text: str) -> None:
    """Writes a line about what happens meanwhile."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    """Writes a line; once nobody reads the stream any more, as under `head`, nothing."""
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:  # what the command is for goes on: a training writes files
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def prepare_output() -> None:
    """Makes the standard streams take any text, also where they are closed or know few letters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`; the first file that is opened would take its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def sentence(message: object) -> str:
    """A message and its notes in one line, without colours; a file's error without its number."""
    notes = getattr(message, "__notes__", [])
    if isinstance(message, OSError) and message.filename is not None and message.strerror:
        names = [repr(x) for x in (message.filename, message.filename2) if x is not None]
        message = f"{' -> '.join(names)}: {message.strerror}"
    return " ".join(_COLOUR.sub("", "; ".join([str(message), *notes])).split())


def place_of(error: BaseException) -> str:
    """Where code that is neither ours nor installed raised an error, as an environment's of the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(ssm_fast.__file__).parent)
    installed = tuple(sysconfig.get_paths().values())
    for frame in reversed(frames):
        if frame.filename.startswith(ours):
            return ""
        if not frame.filename.startswith((*installed, "<")):
            kind = type(error).__name__
            return f" ({kind} at {frame.filename}:{frame.lineno}, in {frame.name})"
    return ""


def check_option(name: str, value: int, at_least: int, at_most: int) -> None:
    """Raises ValueError, with the option that is meant, where its value is out of range."""
    from ssm_fast.checks import check_count  # needs NumPy, the messages of a mistake do not

    check_count(f"--{name}", value, at_least)
    if value > at_most:
        raise ValueError(f"--{name} must be at most {at_most}, got {value}")
