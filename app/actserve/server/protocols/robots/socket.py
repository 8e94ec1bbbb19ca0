"""A robot's WebSocket: one connection, one `RobotEpisode`, one message at a time."""

from __future__ import annotations

from fastapi import APIRouter, WebSocket

from actserve.server.episode_state import EpisodeState
from actserve.server.http.episode_socket import SocketEpisode, serve
from actserve.server.http.requests import read_patience_ns
from actserve.server.protocols import service_of
from actserve.server.protocols.robots.episode import RobotEpisode


class SocketWire(SocketEpisode):
    """One protocol's messages on a WebSocket. Each connection has its own object."""

    def __init__(self, episode: RobotEpisode, patience_ns: int) -> None:
        self.episode, self.patience_ns = episode, patience_ns

    @property
    def state(self) -> EpisodeState:
        return self.episode.state

    @property
    def max_message_bytes(self) -> int:
        return self.episode.max_message_bytes


def socket_router(wire: type[SocketWire], of_default: str) -> APIRouter:
    """The WebSocket of any policy, at `wire.route`, and that of the default policy."""
    router = APIRouter()

    @router.websocket(of_default)
    async def serve_default(websocket: WebSocket) -> None:
        await serve(websocket, _begin(websocket, wire, None))

    @router.websocket(wire.route)
    async def serve_named(websocket: WebSocket, name: str) -> None:
        await serve(websocket, _begin(websocket, wire, name))

    return router


async def _begin(websocket: WebSocket, kind: type[SocketWire], name: str | None) -> SocketWire:
    patience_ns = read_patience_ns(websocket)
    episode = await RobotEpisode.begin(
        service_of(websocket), name, transport="websocket", route=kind.route, query=websocket.query_params
    )
    return kind(episode, patience_ns)
