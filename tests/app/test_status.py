from __future__ import annotations

from collections.abc import Iterator

import pytest

from ssm_fast.app.status import Status, View, as_html, with_errors_as_sentences

pytestmark = pytest.mark.isa_independent


def test_html_of_a_stranger_s_text() -> None:
    shown = as_html(Status("<img src=x>", "done", notes=("a & <b>",)))
    assert '<div class="status done" role="status">&lt;img src=x&gt;' in shown
    assert "<li>a &amp; &lt;b&gt;</li>" in shown


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (Status("", "error"), 'role="alert"'),
        (Status("", "busy"), 'class="bar unknown"'),
        (Status("", "busy", 0.25), "width: 25.0%"),
    ],
)
def test_html_of_a_kind(status: Status, part: str) -> None:
    assert part in as_html(status)
    assert ("bar" in as_html(status)) == (status.kind == "busy")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("--lr must be positive"), "Lr must be positive."),
        (KeyError("x"), "Something went wrong (KeyError): 'x'."),
    ],
)
def test_an_error_ends_the_views(error: Exception, text: str) -> None:
    @with_errors_as_sentences(View)
    def handler() -> Iterator[View]:
        yield View(Status("fine"))
        raise error

    assert [view.status.text for view in handler()] == ["fine", text]
