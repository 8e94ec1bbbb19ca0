"""Opens a bundle in a headless Chromium, and waits for what its page reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from actserve.core.errors import RuntimeFailure, UsageError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
REPORT = "/report"
LIMIT_S = 120.0
LARGEST_REPORT_BYTES = 1 << 16


def report(folder: Path, query: str = "") -> dict[str, Any]:
    """Open the bundle in `folder` -> the report of its page. Raises `UsageError` or `RuntimeFailure`."""
    browser = executable()
    if browser is None:
        raise UsageError(f"expected a browser to verify the bundle in: {', '.join(NAMES)}; none is installed")
    with served(folder) as (url, reports), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *OPTIONS, f"--user-data-dir={profile}", f"{url}/?report={REPORT}&{query}"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return reports.get(timeout=LIMIT_S)
        except Empty:
            raise RuntimeFailure(f"expected a report of the page within {LIMIT_S:g} s; none came") from None
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its helpers, too, which write into the profile
            process.wait()


def executable() -> str | None:
    """The path of a browser that is installed."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, SimpleQueue[dict[str, Any]]]]:
    """Serve the folder on the loopback interface -> (its URL, the reports posted to it). Its pages may use threads."""
    reports: SimpleQueue[dict[str, Any]] = SimpleQueue()

    class Handler(SimpleHTTPRequestHandler):
        def guess_type(self, path: Any) -> str:
            return "text/javascript" if str(path).endswith(".mjs") else super().guess_type(path)

        def end_headers(self) -> None:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            super().end_headers()

        def do_POST(self) -> None:
            body = self.rfile.read(min(int(self.headers["Content-Length"]), LARGEST_REPORT_BYTES))
            reports.put(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", reports
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
