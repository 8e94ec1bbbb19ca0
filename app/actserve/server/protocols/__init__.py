"""Protocols: the extension point for the ways in which clients speak to the service.

A protocol is an entry point of the group `actserve.protocols`, in this package or in any other that is installed. It
names a `Protocol`, or a function that returns one. There is no other way in: the streams and the Open Inference
Protocol are on the same point. `docs/protocols.md` has a complete protocol as an example.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol as Interface

from fastapi import APIRouter, Request
from starlette.requests import HTTPConnection
from starlette.responses import Response

from actserve.core.errors import UsageError, one_line
from actserve.core.settings import Settings
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.server.admission import Admission
from actserve.server.fastpath.codec import Resources
from actserve.server.fastpath.endpoint import Endpoint
from actserve.server.regions import Regions
from actserve.server.sessions import Sessions
from actserve.wire.payload import Body

GROUP = "actserve.protocols"
OURS = "actserve"  # the distribution


@dataclass(frozen=True)
class Service:
    """The parts of the running service that a protocol uses. Only `admission` calls a policy."""

    registry: Registry
    admission: Admission
    sessions: Sessions
    settings: Settings
    regions: Regions


class ActBodies(Interface):
    """Bodies of `POST /act` that a protocol recognises by their content."""

    def recognises(self, content_type: str, body: Body) -> bool:
        """Whether `answer` handles this body. Every request to `/act` that does not take the fast path is asked."""

    async def answer(self, request: Request, policy: Policy, version: int | None, body: Body) -> Response:
        """The response. `version` is the one in the URL, if any. Raises an `ActserveError`."""


@dataclass(frozen=True)
class Protocol:
    """The additions of one protocol to the service. `name` is for messages, and unique."""

    name: str
    routers: Sequence[APIRouter] = ()  # HTTP routes and WebSockets
    serving: Callable[[Service], AbstractAsyncContextManager[None]] | None = None  # listeners of its own
    resources: Callable[[Endpoint, Service], Resources] | None = None  # one policy's URLs on the fast path
    act_bodies: ActBodies | None = None
    check: Callable[[Settings], None] | None = None  # before the first worker starts; raises `UsageError`


def service_of(connection: HTTPConnection) -> Service:
    """The service that answers a request or a WebSocket."""
    state = connection.app.state
    return Service(state.registry, state.admission, state.sessions, state.settings, state.regions)


def load() -> list[Protocol]:
    """The protocols of all installed packages, ours first.

    Raises `UsageError` if one cannot be loaded or two have the same name.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: (_package(entry) != OURS, _package(entry), entry.name))
    if not found or _package(found[0]) != OURS:
        raise UsageError(
            f"the installed package {OURS} does not list its own protocols: it is older than its code, or was not "
            f"installed; install it again"
        )
    owners: dict[str, EntryPoint] = {}
    protocols = []
    for entry in found:
        protocol = _load(entry)
        owner = owners.setdefault(protocol.name, entry)
        if owner is not entry:
            raise UsageError(
                f"two protocols have the name {protocol.name!r}, of the packages {_package(owner)} and "
                f"{_package(entry)}; uninstall one of them"
            )
        protocols.append(protocol)
    return protocols


def check(protocols: Iterable[Protocol], settings: Settings) -> None:
    """Check the settings for each protocol. Raises `UsageError`."""
    for protocol in protocols:
        if protocol.check is not None:
            protocol.check(settings)


@asynccontextmanager
async def serving(protocols: Iterable[Protocol], service: Service) -> AsyncIterator[None]:
    """The protocols' own listeners serve during the block."""
    async with AsyncExitStack() as stack:
        for protocol in protocols:
            if protocol.serving is not None:
                await stack.enter_async_context(protocol.serving(service))
        yield


def _load(entry: EntryPoint) -> Protocol:
    what = f"the protocol {entry.name!r} of the package {_package(entry)}"
    try:
        loaded = entry.load()
        protocol = loaded if isinstance(loaded, Protocol) or not callable(loaded) else loaded()
    except Exception as error:  # another package's code may raise anything
        raise UsageError(
            f"{what} cannot be loaded ({entry.value}): {one_line(error)}; update or uninstall it"
        ) from error
    if not isinstance(protocol, Protocol):
        raise UsageError(f"{what} ({entry.value}): expected a Protocol; got {type(protocol).__name__}")
    return protocol


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else ""
