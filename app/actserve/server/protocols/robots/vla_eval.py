"""vla-eval's WebSocket: `{"type", "payload", "seq", "timestamp"}` in msgpack.

`hello` has a reply with the policy; `episode_start` begins an episode; the reply to `observation` is an `action` of the
same `seq`; `episode_end` has no reply. The `success` among its metrics is recorded as the reward of the last step. An
error is a message of the type `error`, with the `seq` of the message.
"""

from __future__ import annotations

import time
from typing import Any

from actserve import __version__
from actserve.core.errors import ActserveError, MalformedBody
from actserve.engine.recorders import Feedback
from actserve.server.episode_state import Step
from actserve.server.protocols import Protocol
from actserve.server.protocols.robots.packed import MapPacker, of_vla_eval
from actserve.server.protocols.robots.packed_socket import PackedWire
from actserve.server.protocols.robots.socket import socket_router

VERSION = 1  # of the protocol
TYPES = ("hello", "episode_start", "observation", "episode_end", "error")


_pack_map = MapPacker(of_vla_eval)


class VlaEval(PackedWire):
    route = "/policies/{name}/vla-eval"
    _seq = 0  # of the message in progress

    def observation(self, request: Any) -> Any | None:
        self._seq = 0
        if not isinstance(request, dict) or type(request.get("seq")) is not int:
            raise MalformedBody("expected a map with type, payload and a whole number as seq; got something else")
        self._seq = request["seq"]
        kind = request.get("type")
        if kind not in TYPES:
            raise MalformedBody(f"expected a message of the type {', '.join(TYPES)}; got {kind!r}"[:200])
        if kind == "observation" and request.get("payload") is None:
            raise MalformedBody("expected an observation, names and values; got nothing")
        return request["payload"] if kind == "observation" else None

    async def answer_other(self, request: Any) -> bytes | None:
        if request["type"] == "hello":
            return self._pack("hello", self._hello())
        if request["type"] == "episode_start":
            await self.episode.reset()
        if request["type"] == "episode_end":
            self._note_end(request.get("payload"))
        return None

    def _note_end(self, payload: Any) -> None:
        """An episode without success may have been cut, so nothing says that it is done."""
        metrics = payload.get("metrics") if isinstance(payload, dict) else None
        success = metrics.get("success") if isinstance(metrics, dict) else None
        if isinstance(success, bool | int | float) and 0 <= success <= 1:
            self.state.tell(Feedback(float(success), True if success else None))

    def reply(self, step: Step) -> bytes:
        return self._pack("action", {**step.outputs, "actions": step.outputs[self.episode.action]})

    def refusal(self, error: ActserveError) -> bytes:
        return self._pack("error", {"error": error.message, "code": error.code})

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
        return _pack_map(content)


protocol = Protocol("vla-eval", routers=[socket_router(VlaEval, of_default="/vla-eval")])
