"""What the commands write, and their checks of numbers."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path

import ssm_fast
from ssm_fast.checks import check_count


def say(text: str) -> None:
    """Writes a line of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def sentence(message: object) -> str:
    """A message in one line; of a file's error without its number, and with the notes of any."""
    notes = getattr(message, "__notes__", [])
    if isinstance(message, OSError) and message.filename is not None and message.strerror:
        names = [repr(x) for x in (message.filename, message.filename2) if x is not None]
        message = f"{' -> '.join(names)}: {message.strerror}"
    return " ".join("; ".join([str(message), *notes]).split())


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
    check_count(f"--{name}", value, at_least)
    if value > at_most:
        raise ValueError(f"--{name} must be at most {at_most}, got {value}")
