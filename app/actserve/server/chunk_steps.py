"""ChunkSteps: hands out the chunks of one episode action by action."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from actserve.core.errors import InvalidRequest
from actserve.core.plan import Plan
from actserve.core.signature import Signature
from actserve.engine.policy import Acted


def chunk_steps(signature: Signature, query: Mapping[str, str], selected: Sequence[str]) -> ChunkSteps | None:
    """The steps that `?chunk=step&ahead=2` asks for; None: the answers are whole chunks.

    `selected` are the outputs that `query` wants. Raises `InvalidRequest`.
    """
    wanted, ahead = query.get("chunk", "whole"), query.get("ahead", "0")
    if wanted not in ("whole", "step") or not (ahead.isascii() and ahead.isdecimal() and len(ahead) < 5):
        got = f"chunk={wanted}, ahead={ahead}"[:80]
        raise InvalidRequest(f"expected chunk=whole, or chunk=step and the steps in ahead; got {got}")
    if wanted == "whole":
        return None
    planned = signature.planned.name
    if "outputs" in query and set(selected) - {planned}:
        raise InvalidRequest(f"chunk=step answers {planned} alone; got outputs={query['outputs']}"[:200])
    return ChunkSteps(signature, int(ahead))


class ChunkSteps:
    """The policy runs when `execute` actions of the last chunk were taken, on the observation of that step.

    With `ahead`, it begins so many steps earlier, on an earlier observation, and its chunk is used from the same step
    on: nothing waits for it, and the actions do not depend on how long it takes. Raises `InvalidRequest`.
    """

    def __init__(self, signature: Signature, ahead: int) -> None:
        assert signature.chunk is not None
        self.action = signature.planned_action
        self._chunk, self._horizon = signature.chunk, signature.planned.shape[0]
        if ahead > self._chunk.execute // 2:
            raise InvalidRequest(
                f"expected ahead to be at most half of the {self._chunk.execute} actions that are taken of a chunk; "
                f"got {ahead}"
            )
        if ahead and signature.slows_chunks:
            raise InvalidRequest(
                f"expected ahead=0: this policy limits the change between two actions, and the first {ahead} of each "
                "chunk would be left out"
            )
        self._ahead = ahead
        self._coming: tuple[int, asyncio.Task[Acted]] | None = None  # the tick of its observation
        self._begin()

    def _begin(self) -> None:
        self.close()
        self._plan, self._tick = Plan(self._chunk, self._horizon), 0

    async def step(
        self, run: Callable[[], Awaitable[Acted]], adopt: Callable[[Acted], None], is_init: bool = False
    ) -> Acted:
        """The action of the next step, (1, *shape). `run` runs the policy on the step's observation.

        `adopt` is called with its result once its chunk is used. Raises as `run`; then the step was not taken.
        """
        if is_init:
            self._begin()
        tick, used = self._tick, None
        if self._is_time(0):
            if self._coming is None:
                self._coming = tick, asyncio.ensure_future(run())
            used = await self._come()
            adopt(used)
        if self._coming is None and self._is_time(self._ahead):
            self._coming = tick, asyncio.ensure_future(run())
            await asyncio.sleep(0)  # it begins before the next message is read
        action = self._plan.action(tick)
        assert action is not None
        self._tick += 1
        queue_ns, run_ns = (0, 0) if used is None else (used.queue_ns, used.run_ns)
        return Acted({self.action.name: action[None]}, None if used is None else used.seed, queue_ns, run_ns)

    def _is_time(self, ahead: int) -> bool:
        """Whether a new chunk is needed `ahead` steps later."""
        return self._plan.taken(self._tick) + ahead >= self._chunk.execute

    async def _come(self) -> Acted:
        """Wait for the chunk that comes, and plan with it."""
        assert self._coming is not None
        tick, running = self._coming
        try:
            acted = await asyncio.shield(running)
        finally:
            if running.done():
                self._coming = None
        self._plan.add(tick, acted.outputs[self._chunk.output][0])
        return acted

    def close(self) -> None:
        """The result that may still come is not used."""
        if self._coming is not None:
            _, running = self._coming
            running.add_done_callback(_retrieve)
            self._coming = None


def _retrieve(running: asyncio.Task[Acted]) -> None:
    with suppress(asyncio.CancelledError):
        running.exception()
