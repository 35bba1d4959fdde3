"""Takes the pictures of the web app: `python tests/app_pictures.py`, in an environment with `.[dev]` and Chromium."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from app_page import (
    CHROMIUM,
    FLAGS,
    PATIENCE,
    expect_status,
    load_pretrained,
    open_tab,
    serve,
)
from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs/images"


def main() -> None:
    """Serves the app and takes a picture of each tab while it shows something."""
    if CHROMIUM is None:
        raise SystemExit("needs Chromium: apt-get install chromium")
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder)) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 950})
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        train(page)
        adapt(page)
        watch(page)
        browser.close()


def train(page: Page) -> None:
    """A training of CartPole at about two thirds."""
    page.get_by_role("spinbutton", name="Environment steps").fill("50000")
    page.locator("#train-start").click()
    expect_status(page, r"^3\d,\d+ of 50,000 steps")
    save(page, "app-train.png")
    page.locator("#train-stop").click()
    expect_status(page, r"^Stopped")


def adapt(page: Page) -> None:
    """The gradient steps of a pretrained policy in a task that its training has not seen."""
    load_pretrained(page, "halfcheetah-dir")
    open_tab(page, "Adapt")
    page.locator("#adapt-task input").click()
    page.get_by_role("option", name="test task 1:").click()
    page.locator("#adapt-start").click()
    expect_status(page, r"^Adapted")
    save(page, "app-adapt.png")


def watch(page: Page) -> None:
    """HalfCheetah, some seconds into its film."""
    load_pretrained(page, "halfcheetah-v5")
    open_tab(page, "Watch")
    page.locator("#watch-start").click()
    expect_status(page, r"^Return")
    page.wait_for_function("() => document.querySelector('video')?.readyState >= 2")
    page.wait_for_timeout(3000)  # past the start
    save(page, "app-watch.png")


def save(page: Page, name: str) -> None:
    """Writes what the page shows, in 128 colours, at the width of a page of the documentation."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    smaller = picture.resize((800, picture.height * 800 // picture.width), Image.Resampling.LANCZOS)
    smaller.quantize(128).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
