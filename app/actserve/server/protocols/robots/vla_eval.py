"""vla-eval's WebSocket: `{"type", "payload", "seq", "timestamp"}` in msgpack.

`hello` has a reply with the policy; `episode_start` begins an episode; the reply to `observation` is an `action` of the
same `seq`; `episode_end` has no reply. An error is a message of the type `error`, with the `seq` of the message.
"""

from __future__ import annotations

import time
from typing import Any

from actserve import __version__
from actserve.core.errors import ActserveError, MalformedBody
from actserve.server import off_loop
from actserve.server.protocols import Protocol
from actserve.server.protocols.robots.packed import of_vla_eval, pack, unpack
from actserve.server.protocols.robots.socket import Message, SocketWire, socket_router
from actserve.wire.payload import MANY_BYTES

VERSION = 1  # of the protocol
TYPES = ("hello", "episode_start", "observation", "episode_end", "error")


class VlaEval(SocketWire):
    route = "/policies/{name}/vla-eval"
    _seq = 0  # of the message in progress

    async def answer(self, message: Message) -> bytes | None:
        self._seq = 0
        if isinstance(message, str):
            raise MalformedBody("expected a binary message, a map in msgpack; got text")
        request = await off_loop.call(unpack, message, takes_long=len(message) > MANY_BYTES)
        kind, payload = self._read(request)
        if kind == "hello":
            return self._pack("hello", self._hello())
        if kind == "episode_start":
            await self.episode.reset()
        if kind != "observation":
            return None
        step = await self.episode.step(payload, self.patience_ns)
        action = step.outputs[self.episode.action]
        return self._pack("action", {**step.outputs, "actions": action})

    def refusal(self, error: ActserveError) -> bytes:
        return self._pack("error", {"error": error.message, "code": error.code})

    def _read(self, request: Any) -> tuple[str, Any]:
        """The type and the payload. Raises `MalformedBody`."""
        if not isinstance(request, dict) or type(request.get("seq")) is not int:
            raise MalformedBody("expected a map with type, payload and a whole number as seq; got something else")
        self._seq = request["seq"]
        kind = request.get("type")
        if kind not in TYPES:
            raise MalformedBody(f"expected a message of the type {', '.join(TYPES)}; got {kind!r}"[:200])
        return kind, request.get("payload")

    def _hello(self) -> dict[str, Any]:
        policy = self.episode.policy
        return {
            "harness_version": __version__,
            "protocol_version": VERSION,
            "model_server": f"actserve: {policy.name}, version {policy.version}",
            "capabilities": {},
        }

    def _pack(self, kind: str, payload: dict[str, Any]) -> bytes:
        content = {"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()}
        return pack(content, of_vla_eval)


protocol = Protocol("vla-eval", routers=[socket_router(VlaEval, of_default="/vla-eval")])
