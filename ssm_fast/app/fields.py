"""The numbers that a visitor types: their labels, and the check of what was typed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssm_fast.checks import check_number
from ssm_fast.cli.messages import check_option


@dataclass(frozen=True)
class Fraction:
    """A field for any number.

    Attributes:
        label: As it stands on the page.
        above: The number must be larger.
        at_least: The smallest number.
        at_most: The largest number.
    """

    label: str
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf

    def checked(self, value: float | None) -> float:
        """The number in the field.

        Raises:
            ValueError: The field is empty, or the number is out of range.
        """
        value = _typed(self.label, value)
        limits = {"above": self.above, "at_least": self.at_least, "at_most": self.at_most}
        return check_number(self.label, value, **limits)


@dataclass(frozen=True)
class Count:
    """A field for whole numbers.

    Attributes:
        label: As it stands on the page.
        at_least: The smallest number.
        at_most: The largest number.
    """

    label: str
    at_least: int
    at_most: int

    def checked(self, value: float | None) -> int:
        """The number in the field.

        Raises:
            ValueError: The field is empty, or the number is not whole or out of range.
        """
        value = _typed(self.label, value)
        if not float(value).is_integer():
            raise ValueError(f"{self.label} must be a whole number, got {value}")
        check_option(self.label, int(value), self.at_least, self.at_most)
        return int(value)


SEED = Count("Seed", 0, 2**31 - 1)


def _typed(label: str, value: float | None) -> float:
    if value is None:
        raise ValueError(f"the field {label!r} is empty: type a number")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{label} must be a number, got {type(value).__name__}")
    return value
