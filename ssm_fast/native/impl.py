"""The choice between native code and autograd, with the reason for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, TypeVar

from ssm_fast.native.plan import Reason

Impl = Literal["auto", "native", "autograd"]
F = TypeVar("F")

_IMPLS = ("auto", "native", "autograd")


class Choice:
    """Where something is computed: in native code if that can do it, in Python otherwise.

    Args:
        impl: ``"auto"``; ``"native"``, which raises where there is no native path; or ``"autograd"``.
        logger: Gets one INFO line when the path is chosen, and one for each change.
        what: The thing computed, for the line.
        otherwise: The name of the other path.

    Attributes:
        path: ``"native"``, or for instance ``"autograd: "`` and the reason; empty before the first
            choice.

    Raises:
        ValueError: ``impl`` is another word.
    """

    def __init__(
        self,
        impl: Impl,
        logger: logging.Logger,
        what: str = "gradients",
        otherwise: str = "autograd",
    ) -> None:
        if impl not in _IMPLS:
            raise ValueError(f"unknown impl {impl!r}; expected one of {list(_IMPLS)}")
        self.impl: Impl = impl
        self.path = ""
        self._logger, self._what, self._otherwise = logger, what, otherwise

    def of(self, find: Callable[[], F | Reason]) -> F | None:
        """What ``find`` returns, or None if that is a reason or ``impl`` is "autograd".

        Raises:
            RuntimeError: ``impl`` is "native" and ``find`` returns a reason.
        """
        found = Reason("impl='autograd'") if self.impl == "autograd" else find()
        if isinstance(found, Reason):
            if self.impl == "native":
                raise RuntimeError(f"impl='native' is not possible: {found}")
            self._note(f"{self._otherwise}: {found}")
            return None
        self._note("native")
        return found

    def _note(self, path: str) -> None:
        if path != self.path:
            self._logger.info("%s are %s", self._what, path)
            self.path = path
