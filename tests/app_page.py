"""The app as it is served to Chromium: for its tests, and for the pictures of docs/app.md."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 120_000  # milliseconds; seconds suffice where nothing else is at work
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@dataclass(frozen=True)
class Server:
    port: int
    folder: Path  # where it keeps its files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def visitors(self) -> set[str]:
        return {path.name for path in self.folder.glob("ssm-fast-app-*/visitors/*")}


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """The app at a free port, with its files in `folder`; not in that of the sources, which have no compiled module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ssm_fast", "app", "--port", str(port)]
    torch_cache = str(folder / "torch")
    env = os.environ | {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": torch_cache}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        assert process.stdout is not None
        try:
            assert f"the app is at http://127.0.0.1:{port}" in process.stdout.readline()
            yield Server(port, folder)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def status(page: Page) -> Any:
    """The status line of the open tab."""
    return page.locator(".status:visible").first


def expect_status(page: Page, text: str) -> None:
    expect(status(page)).to_contain_text(re.compile(text), timeout=PATIENCE)


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def load_pretrained(page: Page, name: str) -> None:
    """Takes a policy that comes with the package."""
    open_tab(page, "Load")
    page.get_by_role("radio", name=name).click()
    page.get_by_role("button", name="Load the pretrained policy").click()
    expect_status(page, "^Loaded ")
