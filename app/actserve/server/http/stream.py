"""`/policies/{name}/stream`: one WebSocket is one episode. `wire.stream_messages` has the message formats."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import APIRouter, HTTPException, WebSocket

from actserve.core.settings import Settings
from actserve.engine.policy import Policy
from actserve.server.http.episode_socket import FAILED, IDLE, REFUSED, UNUSABLE, serve
from actserve.server.http.requests import admission_of, registry_of
from actserve.server.http.stream_episode import ENCODINGS, WINDOW, StreamEpisode
from actserve.server.http.websocket import RESTART
from actserve.server.protocols import Protocol
from actserve.telemetry.counts import STREAM

router = APIRouter(tags=["stream"])
protocol = Protocol("streams", routers=[router])

_DESCRIPTION = f"""
Upgrade to a WebSocket: the connection is the episode, and the service keeps its state.

1. The service sends a hello in JSON: policy, version, runtime, the signature of a message, environment, seed, window.
2. Send a **binary message** for each step: the raw bytes of the observation, as for `/act`. Or send a **text message**:
   `{{"pixels": ..., "is_init": true}}` as for `/act`, with all inputs by name; `is_init` begins a new episode.
3. Replies come in order. To a text message: `{{"action": 3, "step": 1, "queue_us": 40, "run_us": 310}}`. To a binary
   message, little-endian: step (uint64), queue_us (uint32), run_us (uint32), and each output at its offset in the
   hello.

A text message `{{"result": {{"reward": 1.0, "done": false}}}}` tells the result of the last step, for the recording of
the service, if it has one. It has no reply.

Up to `window` ({WINDOW}) messages may be unanswered. An invalid message is answered with
`{{"error": {{"code", "message", "detail"}}, "status", "step"}}` and does not change the state; the stream continues.

In the query, `outputs` (the action always comes first), `exploration` and `seed` are as for `/act`. The noise of step
k comes from the seed and k. `binary` is the encoding of binary messages:
{", ".join(f"`{name}`" for name in ENCODINGS)}.

Close codes: {IDLE} idle for too long, {UNUSABLE} this policy takes text messages only, 1007 text that is not UTF-8,
{REFUSED} the token was revoked, 1009 a message larger than the hello allows, {FAILED} the service failed or got no
reply to its pings, {RESTART} the service restarts; it has answered all messages that it received. A stream that cannot
begin is refused with an HTTP error, as on `/act`.
"""

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Awaitable[None]])


def _route(path: str) -> Callable[[_Endpoint], _Endpoint]:
    """A WebSocket route, and a GET route that documents it in /docs and answers 426."""
    router.get(path, status_code=426, summary="Stream (WebSocket)", description=_DESCRIPTION)(_upgrade)
    return router.websocket(path)


async def _upgrade() -> None:
    raise HTTPException(426, "this is a WebSocket", {"Upgrade": "websocket", "Connection": "Upgrade"})


@_route("/stream")
async def stream(websocket: WebSocket) -> None:
    await _serve(websocket, registry_of(websocket).begin())


@_route("/policies/{name}/stream")
async def stream_by_name(websocket: WebSocket, name: str) -> None:
    await _serve(websocket, registry_of(websocket).begin(name))


@_route("/policies/{name}/versions/{version}/stream")
async def stream_by_version(websocket: WebSocket, name: str, version: str) -> None:
    await _serve(websocket, registry_of(websocket).find(name, version))


async def _serve(websocket: WebSocket, finding: Awaitable[Policy]) -> None:
    async def begin() -> StreamEpisode:
        policy = await finding
        tally = registry_of(websocket).counts.tally(policy.name, "websocket", STREAM)
        settings: Settings = websocket.app.state.settings
        return StreamEpisode(policy, websocket.query_params, settings, admission_of(websocket), tally)

    await serve(websocket, begin())
