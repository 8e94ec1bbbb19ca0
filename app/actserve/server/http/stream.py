"""`/policies/{name}/stream`: one WebSocket is one episode. `wire.stream_messages` has the message formats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from fastapi import APIRouter, HTTPException, WebSocket, WebSocketDisconnect

from actserve.core.errors import ActserveError, NotServing, Unauthorized, Unavailable, UnsupportedContentType
from actserve.core.settings import Settings
from actserve.engine.policy import Policy
from actserve.server.http.requests import admission_of, registry_of
from actserve.server.http.stream_episode import ENCODINGS, WINDOW, StreamEpisode
from actserve.server.http.websocket import LIMIT, RESTART
from actserve.server.memory import STREAM_BYTES
from actserve.server.protocols import Protocol
from actserve.telemetry.counts import STREAM

log = logging.getLogger("actserve")

router = APIRouter(tags=["stream"])
protocol = Protocol("streams", routers=[router])

FAST_PATH = "actserve.fast_path"  # ASGI extension: the `FastPathStream` that may step an episode
_REASON_BYTES = 123  # the space of a close frame
IDLE, _UNUSABLE, REFUSED, FAILED, _TRY_AGAIN = 1001, 1003, 1008, 1011, 1013
ENDING: dict[type[ActserveError], int] = {  # errors that end a stream, and the close code
    UnsupportedContentType: _UNUSABLE,
    NotServing: RESTART,
    Unauthorized: REFUSED,
}

_DESCRIPTION = f"""
Upgrade to a WebSocket: the connection is the episode, and the service keeps its state.

1. The service sends a hello in JSON: policy, version, runtime, the signature of a message, environment, seed, window.
2. Send a **binary message** for each step: the raw bytes of the observation, as for `/act`. Or send a **text message**:
   `{{"pixels": ..., "is_init": true}}` as for `/act`, with all inputs by name; `is_init` begins a new episode.
3. Replies come in order. To a text message: `{{"action": 3, "step": 1, "queue_us": 40, "run_us": 310}}`. To a binary
   message, little-endian: step (uint64), queue_us (uint32), run_us (uint32), and each output at its offset in the
   hello.

Up to `window` ({WINDOW}) messages may be unanswered. An invalid message is answered with
`{{"error": {{"code", "message", "detail"}}, "status", "step"}}` and does not change the state; the stream continues.

In the query, `outputs` (the action always comes first), `exploration` and `seed` are as for `/act`. The noise of step
k comes from the seed and k. `binary` is the encoding of binary messages:
{", ".join(f"`{name}`" for name in ENCODINGS)}.

Close codes: {IDLE} idle for too long, {_UNUSABLE} this policy takes text messages only, 1007 text that is not UTF-8,
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
    settings: Settings = websocket.app.state.settings
    counts = registry_of(websocket).counts
    held = ExitStack()
    try:
        policy = await finding
        tally = counts.tally(policy.name, "websocket", STREAM)
        admission = admission_of(websocket)
        state_bytes = sum(state.spec.item_bytes for state in policy.signature.state)
        held.enter_context(admission.memory.taken(STREAM_BYTES + state_bytes))
        episode = StreamEpisode(policy, websocket.query_params, settings, admission, tally)
    except ActserveError as error:
        held.close()
        await refuse(websocket, error)
        return
    extensions = websocket.scope["extensions"]
    fast_path = extensions.get(FAST_PATH) if episode.arena is not None else None
    counts.streams += 1
    try:
        await websocket.accept()
        if LIMIT in extensions:
            extensions[LIMIT]["set_max_bytes"](episode.hello.max_message_bytes)
        await websocket.send_text(episode.hello.to_json())
        code, reason = await _answer_messages(websocket, episode, fast_path)
        await close(websocket, code, reason)
    except (WebSocketDisconnect, OSError):
        pass  # the client has disconnected
    finally:
        held.close()
        counts.streams -= 1
        if fast_path is not None:
            await fast_path.withdraw()
        episode.close()


async def _answer_messages(websocket: WebSocket, episode: StreamEpisode, fast_path: Any) -> tuple[int, str]:
    """Answer messages until the stream ends; returns the close code and reason. Raises `WebSocketDisconnect`.

    It reads one message at a time. Further messages wait in the buffers of the sockets.
    """
    idle_s = episode.hello.idle_s
    while True:
        steps = episode.steps
        if fast_path is not None:
            fast_path.offer(episode)
        try:
            async with asyncio.timeout(idle_s):
                message = await websocket.receive()
        except TimeoutError:
            if episode.steps > steps:  # on the fast path
                continue
            return IDLE, f"idle for {idle_s:g} s"
        if fast_path is not None:
            await fast_path.withdraw()
        if message["type"] == "websocket.disconnect":
            if message["code"] == RESTART:
                return RESTART, "service restart"
            raise WebSocketDisconnect(message["code"])
        try:
            reply = await episode.step(message)
        except ActserveError as error:
            await websocket.send_text(episode.error_json(error))
            if type(error) in ENDING:
                return ENDING[type(error)], error.message
            await asyncio.sleep(0)  # a flood of invalid messages must not block the event loop
        except Exception:
            log.exception("a stream of %s failed", episode.hello.policy)
            episode.tally.add("500", "internal")
            return FAILED, "the service failed on this message; its log says why"
        else:
            await websocket.send(reply)


async def refuse(websocket: WebSocket, error: ActserveError) -> None:
    """Refuse a WebSocket before it is accepted. Raises `error` if the server can answer with an HTTP error."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        raise error
    await websocket.accept()
    await close(websocket, _TRY_AGAIN if isinstance(error, Unavailable) else REFUSED, error.message)


async def close(websocket: WebSocket, code: int, reason: str) -> None:
    """Close with a reason, cut to the space that a close frame has."""
    await websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))
