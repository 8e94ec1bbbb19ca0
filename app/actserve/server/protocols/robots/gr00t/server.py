"""The ZeroMQ listener. It runs in the event loop of the app. `kill` is not offered.

A request is a map with `endpoint`, `data` and `api_token`. The answer to `get_action` is that of GR00T N1.6 and later
(`[actions, info]`, arrays with axes for the batch and for time) if `data` has an `observation`, else that of N1.5.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import zmq
from zmq.asyncio import Context

from actserve.core.errors import ActserveError, InvalidRequest, MalformedBody, TooManyConnections, Unauthorized
from actserve.core.repeat import repeat
from actserve.engine.policy import Policy
from actserve.server import off_loop
from actserve.server.admission import Ticket
from actserve.server.http import error_responses as errors
from actserve.server.protocols import Service, ports
from actserve.server.protocols.robots.episode import RobotEpisode
from actserve.server.protocols.robots.gr00t.clients import Client, Clients
from actserve.server.protocols.robots.openpi import as_chunk
from actserve.server.protocols.robots.packed import of_gr00t, pack, unpack
from actserve.wire import as_png
from actserve.wire.payload import MANY_BYTES

log = logging.getLogger("actserve")

ROUTE = "get_action"
DRAIN_S = 30.0  # for accepted requests, as with HTTP
LINGER_MS = 1000  # for answers that are not sent yet
SWEEP_EVERY_S = 1.0
RETRY_S = 1.0
ENDPOINTS = ("ping", "get_action", "reset", "get_modality_config")


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[None]:
    """Serve on `gr00t_host` and `gr00t_port`, which other workers may share. On exit, accepted requests are answered.

    Raises `UsageError` if it cannot listen.
    """
    settings = service.settings
    assert settings.gr00t_port is not None
    listener = ports.listen_shared(settings.gr00t_host, settings.gr00t_port, "GR00T's protocol")
    context = Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, service.admission.max_body_bytes)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.IPV6, int(":" in settings.gr00t_host))
    socket.setsockopt(zmq.USE_FD, listener.detach())  # ZeroMQ closes it
    host = f"[{settings.gr00t_host}]" if ":" in settings.gr00t_host else settings.gr00t_host
    socket.bind(f"tcp://{host}:{settings.gr00t_port}")
    log.info("GR00T's protocol on %s:%d", host, settings.gr00t_port)
    server = _Server(service, socket)
    reading = asyncio.create_task(server.read())
    sweeping = asyncio.create_task(repeat(SWEEP_EVERY_S, server.sweep, "ending idle episodes"))
    try:
        yield
    finally:
        for task in (reading, sweeping):
            task.cancel()
        await asyncio.gather(reading, sweeping, return_exceptions=True)
        await server.close()
        socket.close(linger=LINGER_MS)
        await asyncio.to_thread(context.term)


class _Server:
    def __init__(self, service: Service, socket: Any) -> None:
        self._service, self._socket = service, socket
        self._clients = Clients(service.settings.session_idle_s)
        self._answering: set[asyncio.Task[None]] = set()

    async def read(self) -> None:
        """Answer each request in a task of its own."""
        while True:
            try:
                frames = await self._socket.recv_multipart()
            except zmq.ZMQError:
                log.exception("a message to GR00T's port could not be received")
                await asyncio.sleep(RETRY_S)
                continue
            if len(frames) == 3 and not frames[1]:  # others are not of a REQ client, and an answer would have no place
                task = asyncio.create_task(self._answer(frames[0], frames[2]))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

    async def sweep(self) -> None:
        self._clients.sweep()

    async def close(self) -> None:
        """Answer the accepted requests, then free all episodes."""
        if self._answering:
            await asyncio.wait(self._answering, timeout=DRAIN_S)
        self._clients.close()

    async def _answer(self, identity: bytes, message: bytes) -> None:
        try:
            limit = self._service.settings.max_connections
            if len(self._answering) > limit:
                raise TooManyConnections(f"the service takes at most {limit} requests at once on this port")
            with self._service.admission.memory.taken(len(message)):
                answer = await self._handle(identity, message)
        except ActserveError as error:
            self._count(str(errors.status_of(error)), error.code)
            errors.log_if_internal(error)
            told = "Unauthorized: " if isinstance(error, Unauthorized) else ""
            answer = {"error": f"{told}{error.message}", "code": error.code}
        except Exception:
            log.exception("a request to GR00T's port failed")
            self._count("500", "internal")
            answer = {"error": errors.INTERNAL, "code": "internal"}
        await self._socket.send_multipart([identity, b"", pack(answer, of_gr00t)])

    def _count(self, status: str, code: str) -> None:
        registry = self._service.registry
        name = registry.default if registry.default in registry.names else ""
        registry.counts.tally(name or "", "zeromq", ROUTE).add(status, code)

    async def _handle(self, identity: bytes, message: bytes) -> Any:
        request = await off_loop.call(unpack, message, takes_long=len(message) > MANY_BYTES)
        if not isinstance(request, dict):
            raise MalformedBody(f"expected a map in msgpack; got {type(request).__name__}")
        ticket = self._service.admission.open(_authorization(request.get("api_token")))
        client = self._clients.take(identity, ticket.token)
        try:
            return await self._call(identity, client, ticket, request)
        finally:
            self._clients.give_back(identity)

    async def _call(self, identity: bytes, client: Client, ticket: Ticket, request: dict[str, Any]) -> Any:
        endpoint, data = request.get("endpoint", ROUTE), request.get("data")
        if endpoint not in ENDPOINTS:
            raise InvalidRequest(f"expected an endpoint of {', '.join(ENDPOINTS)}; got {endpoint!r}"[:200])
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "get_modality_config":
            return modality_config(await self._service.registry.get())
        if endpoint == "reset":
            self._clients.forgive(identity)
            if client.episode is not None:
                await client.episode.reset()
            return {}
        self._clients.check_alive(identity)
        if client.episode is None:
            client.episode = await RobotEpisode.begin(self._service, transport="zeromq", route=ROUTE, ticket=ticket)
        return await self._act(client.episode, ticket, data)

    async def _act(self, episode: RobotEpisode, ticket: Ticket, data: Any) -> Any:
        if not isinstance(data, dict):
            raise MalformedBody(f"expected data, an observation; got {type(data).__name__}")
        has_axes = data.keys() <= {"observation", "options"}
        if has_axes and data.get("options") and "options" not in self._service.settings.ignored:
            raise InvalidRequest("expected no options, which the policy does not have (`serve --ignore options`)")
        episode.admit(ticket)
        step = await episode.step(data.get("observation") if has_axes else data)
        chunks = {name: as_chunk(array) for name, array in step.outputs.items()}
        return [{name: array[None] for name, array in chunks.items()}, {}] if has_axes else chunks


def modality_config(policy: Policy) -> dict[str, Any]:
    """The inputs and the action of a policy, as GR00T's clients read them."""
    signature = policy.signature
    images = [spec.name for spec in signature.observations if as_png.is_image(spec)]
    others = [spec.name for spec in signature.observations if not as_png.is_image(spec)]
    horizon = signature.action.shape[0] if len(signature.action.shape) > 1 else 1
    return {
        "video": _modality(images, 1),
        "state": _modality(others, 1),
        "action": _modality([signature.action.name], horizon),
    }


def _modality(names: list[str], steps: int) -> dict[str, Any]:
    described = {"delta_indices": list(range(steps)), "modality_keys": names}
    return {"__ModalityConfig_class__": True, "as_json": described}


def _authorization(token: Any) -> bytes | None:
    """The token of a request, as an Authorization header has it."""
    return f"Bearer {token}".encode() if isinstance(token, str) else None
