"""A stateless policy of a few lines of numpy behind a real uvicorn, with the fast path or without.

Its items are tiny, so that a request can be cut at every byte, or as large as a policy's of the Atari games.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from actserve.core.settings import Settings
from actserve.core.signature import Array, Noise, Parameter, Signature, TensorSpec
from actserve.engine.arena import Arena
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.preflight import Choice
from actserve.server.access.tokens import Access
from actserve.server.admission import Admission
from actserve.server.fastpath.fast_path import FastPath
from actserve.server.http import act, health, policies, security
from actserve.server.http import error_responses as errors
from actserve.server.sessions import SessionLimits, Sessions
from actserve.store.artifact import Artifact, Manifest
from actserve.store.local import ModelStore
from tests.fake_policy import QUICK, SLOW
from tests.serving import port_of, serving
from tests.waiting import until

FAST = "fast path"
PLAIN = "httptools"
NAME = "tiny"
SIGNATURE = Signature(
    observations=(TensorSpec("pixels", "uint8", (4, 3)),),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("value", "float32", (2,))),
    max_batch=8,
)
ITEM_BYTES = 12


# ε-greedy, deterministic by default: parameters and noise come beside the pixels.
SCREENS = Signature(
    observations=(TensorSpec("pixels", "uint8", (210, 160, 3)),),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("value", "float32", (2,))),
    max_batch=64,
    exploration=("deterministic", "random"),
    parameters=(Parameter("epsilon", 0.1, 0.0, 1.0),),
    noise=(Noise(TensorSpec("u", "float32", (2,)), "uniform"),),
)


class SumRuntime(Runtime):
    """The action is the sum of the bytes, modulo 5; a first byte of 255 makes it fail. It waits for `gate`."""

    def __init__(self, signature: Signature = SIGNATURE) -> None:
        super().__init__(signature)
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    @classmethod
    def load(cls, artifact: Artifact, threads: int, shared: Path | None = None) -> SumRuntime:
        return cls()

    def _run(self, arrays: list[Array]) -> list[Array]:
        assert self.gate.wait(60)
        pixels, *_ = arrays
        self.sizes.append(len(pixels))
        if (pixels.reshape(len(pixels), -1)[:, 0] == 255).any():
            raise ValueError("told to fail")
        total = pixels.reshape(len(pixels), -1).sum(1, dtype=np.int64)
        return [total % 5, np.stack([total, -total], 1).astype(np.float32)]

    def close(self) -> None:
        pass


class OnePolicy(Registry):
    def __init__(self, settings: Settings, slow: bool, signature: Signature = SIGNATURE) -> None:
        super().__init__(ModelStore(Path("nowhere")), settings)
        self.runtime = SumRuntime(signature)
        self.tuning = SLOW if slow else QUICK
        self.settings = settings

    loading = False

    def go_live(self) -> None:
        manifest = Manifest(1, NAME, 1, None, "", self.runtime.signature, None, {}, {}, {}, {})
        policy = Policy(
            Artifact(Path("nowhere"), manifest), self.runtime, Choice("onnx", ""), self.tuning, self.settings
        )
        policy.batcher.meters = self.counts.meters(policy.program)
        if self.recorder is not None:
            policy.recorder = self.recorder.of(policy.artifact, "onnx")
        policy.start()
        self._live[NAME] = policy
        self.generation += 1

    async def close(self) -> None:
        await self._live[NAME].close()


@dataclass(frozen=True)
class Service:
    http: str
    port: int
    server: uvicorn.Server
    registry: OnePolicy
    requests: list[str] = field(default_factory=list)  # that came to the routes

    def connect(self) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    @property
    def policy(self) -> Policy:
        return self.registry._live[NAME]


@contextmanager
def running(
    http: str,
    settings: Settings | None = None,
    slow: bool = False,
    traced: bool = False,
    signature: Signature = SIGNATURE,
    **options: Any,
) -> Iterator[Service]:
    registry = OnePolicy(settings or Settings(), slow, signature)
    requests: list[str] = []
    admission = Admission(registry.settings, Access(registry.settings.tokens) if registry.settings.tokens else None)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        registry.go_live()
        with (
            tempfile.TemporaryDirectory() as folder,
            Sessions(Path(folder) / "sessions.sqlite", SessionLimits(), admission=admission) as held,
        ):
            app.state.sessions = held
            async with FastPath(registry, admission, held, registry.settings, traced) as fast_path:
                yield {"fast_path": fast_path}
            await registry.close()

    app = FastAPI(lifespan=lifespan)
    app.state.settings, app.state.registry, app.state.admission = registry.settings, registry, admission
    app.state.act_bodies = []

    @app.middleware("http")
    async def remember(request: Any, call_next: Any) -> Any:
        requests.append(f"{request.method} {request.url.path}")
        return await call_next(request)

    errors.install(app)
    security.install(app, admission, registry.settings)
    for routes in (act, policies, health):
        app.include_router(routes.router)
    protocol = {} if http == FAST else {"http": http}
    with serving(app, server_header=False, date_header=False, **protocol, **options) as server:
        try:
            yield Service(http, port_of(server), server, registry, requests)
        finally:
            registry.runtime.gate.set()


def take_rows(arena: Arena) -> list[int]:
    """All that are free, until they are released."""
    return [row for row in (arena.acquire() for _ in range(arena.free)) if row is not None]


@contextmanager
def overloaded(service: Service, connect: Callable[[], socket.socket] | None = None) -> Iterator[None]:
    """A service with `max_waiting=1` refuses all that comes meanwhile: no row is free, and one request waits for one.
    That is answered in the end."""
    arena = service.policy.batcher.arena
    assert arena is not None
    taken = take_rows(arena)
    with (connect or service.connect)() as waiting:
        waiting.sendall(request())
        until(lambda: len(arena.waiting) == 1)
        yield
        for row in taken:
            arena.release(row)
        assert b"200 OK" in waiting.recv(1000)


def request(
    body: bytes = bytes(ITEM_BYTES), path: str = "/act", headers: Sequence[str] = (), length: str | None = None
) -> bytes:
    """The request of a correct client."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: here",
        "Content-Type: application/octet-stream",
        f"Content-Length: {len(body) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def exchange(service: Service, pieces: list[bytes], pause_s: float = 0.0) -> bytes:
    """Everything that is answered until the service closes or, all being sent, says nothing for a while.

    On a busy host a while is not enough: the service must have answered another client meanwhile.
    """
    answer = b""
    silent = False
    with service.connect() as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
        except OSError:  # it has closed
            pass
        connection.settimeout(0.05)
        while True:
            try:
                data = connection.recv(1 << 16)
            except TimeoutError:
                if silent:
                    break
                silent = True
                _ask_otherwise(service)
                continue
            except ConnectionResetError:
                break
            if not data:
                break
            answer += data
            silent = False
    return answer


def _ask_otherwise(service: Service) -> None:
    """Wait until the service has answered or refused another client, whose request no route sees: it is none."""
    with service.connect() as connection, suppress(ConnectionResetError):
        connection.sendall(b"nonsense\r\n\r\n")
        while connection.recv(1 << 16):
            pass
