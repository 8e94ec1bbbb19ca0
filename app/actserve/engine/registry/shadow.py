"""Shadow: a version that acts on copies of the live version's requests. Its actions are compared and dropped."""

from __future__ import annotations

import asyncio
import logging

from actserve.core.errors import one_line
from actserve.core.signature import Array, Arrays, Exploration
from actserve.engine.golden import Tolerance, agreeing
from actserve.engine.policy import Acted, Policy

log = logging.getLogger("actserve")

MAX_PENDING = 8  # copied requests; while so many are pending, further ones are "dropped"
OUTCOMES = ("agreements", "disagreements", "failures", "dropped")


class Shadow:
    """Counts, in items, how often the actions of `policy` equal those of the live version."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.outcomes = dict.fromkeys(OUTCOMES, 0)  # items
        self._pending: set[asyncio.Task[None]] = set()
        self._failing = False  # logged already

    def offer(self, tensors: Arrays, size: int, exploration: Exploration | None, acted: Acted) -> None:
        """Act on a copy of a request, in a task of its own. `acted` is the live version's answer."""
        if len(self._pending) >= MAX_PENDING:
            self.outcomes["dropped"] += size
            return
        action = acted.outputs[self.policy.signature.action.name]
        task = asyncio.create_task(self._compare(tensors, size, exploration, acted.seed, action))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _compare(
        self, tensors: Arrays, size: int, exploration: Exploration | None, seed: int | None, action: Array
    ) -> None:
        try:
            acted = await self.policy.act(tensors, size, exploration, seed)
        except Exception as error:  # a shadow's failure is counted, whatever it is
            if not self._failing:
                log.warning("the shadow %s fails: %s", self.policy.artifact.label, one_line(error))
            self._failing = True
            self.outcomes["failures"] += size
            return
        self._failing = False
        spec = self.policy.signature.action
        tolerance = Tolerance().of(spec)  # the same as for golden samples
        same = int(agreeing(action, acted.outputs[spec.name], tolerance).sum())
        self.outcomes["agreements"] += same
        self.outcomes["disagreements"] += size - same
