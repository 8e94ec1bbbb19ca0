"""Candidates: what an operator has act beside a policy's live version, as far as it can be had."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from actserve.core.errors import ActserveError, InvalidRouting
from actserve.engine.policy import Policy
from actserve.engine.registry.shadow import Shadow
from actserve.store.routing import Routing

ROUTING = "routing"  # a problem with the wishes themselves

Load = Callable[[int], Awaitable[Policy | ActserveError]]


class Canary:
    """A candidate that acts on a part of the traffic: with a share of 0.25 on every fourth request."""

    def __init__(self, policy: Policy, share: float) -> None:
        self.policy = policy
        self.share = share
        self._requests = 0

    @property
    def is_due(self) -> bool:
        """Whether the next request is the candidate's; asking counts it."""
        before = int(self._requests * self.share)
        self._requests += 1
        return int(self._requests * self.share) > before


class Candidates:
    """`routing` is what is wished for, the rest what came of it: a version that cannot be had changes nothing.

    `problems`: why something is not as wished, by what it is about: "routing", "canary", "shadow" or "alias …".
    """

    def __init__(self) -> None:
        self.routing = Routing()
        self.aliases: dict[str, Policy] = {}
        self.canary: Canary | None = None
        self.shadow: Shadow | None = None
        self.problems: dict[str, ActserveError] = {}

    @property
    def splits(self) -> bool:
        """Whether anything but the live version acts on requests for it."""
        return self.canary is not None or self.shadow is not None

    async def follow(self, live: Policy, load: Load) -> None:
        self.problems = {what: error for what, error in self.problems.items() if what == ROUTING}
        aliases = {}
        for alias, version in self.routing.aliases.items():
            policy = await self._find(f"alias {alias}", version, load) or self.aliases.get(alias)
            if policy is not None:
                aliases[alias] = policy
        self.aliases = aliases
        share, wish = self.routing.canary, self.routing.shadow
        candidate = await self._candidate("canary", share.version if share else None, live, load)
        if candidate is None or share is None:
            self.canary = None
        elif self.canary is None or (self.canary.policy, self.canary.share) != (candidate, share.share):
            self.canary = Canary(candidate, share.share)
        shadow = await self._candidate("shadow", wish, live, load)
        if shadow is None:
            self.shadow = None
        elif self.shadow is None or self.shadow.policy is not shadow:
            self.shadow = Shadow(shadow)

    async def _candidate(self, role: str, version: int | None, live: Policy, load: Load) -> Policy | None:
        """A version that can stand in for `live`; None, too, when it is the live one."""
        if version is None or version == live.version:
            return None
        policy = await self._find(role, version, load)
        if policy is None:
            return None
        if _for_clients(policy) != _for_clients(live):
            self.problems[role] = InvalidRouting(f"{policy.artifact.label} takes or gives something else than the live")
            return None
        if role == "shadow" and live.signature.state:
            self.problems[role] = InvalidRouting("a policy with state has no shadow: the state would be another's")
            return None
        return policy

    async def _find(self, what: str, version: int, load: Load) -> Policy | None:
        found = await load(version)
        if isinstance(found, ActserveError):
            self.problems[what] = found
            return None
        return found

    def describe(self) -> dict[str, Any]:
        """JSON-able: what acts beside the live version, and what is wished for and is not so."""
        shadow = self.shadow
        return {
            "pin": self.routing.pin,
            "aliases": {alias: policy.version for alias, policy in self.aliases.items()},
            "canary": self.canary and {"version": self.canary.policy.version, "share": self.canary.share},
            "shadow": shadow and {"version": shadow.policy.version, **shadow.outcomes},
            "problems": {what: {"code": e.code, "message": e.message} for what, e in self.problems.items()},
        }


def _for_clients(policy: Policy) -> tuple[Any, ...]:
    """What a client has to know of it; where the service keeps the state, that is nobody else's business."""
    signature = policy.signature
    return signature.observations, signature.outputs, signature.parameters, signature.exploration
