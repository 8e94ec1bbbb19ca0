"""`/policies/{name}/stream`: a WebSocket that is an episode. `app.wire.stream` has the formats of its messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, HTTPException, WebSocket, WebSocketDisconnect
from starlette.datastructures import QueryParams

from app import wire
from app.access import current
from app.api import common
from app.api.errors import document, report, status_of
from app.api.websocket import LIMIT, RESTART
from app.batcher import Outcome
from app.errors import ActserveError, InvalidRequest, NotServing, Unauthorized, Unavailable, UnsupportedContentType
from app.policy import Policy
from app.requests import decide, step_seed
from app.settings import Settings
from app.signature import Arrays
from app.telemetry.counts import STREAM, Tally
from app.wire.stream import Hello, Replies, Reply

log = logging.getLogger("actserve")

router = APIRouter(tags=["stream"])

LANE = "actserve.lane"  # in an ASGI scope: what may step an episode below it, see `app.lane.stream`
WINDOW = 8  # replies to so many fit into any socket's buffers, so that neither side waits for the other forever
BINARY = (wire.RAW, wire.PNG, wire.SAFETENSORS)  # what binary messages can be, the first by default
_BYTES_PER_ELEMENT = 32  # the longest number in JSON, with room to spare
_BYTES_BESIDE = 64 << 10  # names, and the head of a safetensors message or a PNG
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
    await _serve(websocket, common.registry(websocket).begin())


@_route("/policies/{name}/stream")
async def stream_by_name(websocket: WebSocket, name: str) -> None:
    await _serve(websocket, common.registry(websocket).begin(name))


@_route("/policies/{name}/versions/{version}/stream")
async def stream_by_version(websocket: WebSocket, name: str, version: str) -> None:
    await _serve(websocket, common.registry(websocket).find(name, version))


async def _serve(websocket: WebSocket, found: Awaitable[Policy]) -> None:
    settings: Settings = websocket.app.state.settings
    counts = common.registry(websocket).counts
    try:
        policy = await found
        tally = counts.tally(policy.name, "websocket", STREAM)
        episode = Episode(policy, websocket.query_params, settings, tally)
    except ActserveError as error:
        if "websocket.http.response" in websocket.scope.get("extensions", {}):
            raise  # to be answered like any other request
        await websocket.accept()
        await _close(websocket, _TRY_AGAIN if isinstance(error, Unavailable) else _REFUSED, error.message)
        return
    extensions = websocket.scope["extensions"]
    lane = extensions.get(LANE) if episode.arena is not None else None
    counts.streams += 1
    try:
        await websocket.accept()
        if LIMIT in extensions:
            extensions[LIMIT]["bound"](episode.hello.max_message_bytes)
        await websocket.send_text(episode.hello.to_json())
        code, reason = await _converse(websocket, episode, lane)
        await _close(websocket, code, reason)
    except (WebSocketDisconnect, OSError):
        pass  # nobody is there any more
    finally:
        counts.streams -= 1
        if lane is not None:
            await lane.withdraw()
        episode.close()


async def _converse(websocket: WebSocket, episode: Episode, lane: Any) -> tuple[int, str]:
    """Answer message after message; the code and the reason to close with. Raises `WebSocketDisconnect`.

    While one is being answered nothing more is read, so that what a client sends ahead waits in the sockets' buffers.
    """
    idle_s = episode.hello.idle_s
    while True:
        steps = episode.steps
        if lane is not None:
            lane.offer(episode)
        try:
            async with asyncio.timeout(idle_s):
                message = await websocket.receive()
        except TimeoutError:
            if episode.steps > steps:  # the lane took them
                continue
            return _IDLE, f"idle for {idle_s:g} s"
        if lane is not None:
            await lane.withdraw()
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


class Episode:
    """What one connection asks for, and the state between two of its steps. Raises `InvalidRequest`."""

    def __init__(self, policy: Policy, query: QueryParams, settings: Settings, tally: Tally) -> None:
        signature = policy.signature
        self.tally = tally
        asked = common.outputs(query, signature)
        outputs = tuple(spec for spec in signature.outputs if spec is signature.action or spec.name in asked)
        exploration, seed = decide(signature, *wire.read_randomness(query))
        self._binary = query.get("binary", BINARY[0])
        if self._binary not in BINARY:
            raise UnsupportedContentType(self._binary[:80], BINARY)
        # Of one message and its reply: state and noise stay here.
        self._signature = replace(signature, outputs=outputs, max_batch=1, state=(), noise=())
        self._replies = Replies(outputs)
        self._policy = policy
        self._state: Arrays = {}  # each (1, *shape); none before the first step, or where the arena has it
        self.steps = 0
        self.token = current.get()
        self.hello = Hello(
            policy=policy.name,
            version=policy.version,
            runtime=policy.choice.runtime,
            signature=self._signature,
            offsets=self._replies.offsets,
            environment=policy.artifact.manifest.environment,
            exploration=exploration,
            seed=seed,
            window=WINDOW,
            max_message_bytes=min(settings.max_body_bytes, self._max_message_bytes()),
            idle_s=settings.session_idle_s,
        )
        self.batcher = policy.batcher
        by_default = seed is None and exploration == signature.exploration[0]
        # What the lane steps it with.
        self.arena = policy.batcher.arena if by_default and self._binary == wire.RAW else None
        self.slot = self.arena.keep() if self.arena is not None else None

    def close(self) -> None:
        """Forget the state."""
        if self.arena is not None:
            self.arena.forget(self.slot)

    async def step(self, message: Any) -> dict[str, Any]:
        """One ASGI message -> the one that answers it. Whatever this raises, the episode has not moved."""
        if self.token is not None:
            self.token.charge()
        text = message.get("text")
        if text is None:
            items = wire.decode(self._binary, bytearray(message["bytes"]), self._signature)  # a copy: it is writable
        else:
            items = wire.decode(wire.JSON, text.encode(), self._signature)
        if items.batched:
            raise InvalidRequest(f"expected one item, as a stream takes at each step; got a batch of {items.size}")
        if items.metadata:
            raise InvalidRequest(f"a stream's query sets these; got with a message {', '.join(items.metadata)}")
        seed = None if self.hello.seed is None else step_seed(self.hello.seed, self.steps + 1)
        state = self._state
        if self.arena is not None and self.slot is not None and self.steps:
            state = self.arena.state(self.slot)
        acted = await self._policy.act(items.tensors | state, 1, self.hello.exploration, seed)
        # Copies: what came is a part of the whole batch's array, which it would keep.
        state = self._policy.state_after(acted)
        if self.arena is not None and self.slot is not None:
            self.arena.set_state(self.slot, state)
        else:
            self._state = state
        self.steps += 1
        self.tally.answered += 1
        reply = self._reply(acted.outputs, 0, acted.queue_ns, acted.run_ns)
        if text is None:
            return {"type": "websocket.send", "bytes": self._replies.pack(reply)}
        return {"type": "websocket.send", "text": self._replies.to_json(reply)}

    def reply(self, outcome: Outcome, start: int, queue_ns: int) -> bytes:
        """What the lane calls: a binary message has been answered, and its state is kept."""
        self.steps += 1
        self.tally.answered += 1
        return self._replies.pack(self._reply(outcome.outputs, start, queue_ns, outcome.run_ns))

    def refusal(self, error: ActserveError) -> bytes:
        """What the lane calls: a binary message could not be answered; nothing has moved."""
        return self.error(error).encode()

    def error(self, error: ActserveError) -> str:
        """The same as text."""
        report(error)
        status = status_of(error)
        self.tally.add(str(status), error.code)
        return document(error.code, error.message, error.detail, status=status, step=self.steps + 1).decode()

    def _reply(self, results: Arrays, start: int, queue_ns: int, run_ns: int) -> Reply:
        outputs = {spec.name: results[spec.name][start] for spec in self._signature.outputs}
        return Reply(self.steps, outputs, queue_ns // 1000, run_ns // 1000)

    def _max_message_bytes(self) -> int:
        """Enough for one item in any encoding."""
        elements = sum(spec.item_bytes // spec.numpy_dtype.itemsize for spec in self._signature.asked)
        return _BYTES_BESIDE + _BYTES_PER_ELEMENT * elements


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    await websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))
