"""The server of `ssm-fast app`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ssm_fast.app import jobs
from ssm_fast.app.loading import LARGEST_UPLOAD
from ssm_fast.app.visitors import Visitors
from ssm_fast.cli.messages import check_option, say
from ssm_fast.cli.options import App

if TYPE_CHECKING:
    import gradio as gr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOCAL = ("127.0.0.1", "localhost", "::1")


def run_app(options: App) -> None:
    """Serves the app until Ctrl-C or a SIGTERM.

    Raises:
        ValueError: The port is out of range.
        OSError: The address is taken, or not one of this machine.
        ModuleNotFoundError: Gradio or what draws the videos is not installed.
    """
    check_option("port", options.port, 1, 65535)
    _check_address(options.host, options.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="ssm-fast-app-") as folder:
        # Gradio reads these when it is imported. What it keeps of the visitors' files goes with ours.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "gradio")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import imageio_ffmpeg  # noqa: F401 (missing, it is to be said now and not at the first film)

        from ssm_fast.app.layout import build

        visitors = Visitors(Path(folder) / "visitors")
        blocks = build(visitors)
        try:
            _launch(blocks, options)
            with contextlib.suppress(KeyboardInterrupt):
                say(
                    f"the app is at http://{options.host}:{options.port} (Ctrl-C or SIGTERM ends it)"
                )
                if options.host not in _LOCAL:
                    sys.stderr.write("ssm-fast: whoever reaches this address can use the app\n")
                jobs.prepare()
                threading.Event().wait()
        finally:
            visitors.close()
            blocks.close(verbose=False)


def _launch(blocks: gr.Blocks, options: App) -> None:
    """Serves in threads, without telemetry, share links and what else calls out."""
    from starlette.middleware import Middleware

    from ssm_fast.app.layout import CSS, SCRIPT, theme

    blocks.launch(
        server_name=options.host,
        server_port=options.port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        max_file_size=LARGEST_UPLOAD,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        footer_links=[],
        theme=theme(),
        css=CSS,
        app_kwargs={"middleware": [Middleware(_WithScript, script=SCRIPT.encode())]},
    )


class _WithScript:
    """Puts a script before all others of the page; what Gradio takes as `head` comes after its own."""

    def __init__(self, app: ASGIApp, script: bytes) -> None:
        self._app = app
        self._script = script

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            await self._app(scope, receive, send)
            return

        async def send_with_script(message: Message) -> None:
            if message["type"] == "http.response.start":  # its length is another one
                headers = [(k, v) for k, v in message["headers"] if k != b"content-length"]
                message = {**message, "headers": headers}
            elif b"<head>" in message.get("body", b""):
                body = message["body"].replace(b"<head>", b"<head>" + self._script, 1)
                message = {**message, "body": body}
            await send(message)

        await self._app(scope, receive, send_with_script)


def _check_address(host: str, port: int) -> None:
    """Says that an address cannot be had before all the imports, and not after them."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port} ({error.strerror or error})") from error
