"""Shadow: a version that is asked what the live one was asked, after that has answered. Nobody gets its actions."""

from __future__ import annotations

import asyncio
import logging

from actserve.core.errors import ActserveError
from actserve.core.signature import Array, Arrays, Exploration
from actserve.engine.golden import Tolerance, agreeing
from actserve.engine.policy import Acted, Policy

log = logging.getLogger("actserve")

PENDING = 8  # requests that may wait for the shadow; further ones are not copied
# What can come of asking it about an item; it is not asked ("dropped") while it is behind.
OUTCOMES = ("agreements", "disagreements", "failures", "dropped")


class Shadow:
    """Counts, in items, how often the actions of `policy` are those of the live version."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.outcomes = dict.fromkeys(OUTCOMES, 0)  # items
        self._asked: set[asyncio.Task[None]] = set()
        self._fails = False  # the log has it

    def offer(self, tensors: Arrays, size: int, exploration: Exploration | None, acted: Acted) -> None:
        """`acted`: what the live version made of these. The shadow acts when the caller has let go of the loop."""
        if len(self._asked) >= PENDING:
            self.outcomes["dropped"] += size
            return
        action = acted.outputs[self.policy.signature.action.name]
        task = asyncio.create_task(self._compare(tensors, size, exploration, acted.seed, action))
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def _compare(
        self, tensors: Arrays, size: int, exploration: Exploration | None, seed: int | None, action: Array
    ) -> None:
        try:
            acted = await self.policy.act(tensors, size, exploration, seed)
        except ActserveError as error:
            if not self._fails:
                log.warning("%s, a shadow, fails: %s", self.policy.artifact.label, error.message)
            self._fails = True
            self.outcomes["failures"] += size
            return
        self._fails = False
        own = acted.outputs[self.policy.signature.action.name]
        same = int(agreeing(action, own, Tolerance()).sum())  # as its golden samples must
        self.outcomes["agreements"] += same
        self.outcomes["disagreements"] += size - same
