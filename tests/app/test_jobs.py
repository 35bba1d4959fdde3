from __future__ import annotations

import os
import select
import time
from pathlib import Path

import app_work
import pytest

from ssm_fast.app.jobs import Job, JobError, Note, as_sentence

pytestmark = pytest.mark.isa_independent


def messages(job: Job) -> list[object]:
    return [message for batch in job.batches() for message in batch]


def test_messages_in_their_order() -> None:
    job = Job(app_work.count, 500)
    assert messages(job) == list(range(500))
    job.stop()  # too late to be a stop
    assert not job.is_stopped


def test_environment_is_the_child_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSM_FAST_TEST", raising=False)
    environment = {"SSM_FAST_TEST": "1"}
    assert messages(Job(app_work.tell_environment, "SSM_FAST_TEST", environment=environment)) == [
        "1"
    ]
    assert messages(Job(app_work.tell_environment, "SSM_FAST_TEST")) == [None]


def test_warnings_are_notes() -> None:
    assert messages(Job(app_work.warn)) == [Note("The sky is falling.")]


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (app_work.raise_value_error, "Width must be at least 1."),
        (app_work.divide_by_zero, r"Something went wrong \(ZeroDivisionError\): Integer division"),
        (app_work.crash, r"The work ended unexpectedly \(exit code 3\)."),
    ],
)
def test_errors_are_sentences(work: object, text: str) -> None:
    with pytest.raises(JobError, match=text):
        messages(Job(work))  # type: ignore[arg-type]


def test_stop() -> None:
    job = Job(app_work.wait)
    seen = []
    for batch in job.batches():
        seen += batch
        if seen and not job.is_stopped:
            began = time.monotonic()
            job.stop()
    assert seen == ["waiting"]
    assert job.is_stopped
    assert time.monotonic() - began < 5.0  # where nothing else is at work, a few milliseconds


def test_stop_ends_what_the_work_has_started(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    job = Job(app_work.wait_for_another, str(pipe))
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as held:
        assert select.select([held], [], [], 60.0)[0]
        assert held.read(1) == b"\n"  # what the work waits for has begun
        job.stop()
        assert select.select([held], [], [], 10.0)[0]
        assert held.read(1) == b""  # nobody holds the other end any more
    assert messages(job) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("--lr must be positive", "Lr must be positive."),
        ("two\n lines", "Two lines."),
        ("done.", "Done."),
    ],
)
def test_as_sentence(text: str, sentence: str) -> None:
    assert as_sentence(ValueError(text)) == sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(2, "Not there", "f"), "'f': Not there."),
        (PermissionError(13, "Not yours", "f", None, "g"), "'f' -> 'g': Not yours."),
        (OSError("no number"), "No number."),
    ],
)
def test_a_sentence_of_a_file_names_it(error: OSError, sentence: str) -> None:
    assert as_sentence(error) == sentence
