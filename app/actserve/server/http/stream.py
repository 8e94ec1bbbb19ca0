"""`/policies/{name}/stream`: a WebSocket that is an episode. `wire.stream_messages` has its message formats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, HTTPException, WebSocket, WebSocketDisconnect

from actserve.core.errors import ActserveError, NotServing, Unauthorized, Unavailable, UnsupportedContentType
from actserve.core.settings import Settings
from actserve.engine.policy import Policy
from actserve.server.http.requests import admission_of, registry_of
from actserve.server.http.stream_episode import BINARY, WINDOW, StreamEpisode
from actserve.server.http.websocket import LIMIT, RESTART
from actserve.telemetry.counts import STREAM

log = logging.getLogger("actserve")

router = APIRouter(tags=["stream"])

FAST_PATH = "actserve.fast_path"  # ASGI extension: the `FastPathStream` that may step an episode
_REASON_BYTES = 123  # what a close frame has room for
_IDLE, _UNUSABLE, _REFUSED, _INTERNAL, _TRY_AGAIN = 1001, 1003, 1008, 1011, 1013
_ENDING: dict[type[ActserveError], int] = {  # errors that last
    UnsupportedContentType: _UNUSABLE,
    NotServing: RESTART,
    Unauthorized: _REFUSED,
}

_DESCRIPTION = f"""
Upgrade to a WebSocket: the connection is the episode, and the service keeps its state.

1. The service says hello, in JSON: policy, version, runtime, the signature of a message, environment, seed, window.
2. Send a **binary message** for each step: the raw bytes of the observation, as for `/act`; or a **text message**:
   `{{"pixels": ..., "is_init": true}}` as for `/act`, which can carry several observations, and begin anew.
3. Replies come in order. To a text message: `{{"action": 3, "step": 1, "queue_us": 40, "run_us": 310}}`. To a binary
   one, little-endian: step (uint64), queue_us (uint32), run_us (uint32), and each output at its offset in the hello.

Up to `window` ({WINDOW}) messages may be unanswered. A message that cannot be used is answered with
`{{"error": {{"code", "message", "detail"}}, "status", "step"}}` and moves nothing; the stream goes on.

In the query `outputs` (the action is always the first), `exploration` and `seed` are as for `/act`; the noise of step
k comes from the seed and k. `binary` says what binary messages are: {", ".join(f"`{known}`" for known in BINARY)}.

Close codes: {_IDLE} idle for too long, {_UNUSABLE} this policy takes text messages only, 1007 text that is not UTF-8,
{_REFUSED} the token is not valid any more, 1009 a message larger than the hello allows, {_INTERNAL} the service failed
or had no answer to its pings, {RESTART} the service restarts; what it had taken in has been answered. What
cannot begin is refused as on `/act`, by an HTTP error.
"""

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Awaitable[None]])


def _route(path: str) -> Callable[[_Endpoint], _Endpoint]:
    """The WebSocket; and a page of /docs that says how to speak to it, for whoever comes without an upgrade."""
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


async def _serve(websocket: WebSocket, found: Awaitable[Policy]) -> None:
    settings: Settings = websocket.app.state.settings
    counts = registry_of(websocket).counts
    try:
        policy = await found
        tally = counts.tally(policy.name, "websocket", STREAM)
        admission = admission_of(websocket)
        episode = StreamEpisode(policy, websocket.query_params, settings, admission, tally)
    except ActserveError as error:
        if "websocket.http.response" in websocket.scope.get("extensions", {}):
            raise  # to be answered like any other request
        await websocket.accept()
        await _close(websocket, _TRY_AGAIN if isinstance(error, Unavailable) else _REFUSED, error.message)
        return
    extensions = websocket.scope["extensions"]
    fast_path = extensions.get(FAST_PATH) if episode.arena is not None else None
    counts.streams += 1
    try:
        await websocket.accept()
        if LIMIT in extensions:
            extensions[LIMIT]["bound"](episode.hello.max_message_bytes)
        await websocket.send_text(episode.hello.to_json())
        code, reason = await _converse(websocket, episode, fast_path)
        await _close(websocket, code, reason)
    except (WebSocketDisconnect, OSError):
        pass  # nobody is there any more
    finally:
        counts.streams -= 1
        if fast_path is not None:
            await fast_path.withdraw()
        episode.close()


async def _converse(websocket: WebSocket, episode: StreamEpisode, fast_path: Any) -> tuple[int, str]:
    """Answer message after message; the code and the reason to close with. Raises `WebSocketDisconnect`.

    While one is being answered nothing more is read, so that what a client sends ahead waits in the sockets' buffers.
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
            if episode.steps > steps:  # the fast path took them
                continue
            return _IDLE, f"idle for {idle_s:g} s"
        if fast_path is not None:
            await fast_path.withdraw()
        if message["type"] == "websocket.disconnect":
            if message["code"] == RESTART:
                return RESTART, "service restart"
            raise WebSocketDisconnect(message["code"])
        try:
            reply = await episode.step(message)
        except ActserveError as error:
            await websocket.send_text(episode.error(error))
            if type(error) in _ENDING:
                return _ENDING[type(error)], error.message
            await asyncio.sleep(0)  # nothing was awaited: a flood of these would hold the event loop
        except Exception:
            log.exception("a stream of %s failed", episode.hello.policy)
            episode.tally.add("500", "internal")
            return _INTERNAL, "the service failed on this message; its log says why"
        else:
            await websocket.send(reply)


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    await websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))
