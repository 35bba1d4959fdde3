"""Takes the pictures of the web app: `python docs/site/app_pictures.py`, in an environment with `.[dev]` and Chromium."""

from __future__ import annotations

import io
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

IMAGES = Path(__file__).parents[1] / "images"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE = 120_000  # milliseconds


def main() -> None:
    """Serves the app and takes a picture of each tab while it shows something."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("needs Chromium: apt-get install chromium")
    with serve() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 950})
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        train(page)
        adapt(page)
        watch(page)
        browser.close()


@contextmanager
def serve() -> Iterator[str]:
    """The app at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ssm_fast", "app", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it listens
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()


def train(page: Page) -> None:
    """A training of CartPole at about two thirds."""
    page.get_by_role("spinbutton", name="Environment steps").fill("50000")
    page.locator("#train-start").click()
    await_status(page, r"^3\d,\d+ of 50,000 steps")
    save(page, "app-train.png")
    page.locator("#train-stop").click()
    await_status(page, r"^Stopped")


def adapt(page: Page) -> None:
    """The gradient steps of a pretrained policy in a task that its training has not seen."""
    load(page, "halfcheetah-dir")
    page.get_by_role("tab", name="Adapt").click()
    page.locator("input[value=gradient]").click()
    page.locator("#adapt-task input").click()
    page.get_by_role("option", name="test task 1:").click()
    page.locator("#adapt-start").click()
    await_status(page, r"^Adapted")
    save(page, "app-adapt.png")


def watch(page: Page) -> None:
    """HalfCheetah at the end of its film."""
    load(page, "halfcheetah-v5")
    page.get_by_role("tab", name="Watch").click()
    page.locator("#watch-start").click()
    await_status(page, r"^Return")
    page.wait_for_function("() => document.querySelector('video')?.readyState >= 2")
    page.wait_for_timeout(3000)  # past the start
    save(page, "app-watch.png")


def load(page: Page, name: str) -> None:
    """Takes a policy that comes with the package."""
    page.get_by_role("tab", name="Load").click()
    page.get_by_role("radio", name=name).click()
    page.get_by_role("button", name="Load the pretrained policy").click()
    await_status(page, "^Loaded")


def await_status(page: Page, text: str) -> None:
    """Waits until the status line of the open tab says so."""
    status = page.locator(".status:visible").first
    expect(status).to_contain_text(re.compile(text), timeout=PATIENCE)


def save(page: Page, name: str) -> None:
    """Writes what the page shows, in 128 colours, at the width of a page of the documentation."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    smaller = picture.resize((800, picture.height * 800 // picture.width), Image.Resampling.LANCZOS)
    smaller.quantize(128).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
