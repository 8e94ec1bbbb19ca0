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
from actserve.server import off_loop
from actserve.server.protocols import Protocol
from actserve.server.protocols.robots import roboarena
from actserve.server.protocols.robots.episode import RobotEpisode, Step
from actserve.server.protocols.robots.packed import of_openpi, pack, unpack
from actserve.server.protocols.robots.socket import Message, SocketWire, socket_router
from actserve.wire.payload import MANY_BYTES


class Openpi(SocketWire):
    route = "/policies/{name}/openpi"

    def __init__(self, episode: RobotEpisode, patience_ns: int) -> None:
        super().__init__(episode, patience_ns)
        self._previous_ns: int | None = None  # that the last message took

    def greeting(self) -> bytes:
        return pack(metadata(self.episode), of_openpi)

    async def answer(self, message: Message) -> Message | None:
        begun_ns = perf_counter_ns()
        if isinstance(message, str):
            raise MalformedBody("expected a binary message, a map in msgpack; got text")
        request = await off_loop.call(unpack, message, takes_long=len(message) > MANY_BYTES)
        if not isinstance(request, dict):
            raise MalformedBody(f"expected a map in msgpack; got {type(request).__name__}")
        endpoint = request.pop(roboarena.ENDPOINT, None)
        if endpoint == "reset":
            await self.episode.reset()
            return roboarena.RESET
        if endpoint not in (None, "infer"):
            raise MalformedBody(f"expected an endpoint of infer or reset; got {endpoint!r}"[:200])
        if endpoint is None and request.get("reset") is True:
            await self.episode.reset()
            return None
        step = await self.episode.step(request, self.patience_ns)
        action = step.outputs[self.episode.action]
        if endpoint == "infer":
            return pack(as_chunk(action), of_openpi)
        timing = self._timing(step, begun_ns)
        answer = {**step.outputs, "action": action, "actions": as_chunk(action), "server_timing": timing}
        return pack(answer, of_openpi)

    def refusal(self, error: ActserveError) -> str:
        return f"{error.code}: {error.message}"

    def _timing(self, step: Step, begun_ns: int) -> dict[str, float]:
        timing = {"infer_ms": step.run_ns / 1e6, "queue_ms": step.queue_ns / 1e6}
        if self._previous_ns is not None:
            timing["prev_total_ms"] = self._previous_ns / 1e6
        self._previous_ns = perf_counter_ns() - begun_ns
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
