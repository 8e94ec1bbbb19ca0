"""A headless Chromium for the tests of the page: the system's own, driven by Playwright."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from actserve.bundles.browser.chromium import NAMES, executable

PATH = executable()
WITHIN_MS = 120_000  # a bound for what never happens

# In CI a missing browser is a failure.
needs_chromium = pytest.mark.skipif(
    PATH is None and not os.environ.get("CI"), reason="the tests of the page need Chromium: apt-get install chromium"
)


class Visit:
    """`complaints` has every console error and warning, and every uncaught exception; `requested` has every URL."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requested: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("websocket", lambda socket: self.requested.append(socket.url))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.complaints.append(f"{message.type}: {message.text}")


@contextmanager
def chromium() -> Iterator[Browser]:
    assert PATH is not None, f"none of {', '.join(NAMES)} is on PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, **options: Any) -> Iterator[Visit]:
    """A page in a context of its own. `options`: of Playwright's `new_context`."""
    with browser.new_context(**options) as context:
        context.set_default_timeout(WITHIN_MS)
        yield Visit(context.new_page())
