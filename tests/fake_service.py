"""A service of a few lines that answers as it is told: for the tests of what calls one."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvloop

SIGNATURE: dict[str, Any] = {
    "observations": [{"name": "pixels", "dtype": "uint8", "shape": [4, 3]}],
    "outputs": [{"name": "action", "dtype": "int64", "shape": []}],
    "max_batch": 8,
}
Answer = tuple[int, Any]  # status, JSON


def act(body: bytes) -> Answer:
    """Like a policy: the same observation, the same action; items back to back, a list of actions."""
    items = [body[start : start + 12] for start in range(0, len(body), 12)]
    actions = [sum(item) % 6 for item in items]
    return 200, {"action": actions if len(items) > 1 else actions[0]}


@dataclass
class FakeService:
    """Its answers and the requests that it got. The fields may be changed while it runs."""

    signature: dict[str, Any] = field(default_factory=lambda: SIGNATURE)
    environment: dict[str, Any] | None = None
    act: Callable[[bytes], Answer] = act
    stall_s: Callable[[int], float] = lambda _number: 0.0  # before the answer to the number-th `/act`
    closes_after: int | None = None  # requests, then it drops the connection without a word
    says_close: bool = False  # with every answer
    connections: int = 0
    acts: int = 0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)  # of `/act`
    url: str = ""
    uds: str | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        answered = 0
        try:
            while self.closes_after is None or answered < self.closes_after:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.requests.append((method, path, headers))
                status, document = await self._answer(path, body)
                content = document if isinstance(document, bytes) else json.dumps(document).encode()
                close = "Connection: close\r\n" if self.says_close else ""
                writer.write(f"HTTP/1.1 {status} X\r\n{close}Content-Length: {len(content)}\r\n\r\n".encode() + content)
                answered += 1
                if self.says_close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes) -> Answer:
        if path == "/policies":
            return 200, {"default": "fake", "policies": [{"name": "fake", "version": 3, "runtime": "onnx"}]}
        if path == "/policies/fake":
            manifest = {"signature": self.signature, "environment": self.environment}
            return 200, {"name": "fake", "version": 3, "runtime": "onnx", "reason": "so told", "manifest": manifest}
        if path == "/policies/fake/act":
            self.acts += 1
            self.bodies.append(body)
            await asyncio.sleep(self.stall_s(self.acts))
            return self.act(body)
        message = f"no policy for {path}"
        return 404, {"error": {"code": "unknown_policy", "message": message, "detail": {}}}


@contextmanager
def running(service: FakeService) -> Iterator[FakeService]:
    """Serve on a free port of 127.0.0.1, or on `service.uds`, from a thread, until the block ends."""
    started, loop = threading.Event(), uvloop.new_event_loop()  # which closes every connection with itself
    stop = asyncio.Event()

    async def main() -> None:
        if service.uds is not None:
            server = await asyncio.start_unix_server(service.serve, service.uds)
            service.url = "http://fake"
        else:
            server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
            service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await stop.wait()
        server.close()

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(5)
    try:
        yield service
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
