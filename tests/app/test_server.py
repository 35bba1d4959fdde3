"""The app as it is served, and as a visitor sees it in Chromium."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_page import (
    CHROMIUM,
    FLAGS,
    PATIENCE,
    Server,
    expect_status,
    load_pretrained,
    open_tab,
    serve,
    status,
)
from playwright.sync_api import Browser, Page, expect, sync_playwright

import ssm_fast
from ssm_fast import cli
from ssm_fast.app.loading import LARGEST_UPLOAD

pytestmark = [pytest.mark.isa_independent, pytest.mark.timeout(1200)]

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serve(folder) as server:
        yield server
    left = {path.name for path in folder.iterdir()}
    assert left <= {"torch"}  # nothing of the visitors


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(server: Server, browser: Browser) -> Iterator[Callable[[], Page]]:
    """Opens the app as a new visitor."""
    contexts = []

    def visit() -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        page.get_by_role("tab", name="Train").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


def upload(page: Page, path: Path) -> None:
    open_tab(page, "Load")
    page.locator("input[type=file][accept='.safetensors']").set_input_files(path)


def policy_in_hand(page: Page) -> Any:
    return page.locator("#policy input")


def test_it_listens_here_alone_and_calls_nobody(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}config") as answer:
        config = answer.read().decode()
    assert '"analytics_enabled":false' in config.replace(" ", "")
    listening = Path("/proc/net/tcp")
    if listening.exists():
        local = f"0100007F:{server.port:04X}"
        rows = [line.split() for line in listening.read_text().splitlines()[1:]]
        assert [row[1] for row in rows if row[3] == "0A" and row[1].endswith(local[-5:])] == [local]


def test_a_taken_port_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["app", "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"ssm-fast: cannot listen at 127.0.0.1:{port} (")
    assert cli.main(["app", "--port", "70000"]) == 2
    assert "--port must be at most 65535, got 70000" in capsys.readouterr().err


def test_without_gradio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # and back again after the test
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert cli.main(["app", "--port", str(port)]) == 2
    assert capsys.readouterr().err == "ssm-fast: gradio is missing: pip install 'ssm_fast[app]'\n"


def test_a_visit(visit: Callable[[], Page], tmp_path: Path) -> None:
    page = visit()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else 0
    )
    page.reload()

    # Train: the curve moves; a stop ends it.
    page.get_by_role("spinbutton", name="Environment steps").fill("1000000")
    page.locator("#train-start").click()
    points = page.locator('[aria-roledescription="point"]')
    expect(points.nth(0)).to_be_attached(timeout=PATIENCE)
    before = points.count()
    expect(points.nth(before)).to_be_attached(timeout=PATIENCE)  # one more than there were
    expect(status(page)).to_contain_text(re.compile(r"of 1,000,000 steps, return \d"))
    began = time.monotonic()
    page.locator("#train-stop").click()
    expect_status(page, "^Stopped")
    assert time.monotonic() - began < 20.0  # half a second where nothing else is at work
    expect(policy_in_hand(page)).to_have_value("improved CartPole-v1")
    expect(page.locator("#train-start")).to_be_enabled()
    expect(page.locator("#train-stop")).to_be_disabled()

    # Download: what comes is a policy.
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "improved-CartPole-v1.safetensors"
    download.value.save_as(tmp_path / "downloaded.safetensors")
    action, _ = ssm_fast.load_policy(tmp_path / "downloaded.safetensors").predict(np.zeros(4))
    assert action in (0, 1)

    # Adapt, to a held-out task.
    open_tab(page, "Adapt")
    page.locator("#adapt-task input").click()
    page.get_by_role("option", name="test task 2:").click()
    page.get_by_role("button", name="More options").locator("visible=true").click()
    expect(page.get_by_role("spinbutton", name="Steps between updates")).to_have_value("100")
    page.get_by_role("spinbutton", name="Episodes").fill("2")
    page.get_by_role("spinbutton", name="Copies of the task").fill("1")
    page.locator("#adapt-start").click()
    expect_status(page, "^Adapted to test task 2. Deterministic return ")
    for text in ("episode 2", "deterministic, before and after"):
        expect(page.get_by_text(text, exact=True).locator("visible=true").first).to_be_visible()
    expect(policy_in_hand(page)).to_have_value(
        "improved CartPole-v1"
    )  # stays until another is taken
    page.locator("#take").click()
    expect(policy_in_hand(page)).to_have_value("improved CartPole-v1, test_time in test task 2")

    # Watch: the video plays.
    open_tab(page, "Watch")
    page.locator("#watch-start").click()
    expect_status(page, "^Return ")
    page.wait_for_function(
        "() => { const v = document.querySelector('video');"
        " return v && v.readyState >= 2 && v.duration > 0.1 && v.videoWidth === 600 && !v.error }"
    )

    # Kernels.
    open_tab(page, "Kernels")
    page.locator("#measure-start").click()
    expect_status(page, "^Medians of alternating rounds")
    expect(page.get_by_text("SSM layer, forward and backward").first).to_be_visible()

    # Another policy: its own gradient steps are offered, and the film of the one before is gone.
    load_pretrained(page, "cartpole-family")
    open_tab(page, "Adapt")
    expect(page.locator("input[value=gradient]")).to_be_checked()
    open_tab(page, "Watch")
    expect_status(page, "^No film of this policy yet")
    expect(page.locator("video")).to_have_count(0)

    assert all(url.startswith((page.url, "data:", "blob:")) for url in requests), requests
    assert not errors


def test_the_settings_of_an_environment(visit: Callable[[], Page]) -> None:
    page = visit()
    amount = page.locator("#amount")
    expect(amount).to_contain_text("no preset for this environment")
    page.locator("#environment input").click()
    page.get_by_role("option", name="HalfCheetah-v5").click()
    expect(amount).to_contain_text("preset halfcheetah-v5, measured with 1,000,000 steps")
    expect(amount.get_by_role("spinbutton")).to_have_value("300000")
    page.get_by_role("button", name="More options").click()
    expect(page.get_by_role("spinbutton", name="Discount factor")).to_have_value("0.98")
    page.get_by_role("radio", name="meta_rl").click()
    expect(amount).to_contain_text("preset cartpole-family, measured with 20 epochs")
    expect(amount.get_by_role("spinbutton", name="Epochs")).to_have_value("20")
    expect(page.get_by_role("spinbutton", name="Gradient steps in a task")).to_have_value("2")


def test_an_error_goes_with_what_it_was_about(
    visit: Callable[[], Page], save_policy: Save, tmp_path: Path
) -> None:
    page = visit()
    steps = page.get_by_role("spinbutton", name="Environment steps")
    steps.fill("")
    page.locator("#train-start").click()
    expect_status(page, "^The field 'Environment steps' is empty: type a number")
    steps.fill("0")
    expect_status(page, "^Nothing is training")
    page.locator("#train-start").click()
    expect_status(page, "^Environment steps must be at least 1, got 0")
    page.get_by_role("radio", name="policy_gradient").click()
    expect_status(page, "^Nothing is training")

    open_tab(page, "Watch")
    page.locator("#watch-start").click()
    expect_status(page, "^There is no policy yet")
    open_tab(page, "Adapt")
    page.locator("#adapt-start").click()
    expect_status(page, "^There is no policy yet")

    (tmp_path / "garbage.safetensors").write_bytes(b"\x00" * 100)
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.truncate(LARGEST_UPLOAD + 1)
    upload(page, tmp_path / "garbage.safetensors")
    expect_status(page, "^The file garbage.safetensors: ")
    page.get_by_role("button", name="Clear").click()
    expect_status(page, "^A file is checked before it is used")
    upload(page, tmp_path / "large.safetensors")
    expect(page.get_by_text("large.safetensors").first).to_be_visible()
    expect_status(page, "^A file is checked before it is used")

    page.reload()
    upload(page, save_policy("mine.safetensors", env_id="CartPole-v1"))
    expect_status(page, "^Loaded mine")
    open_tab(page, "Adapt")
    expect_status(page, "^Nothing is adapting")


def test_what_a_reload_would_lose(visit: Callable[[], Page], tmp_path: Path) -> None:
    page = visit()
    asked: list[str] = []

    def stay(dialog: Any) -> None:
        asked.append(dialog.type)
        dialog.dismiss()

    page.on("dialog", stay)

    def reload(is_asked_first: bool) -> None:
        asked.clear()
        page.evaluate("window.stayed = true; setTimeout(() => location.reload(), 0)")
        if not is_asked_first:
            page.wait_for_function("window.stayed === undefined")
            page.get_by_role("tab", name="Train").wait_for()
            assert not asked
            return
        deadline = time.monotonic() + PATIENCE / 1e3
        while not asked:
            assert time.monotonic() < deadline
            page.wait_for_timeout(50)
        assert asked == ["beforeunload"]
        assert page.evaluate("window.stayed")

    reload(is_asked_first=False)
    page.get_by_role("spinbutton", name="Environment steps").fill("1000000")
    page.locator("#train-start").click()
    expect_status(page, r"of 1,000,000 steps, return \d")
    reload(is_asked_first=True)
    page.locator("#train-stop").click()  # it went on
    expect_status(page, r"^Stopped. .* of 1,000,000 steps")
    expect(page.locator("#train-start")).to_be_enabled()
    reload(is_asked_first=True)  # the page has the only copy of the policy
    with page.expect_download():
        page.locator("#download").click()
    expect(page.locator("[data-would-lose]")).to_have_count(0)
    reload(is_asked_first=False)


def test_an_upload(visit: Callable[[], Page], save_policy: Save, tmp_path: Path) -> None:
    page = visit()
    (tmp_path / "garbage.safetensors").write_bytes(b"\x00" * 100)
    upload(page, tmp_path / "garbage.safetensors")
    expect_status(page, "^The file garbage.safetensors: ")
    expect(page.get_by_role("alert")).to_be_visible()

    page.reload()
    upload(page, save_policy("import.safetensors", env_id="antigravity:CartPole-v1"))
    expect_status(page, "which imports a module")

    page.reload()
    upload(page, save_policy("<img src=x onerror=alert(1)>.safetensors", env_id="CartPole-v1"))
    expect_status(page, "^Loaded ")
    assert page.locator("img[src=x]").count() == 0

    page.reload()
    (tmp_path / "policy.pt").write_bytes(b"PK\x03\x04")
    upload(page, tmp_path / "policy.pt")
    expect(page.get_by_text("Invalid file type", exact=False).first).to_be_visible()
    expect(policy_in_hand(page)).to_have_value("")

    open_tab(page, "Watch")
    page.locator("#watch-start").click()
    expect_status(page, "^There is no policy yet: train one or load one first")


def test_two_visitors(server: Server, visit: Callable[[], Page], save_policy: Save) -> None:
    before = server.visitors()
    one, other = visit(), visit()
    upload(one, save_policy("secret.safetensors", env_id="CartPole-v1"))
    expect(policy_in_hand(one)).to_have_value("secret")
    upload(other, save_policy("mine.safetensors", env_id="CartPole-v1"))
    expect(policy_in_hand(other)).to_have_value("mine")
    policy_in_hand(other).click()
    expect(other.get_by_role("option")).to_have_text([re.compile("mine")])
    assert len(server.visitors() - before) == 2
    one.close()
    deadline = time.monotonic() + PATIENCE / 1e3
    while len(server.visitors() - before) > 1:  # who leaves leaves nothing
        assert time.monotonic() < deadline
        time.sleep(0.2)
