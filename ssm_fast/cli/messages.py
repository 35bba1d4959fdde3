"""What the commands write, and their checks of numbers."""

from __future__ import annotations

import sys

from ssm_fast.checks import check_count


def say(text: str) -> None:
    """Writes a line of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def sentence(message: object) -> str:
    """A message in one line."""
    return " ".join(str(message).split())


def check_option(name: str, value: int, at_least: int, at_most: int) -> None:
    """Raises ValueError, with the option that is meant, where its value is out of range."""
    check_count(f"--{name}", value, at_least)
    if value > at_most:
        raise ValueError(f"--{name} must be at most {at_most}, got {value}")
