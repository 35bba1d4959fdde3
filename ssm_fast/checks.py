"""Checks of the numbers that a caller gives, worded once for the whole package."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np


def check_number(
    name: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """Returns a number that is finite and within its bounds.

    Args:
        name: Of the argument, for the message.
        value: The number.
        at_least: Smallest value.
        above: Bound that the value may not take itself.
        at_most: Largest value.

    Raises:
        ValueError: The number is out of its range, or not finite.
    """
    if not (at_least <= value <= at_most and value > above and math.isfinite(value)):
        bounds = _bounds(at_least, above, at_most)
        raise ValueError(f"{name} must be {' and '.join(['finite', *bounds])}, got {value}")
    return float(value)


def check_count(name: str, value: int, at_least: int = 1) -> int:
    """Returns an integer that is large enough.

    Args:
        name: Of the argument, for the message.
        value: The integer, of Python or NumPy.
        at_least: Smallest value.

    Raises:
        TypeError: It is no integer.
        ValueError: It is too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def check_kind(model: Any, *kinds: type) -> None:
    """Checks the class of a model, with a word on one that is wrapped, as `torch.compile` does.

    Raises:
        TypeError: It is of none of the kinds.
    """
    if isinstance(model, kinds):
        return
    names = [kind.__name__ for kind in kinds]
    names = [f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in names]
    modules = model.modules() if hasattr(model, "modules") else ()
    hint = ": give the model inside" if any(isinstance(x, kinds) for x in modules) else ""
    raise TypeError(f"model must be {' or '.join(names)}, got {type(model).__name__}{hint}")


def check_flag(name: str, value: bool) -> bool:
    """Returns a bool, of Python or NumPy, as Python's.

    Raises:
        TypeError: It is none: `bool("False")` is true.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


class HasSpaces(Protocol):
    """What an environment says of its spaces."""

    env_name: str
    input_dim: int
    action_dim: int
    discrete: bool


def describe_spaces(input_dim: int, action_dim: int, discrete: bool) -> str:
    """What a policy sees and does, such as "17 observations and 6 continuous actions"."""
    observations = f"{input_dim} observation{'s' if input_dim != 1 else ''}"
    kind = "discrete" if discrete else "continuous"
    return f"{observations} and {action_dim} {kind} action{'s' if action_dim != 1 else ''}"


def check_spaces(env: HasSpaces, input_dim: int, action_dim: int, discrete: bool) -> None:
    """Raises ValueError where the spaces of an environment are not those of a model."""
    own, wanted = (env.input_dim, env.action_dim, env.discrete), (input_dim, action_dim, discrete)
    if own != wanted:
        raise ValueError(
            f"{env.env_name} has {describe_spaces(*own)}, the model is for {describe_spaces(*wanted)}"
        )


def _bounds(at_least: float, above: float, at_most: float) -> list[str]:
    """The bounds that there are, in words."""
    bounds = []
    if above > -math.inf:
        bounds.append("positive" if above == 0.0 else f"above {above:g}")
    if at_least > -math.inf and at_most < math.inf:
        bounds.append(f"in [{at_least:g}, {at_most:g}]")
    elif at_least > -math.inf:
        bounds.append(f"at least {at_least:g}")
    elif at_most < math.inf:
        bounds.append(f"at most {at_most:g}")
    return bounds


def is_replaced(instance: object, owner: type, names: Iterable[str]) -> bool:
    """Whether a subclass, or somebody on this very object, has another method in the place of `owner`'s."""
    return any(
        name in vars(instance) or getattr(type(instance), name) is not getattr(owner, name)
        for name in names
    )
