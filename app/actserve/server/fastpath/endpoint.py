"""Endpoint: one live policy, as the fast path uses it."""

from __future__ import annotations

from actserve.engine.arena import BATCHES, Arena
from actserve.engine.policy import Policy


class Endpoint:
    """A policy with an arena. It keeps the policy loaded."""

    def __init__(self, policy: Policy, arena: Arena) -> None:
        self.policy, self.arena, self.batcher = policy, arena, policy.batcher
        self.item_bytes = arena.item_bytes
        self.max_items = min(BATCHES * policy.tuning.batch, policy.signature.max_batch)
