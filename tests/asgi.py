"""An ASGI application in this process, spoken to without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

from fastapi import FastAPI

from tests.waiting import until_in_loop


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]  # by lower-case name
    content: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.content)


class Caller:
    """`with Caller(app) as call`: the application runs its lifespan, and each call is one request."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self._runner = asyncio.Runner()
        self._lifespan = AsyncExitStack()

    def __enter__(self) -> Self:
        self._runner.run(self._lifespan.enter_async_context(self.app.router.lifespan_context(self.app)))
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._lifespan.aclose())
        self._runner.close()

    def __call__(self, method: str, path: str, body: Any = b"", headers: dict[str, str] | None = None) -> Answer:
        """`body`: bytes, or anything that is sent as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._runner.run(self._call(method, path, content, headers or {}))

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let the application run until `condition()` holds."""
        self._runner.run(until_in_loop(condition, 60))

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Something of the application's own."""
        self._runner.run(work)

    async def _call(self, method: str, path: str, content: bytes, headers: dict[str, str]) -> Answer:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        received = [{"type": "http.request", "body": content, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            return received.pop() if received else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start, *rest = sent
        answered = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], answered, b"".join(message.get("body", b"") for message in rest))
