"""openpi's WebSocket, with the dialects of RoboArena and of BEHAVIOR's evaluator.

The service sends the metadata, then answers each msgpack map with one. Errors are text. The connection is one episode.
openpi's clients have no message that begins another, so `is_init` in an observation does; the dialects have messages.

* openpi: an observation -> `actions` (horizon, dim), `action` as the policy gives it, the other outputs by name, and
  `server_timing`.
* RoboArena: a map with `endpoint`. `infer` -> the array of actions alone; `reset` -> the text "reset successful".
* BEHAVIOR: a map with `reset` begins an episode, and has no reply. It reads `action` of the answers.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import Any

from actserve.core.errors import ActserveError, MalformedBody
from actserve.core.signature import Array
from actserve.server.episode_state import Step
from actserve.server.protocols import Protocol
from actserve.server.protocols.robots import roboarena
from actserve.server.protocols.robots.episode import RobotEpisode
from actserve.server.protocols.robots.packed import MapPacker, of_openpi, pack
from actserve.server.protocols.robots.packed_socket import PackedWire
from actserve.server.protocols.robots.socket import socket_router

_pack = MapPacker(of_openpi)


class Openpi(PackedWire):
    route = "/policies/{name}/openpi"
    _endpoint: str | None = None  # of the message in progress
    _previous_ns: int | None = None  # that the last step took

    def greeting(self) -> bytes:
        return pack(metadata(self.episode), of_openpi)

    def observation(self, request: Any) -> Any | None:
        if not isinstance(request, dict):
            raise MalformedBody(f"expected a map in msgpack; got {type(request).__name__}")
        self._endpoint = request.pop(roboarena.ENDPOINT, None)
        if self._endpoint not in (None, "infer", "reset"):
            raise MalformedBody(f"expected an endpoint of infer or reset; got {self._endpoint!r}"[:200])
        is_reset = self._endpoint == "reset" or (self._endpoint is None and request.get("reset") is True)
        return None if is_reset else request

    async def answer_other(self, request: Any) -> str | None:
        await self.episode.reset()
        return None if self._endpoint is None else roboarena.RESET

    def reply(self, step: Step) -> bytes:
        action = step.outputs[self.episode.action]
        if self._endpoint == "infer":
            return pack(as_chunk(action), of_openpi)
        timing = self._timing(step)
        answer = {**step.outputs, "action": action, "actions": as_chunk(action), "server_timing": timing}
        return _pack(answer)

    def refusal(self, error: ActserveError) -> str:
        return f"{error.code}: {error.message}"

    def _timing(self, step: Step) -> dict[str, float]:
        timing = {"infer_ms": step.run_ns / 1e6, "queue_ms": step.queue_ns / 1e6}
        if self._previous_ns is not None:
            timing["prev_total_ms"] = self._previous_ns / 1e6
        self._previous_ns = perf_counter_ns() - self.begun_ns
        return timing


def as_chunk(action: Array) -> Array:
    """(horizon, dim): a single action is a chunk of one."""
    return action.reshape(1, -1) if action.ndim < 2 else action


def metadata(episode: RobotEpisode) -> dict[str, Any]:
    """The first message. RoboArena's clients take its configuration only, and no other names."""
    policy = episode.policy
    return roboarena.configuration(policy.signature, policy.artifact.manifest.environment) or {
        "policy": policy.name,
        "version": policy.version,
        "inputs": {spec.name: str(spec) for spec in policy.signature.observations},
        "outputs": {spec.name: str(spec) for spec in policy.signature.outputs},
    }


protocol = Protocol("openpi", routers=[socket_router(Openpi, of_default="/")])
