"""A robot's WebSocket: one connection, one `RobotEpisode`, one message at a time."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import ClassVar

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from actserve.core.errors import ActserveError
from actserve.server.http.requests import read_patience_ns
from actserve.server.http.stream import ENDING, FAILED, IDLE, close, refuse
from actserve.server.http.websocket import LIMIT, RESTART
from actserve.server.protocols import service_of
from actserve.server.protocols.robots.episode import RobotEpisode

log = logging.getLogger("actserve")

Message = bytes | str


class SocketWire(ABC):
    """One protocol's messages on a WebSocket. Each connection has its own object."""

    route: ClassVar[str]  # the template of the URL, with {name}: for the metrics

    def __init__(self, episode: RobotEpisode, patience_ns: int) -> None:
        self.episode, self.patience_ns = episode, patience_ns

    def greeting(self) -> Message | None:
        """The first message, which the service sends before the client does; None: there is none."""
        return None

    @abstractmethod
    async def answer(self, message: Message) -> Message | None:
        """The reply to a message, if it has one. Raises an `ActserveError`."""

    @abstractmethod
    def refusal(self, error: ActserveError) -> Message:
        """The reply to a message that raised `error`."""


def socket_router(wire: type[SocketWire], of_default: str) -> APIRouter:
    """The WebSocket of any policy, at `wire.route`, and that of the default policy."""
    router = APIRouter()

    @router.websocket(of_default)
    async def serve_default(websocket: WebSocket) -> None:
        await _serve(websocket, wire, None)

    @router.websocket(wire.route)
    async def serve(websocket: WebSocket, name: str) -> None:
        await _serve(websocket, wire, name)

    return router


async def _serve(websocket: WebSocket, kind: type[SocketWire], name: str | None) -> None:
    service = service_of(websocket)
    try:
        patience_ns = read_patience_ns(websocket)
        episode = await RobotEpisode.begin(
            service, name, transport="websocket", route=kind.route, query=websocket.query_params
        )
    except ActserveError as error:
        await refuse(websocket, error)
        return
    counts = service.registry.counts
    counts.streams += 1
    try:
        await websocket.accept()
        wire = kind(episode, patience_ns)
        greeting = wire.greeting()
        if greeting is not None:
            await _send(websocket, greeting)
        await close(websocket, *await _answer_messages(websocket, wire, service.settings.session_idle_s))
    except (WebSocketDisconnect, OSError):
        pass  # the client has disconnected
    finally:
        counts.streams -= 1
        episode.close()


async def _answer_messages(websocket: WebSocket, wire: SocketWire, idle_s: float) -> tuple[int, str]:
    """Answer messages until the connection ends; returns the close code and reason. Raises `WebSocketDisconnect`."""
    episode = wire.episode
    limit = websocket.scope["extensions"].get(LIMIT)
    while True:
        if limit is not None:
            limit["set_max_bytes"](episode.max_message_bytes)  # an episode may begin on another version
        try:
            async with asyncio.timeout(idle_s):
                received = await websocket.receive()
        except TimeoutError:
            return IDLE, f"idle for {idle_s:g} s"
        if received["type"] == "websocket.disconnect":
            if received["code"] == RESTART:
                return RESTART, "service restart"
            raise WebSocketDisconnect(received["code"])
        message: Message = received["bytes"] if received.get("text") is None else received["text"]
        try:
            episode.admit()
            with service_of(websocket).admission.memory.taken(len(message)):
                reply = await wire.answer(message)
        except ActserveError as error:
            episode.refused(error)
            await _send(websocket, wire.refusal(error))
            if type(error) in ENDING:
                return ENDING[type(error)], error.message
            await asyncio.sleep(0)  # a flood of invalid messages must not block the event loop
        except Exception:
            log.exception("a message to %s failed", wire.route)
            episode.failed()
            return FAILED, "the service failed on this message; its log says why"
        else:
            if reply is None:
                await asyncio.sleep(0)
            else:
                await _send(websocket, reply)


async def _send(websocket: WebSocket, message: Message) -> None:
    if isinstance(message, str):
        await websocket.send_text(message)
    else:
        await websocket.send_bytes(message)
