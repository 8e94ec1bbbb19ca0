"""A WebSocket that is one episode: a stream, or a robot. The loop is common to all; `SocketEpisode` has the messages.

While the route waits for a message, it offers the episode to the fast path, which may take steps. All other messages
come to the route.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from actserve.core.errors import ActserveError, NotServing, Unauthorized, Unavailable, UnsupportedContentType
from actserve.core.signature import Array, Arrays
from actserve.server.episode_state import EpisodeState, Step
from actserve.server.http.requests import admission_of, registry_of
from actserve.server.http.websocket import LIMIT, RESTART

log = logging.getLogger("actserve")

FAST_PATH = "actserve.fast_path"  # ASGI extension: the `FastPathSocket` that may take steps of an episode
_REASON_BYTES = 123  # the space of a close frame
IDLE, UNUSABLE, REFUSED, FAILED, _TRY_AGAIN = 1001, 1003, 1008, 1011, 1013
ENDING: dict[type[ActserveError], int] = {  # errors that end an episode, and the close code
    UnsupportedContentType: UNUSABLE,
    NotServing: RESTART,
    Unauthorized: REFUSED,
}

Message = bytes | str  # binary or text


class SocketEpisode(ABC):
    """One episode on a WebSocket. `answer` may replace `state`, and nothing else does."""

    route: str  # the template of the URL, for the log

    @property
    @abstractmethod
    def state(self) -> EpisodeState: ...

    @property
    @abstractmethod
    def max_message_bytes(self) -> int:
        """The largest message."""

    def greeting(self) -> Message | None:
        """The first message, which the service sends before the client does; None: there is none."""
        return None

    @abstractmethod
    async def answer(self, message: Message) -> Message | None:
        """The reply to a message, if it has one. Raises an `ActserveError`; then no step was taken."""

    def notes(self, message: Message) -> bool:
        """Take a message that is no step and has no reply, and charge for it if need be; False: it is another one.

        Raises an `ActserveError`.
        """
        return False

    @abstractmethod
    def refusal(self, error: ActserveError) -> Message:
        """The reply to a message that raised `error`."""

    def close(self) -> None:
        """Free the state."""
        self.state.close()


class SteppableEpisode(SocketEpisode):
    """An episode whose steps the fast path can take: `read` a binary message, run the policy, write the `reply`."""

    in_place = False  # a message is the bytes of the only observation: it is received into a batch, without `read`
    patience_ns = 0  # how long a step may wait; 0: for ever

    @abstractmethod
    def takes(self, size_bytes: int) -> bool:
        """Whether the fast path takes binary messages of this size."""

    @abstractmethod
    def read(self, message: Array) -> Arrays | None:
        """The observations in a message, (n,) uint8: each (1, *shape), mostly views of it.

        None: the message is more than a step, and `answer` takes it. Raises an `ActserveError`, as `answer` then does.
        """

    @abstractmethod
    def reply(self, step: Step) -> Message:
        """The reply to the message of a step."""


async def serve(websocket: WebSocket, beginning: Awaitable[SocketEpisode]) -> None:
    """Serve an episode to its end. If it cannot begin, the handshake is refused."""
    try:
        episode = await beginning
    except ActserveError as error:
        await _refuse(websocket, error)
        return
    counts = registry_of(websocket).counts
    fast_path = websocket.scope["extensions"].get(FAST_PATH)
    counts.streams += 1
    try:
        await websocket.accept()
        _set_limit(websocket, episode)
        greeting = episode.greeting()
        if greeting is not None:
            await _send(websocket, greeting)
        code, reason = await _answer_messages(websocket, episode, fast_path)
        await websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))
    except (WebSocketDisconnect, OSError):
        pass  # the client has disconnected
    finally:
        counts.streams -= 1
        if fast_path is not None:
            await fast_path.withdraw()
        episode.close()


async def _answer_messages(websocket: WebSocket, episode: SocketEpisode, fast_path: Any) -> tuple[int, str]:
    """Answer messages until the connection ends; returns the close code and reason. Raises `WebSocketDisconnect`.

    It reads one message at a time. Further messages wait in the buffers of the sockets.
    """
    idle_s = websocket.app.state.settings.session_idle_s
    memory = admission_of(websocket).memory
    while True:
        steps = episode.state.steps
        if fast_path is not None and isinstance(episode, SteppableEpisode):
            fast_path.offer(episode)
        try:
            async with asyncio.timeout(idle_s):
                received = await websocket.receive()
        except TimeoutError:
            if episode.state.steps > steps:  # on the fast path
                continue
            return IDLE, f"idle for {idle_s:g} s"
        if fast_path is not None:
            await fast_path.withdraw()
        if received["type"] == "websocket.disconnect":
            if received["code"] == RESTART:
                return RESTART, "service restart"
            raise WebSocketDisconnect(received["code"])
        message: Message = received["bytes"] if received.get("text") is None else received["text"]
        try:
            reply = None
            if not episode.notes(message):
                episode.state.open_message()
                with memory.taken(len(message)):
                    reply = await episode.answer(message)
        except ActserveError as error:
            episode.state.refused(error)
            await _send(websocket, episode.refusal(error))
            if type(error) in ENDING:
                return ENDING[type(error)], error.message
            await asyncio.sleep(0)  # a flood of invalid messages must not block the event loop
        except Exception:
            log.exception("a message to %s failed", episode.route)
            episode.state.failed()
            return FAILED, "the service failed on this message; its log says why"
        else:
            _set_limit(websocket, episode)
            if reply is None:
                await asyncio.sleep(0)
            else:
                await _send(websocket, reply)


def _set_limit(websocket: WebSocket, episode: SocketEpisode) -> None:
    limit = websocket.scope["extensions"].get(LIMIT)
    if limit is not None:
        limit["set_max_bytes"](episode.max_message_bytes)


async def _send(websocket: WebSocket, message: Message) -> None:
    if isinstance(message, str):
        await websocket.send_text(message)
    else:
        await websocket.send_bytes(message)


async def _refuse(websocket: WebSocket, error: ActserveError) -> None:
    """Refuse a WebSocket before it is accepted. Raises `error` if the server can answer with an HTTP error."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        raise error
    await websocket.accept()
    code = _TRY_AGAIN if isinstance(error, Unavailable) else REFUSED
    await websocket.close(code, error.message.encode()[:_REASON_BYTES].decode(errors="ignore"))
