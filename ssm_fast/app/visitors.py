"""What each visitor has: a folder, policies, and the work that is under way."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_fast.app.jobs import Job
from ssm_fast.checkpoint import load_checkpoint, load_inner_rates

_LONGEST_FILE_NAME = 80
_LONGEST_ABSENCE = 86400.0  # seconds without a sign of life


@dataclass(frozen=True)
class StoredPolicy:
    """A policy that a visitor has trained, loaded or adapted.

    Attributes:
        name: Under which the visitor finds it.
        path: Its file, which is never changed.
        model: Class of the model.
        parameters: How many it has.
        env_id: The environment that it was trained in.
        task: The task that it was adapted to, a value of `adapting.task_choices`.
        has_steps: Whether it has learnt gradient steps, as meta_rl trains it to.
        is_adapted: Whether it is the outcome of an adaptation, and not of a training.
    """

    name: str
    path: Path
    model: str
    parameters: int
    env_id: str
    task: str = ""
    has_steps: bool = False
    is_adapted: bool = False


class Visitor:
    """One visitor. The folder, its policies and its work are nobody else's.

    Args:
        folder: Made here, removed by `leave`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policies: dict[str, StoredPolicy] = {}
        self._undownloaded: set[str] = set()  # of the policies that were made here
        self.last_seen = time.monotonic()
        self._jobs: dict[str, Job] = {}
        self._dropped: set[str] = set()  # kinds of work that were stopped before they began
        self._lock = threading.Lock()
        self._folders = 0
        self._is_gone = False
        folder.mkdir(parents=True)

    def new_folder(self, kind: str) -> Path:
        """An empty folder of the visitor's."""
        with self._lock:
            self._folders += 1
            folder = self.folder / f"{kind}-{self._folders}"
        folder.mkdir()
        return folder

    # Work

    def announce(self, kind: str) -> None:
        """Work of a kind is to start when its turn comes."""
        self._dropped.discard(kind)

    def start(
        self,
        kind: str,
        work: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
    ) -> Job | None:
        """Starts work in a process; None where it was stopped while it waited for its turn.

        Raises:
            ValueError: There is work of that kind under way, or the visitor has left.
        """
        with self._lock:
            if self._is_gone:
                raise ValueError("the visit is over")
            if kind in self._jobs:
                raise ValueError(f"{kind} is under way already: stop it first")
            if kind in self._dropped:
                self._dropped.discard(kind)
                return None
            self._jobs[kind] = Job(work, *arguments, environment=environment)
            return self._jobs[kind]

    def end(self, kind: str) -> None:
        """Stops work of a kind, and makes place for the next."""
        with self._lock:
            job = self._jobs.pop(kind, None)
            self.last_seen = time.monotonic()
        if job is not None:
            job.stop()

    def stop(self, kind: str) -> bool:
        """Stops work of a kind, or keeps it from starting; says whether it had started."""
        with self._lock:
            job = self._jobs.get(kind)
            if job is None:
                self._dropped.add(kind)
        if job is not None:
            job.stop()
        return job is not None

    @property
    def is_busy(self) -> bool:
        """Whether there is work under way."""
        return bool(self._jobs)

    def leave(self) -> None:
        """Stops all work and removes the folder."""
        with self._lock:
            self._is_gone = True
            jobs = list(self._jobs.values())
        for job in jobs:
            job.stop()
        self.policies.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Policies

    def add_policy(
        self,
        source: Path,
        name: str,
        env_id: str,
        *,
        task: str = "",
        is_new: bool = False,
    ) -> StoredPolicy:
        """Copies a checkpoint, checked, to the visitor's policies.

        Args:
            source: The checkpoint.
            name: Under which the visitor is to find it; a number is added where it is taken.
            env_id: See `StoredPolicy`.
            task: See `StoredPolicy`.
            is_new: It was trained or adapted here: until it is downloaded, this is the only copy.

        Raises:
            ValueError: It is not a sound checkpoint.
        """
        model, metadata = load_checkpoint(source)
        has_steps = bool(load_inner_rates(source))
        file_name = re.sub(r"[^\w.-]+", "-", name).strip("-")[:_LONGEST_FILE_NAME]
        path = self.new_folder("policy") / f"{file_name}.safetensors"
        shutil.copyfile(source, path)
        size = sum(p.numel() for p in model.parameters())
        with self._lock:
            chosen, n = name, 1
            while chosen in self.policies:
                n += 1
                chosen = f"{name} #{n}"
            policy = StoredPolicy(
                *(chosen, path, type(model).__name__, size, env_id, task),
                has_steps=has_steps,
                is_adapted="adapted" in metadata,
            )
            self.policies[chosen] = policy
            if is_new:
                self._undownloaded.add(chosen)
        return policy

    def downloaded(self, name: str | None) -> None:
        """The visitor has a copy of the policy of that name."""
        self._undownloaded.discard(name or "")

    @property
    def would_lose(self) -> bool:
        """Whether work or a policy would be gone with the page."""
        return self.is_busy or bool(self._undownloaded)

    def policy(self, name: str | None) -> StoredPolicy:
        """The policy of that name.

        Raises:
            ValueError: None is chosen, or there is none of that name.
        """
        if not name:
            raise ValueError("there is no policy yet: train one or load one first")
        if name not in self.policies:
            raise ValueError(
                f"{name!r} is not here any more, as after a lost connection: train or load it again"
            )
        return self.policies[name]


class Visitors:
    """All visitors, by the key of their session.

    Args:
        folder: Where their folders are made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._visitors: dict[str, Visitor] = {}
        self._lock = threading.Lock()
        self._count = 0

    def of(self, session: str) -> Visitor:
        """The visitor of a session, a new one at the first call."""
        with self._lock:
            if session not in self._visitors:
                self._forget_the_absent()
                self._count += 1
                self._visitors[session] = Visitor(self._folder / f"visitor-{self._count}")
            visitor = self._visitors[session]
            visitor.last_seen = time.monotonic()
            return visitor

    def leave(self, session: str) -> None:
        """The visitor closed the page: nothing of theirs stays but what Gradio copied for it."""
        with self._lock:
            visitor = self._visitors.pop(session, None)
        if visitor is not None:
            visitor.leave()

    def close(self) -> None:
        """Everybody leaves."""
        for session in list(self._visitors):
            self.leave(session)

    def _forget_the_absent(self) -> None:
        """Those who have done nothing for a day: their page was closed without a word."""
        now = time.monotonic()
        for session, visitor in list(self._visitors.items()):
            if not visitor.is_busy and now - visitor.last_seen > _LONGEST_ABSENCE:
                del self._visitors[session]
                visitor.leave()
