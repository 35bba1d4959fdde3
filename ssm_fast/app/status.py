"""What a tab says of its work, and how an error becomes a sentence there."""

from __future__ import annotations

import functools
import html
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, ParamSpec, TypeVar

from ssm_fast.app.jobs import JobError, as_sentence, unexpected

_LOGGER = logging.getLogger(__name__)

P = ParamSpec("P")


@dataclass(frozen=True)
class Status:
    """A line of a tab.

    Attributes:
        text: One or more sentences.
        kind: Whether there is work under way, it is done, or it failed.
        fraction: How much of it is done, where that is known.
        notes: Warnings, a sentence each.
    """

    text: str = ""
    kind: Literal["idle", "busy", "done", "error"] = "idle"
    fraction: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """What a tab shows; handlers yield one after the other."""

    status: Status = field(default_factory=Status)


IS_ERROR = """/role="alert"/"""  # in JavaScript, of a status as HTML, which escapes quotes in texts


def as_html(status: Status) -> str:
    """A status as HTML; its texts may come from a stranger's file."""
    bar = ""
    if status.kind == "busy" and status.fraction is None:
        bar = '<div class="bar unknown"><div></div></div>'
    elif status.kind == "busy":
        bar = (
            f'<div class="bar"><div style="width: {100 * (status.fraction or 0):.1f}%"></div></div>'
        )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in status.notes)
    notes = f"<ul>{notes}</ul>" if notes else ""
    role = "alert" if status.kind == "error" else "status"
    return f'<div class="status {status.kind}" role="{role}">{html.escape(status.text)}{bar}{notes}</div>'


V = TypeVar("V", bound=View)


def with_errors_as_sentences(
    view: type[V],
) -> Callable[[Callable[P, Iterator[V]]], Callable[P, Iterator[V]]]:
    """Makes a handler end with a view of its error, beside what it had shown before."""

    def wrap(handler: Callable[P, Iterator[V]]) -> Callable[P, Iterator[V]]:
        @functools.wraps(handler)
        def run(*args: P.args, **kwargs: P.kwargs) -> Iterator[V]:
            last = view()
            try:
                for last in handler(*args, **kwargs):
                    yield last
            except (ValueError, TypeError, OSError, JobError) as error:
                yield replace(last, status=Status(as_sentence(error), "error"))
            except Exception as error:
                _LOGGER.exception("a handler failed")
                yield replace(last, status=Status(unexpected(error), "error"))

        return run

    return wrap
