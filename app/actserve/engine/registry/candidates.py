"""Candidates: a policy's aliases, canary and shadow that are in effect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from actserve.core.errors import ActserveError, InvalidRouting, StoreError
from actserve.core.limits import LIMITED
from actserve.core.signature import Signature, TensorSpec
from actserve.engine.policy import Policy
from actserve.engine.registry.shadow import Shadow
from actserve.store.routing import Routing

ROUTING = "routing"  # the key of a problem with `routing.json` itself

Load = Callable[[int], Awaitable[Policy | ActserveError]]


class Canary:
    """A version that acts on a share of the traffic: with a share of 0.25, on every fourth request."""

    def __init__(self, policy: Policy, share: float) -> None:
        self.policy = policy
        self.share = share
        self._requests = 0

    def takes_next(self) -> bool:
        """Count a request, and return whether the canary acts on it."""
        before = int(self._requests * self.share)
        self._requests += 1
        return int(self._requests * self.share) > before


class Candidates:
    """`routing` is what the operator asked for; `aliases`, `canary` and `shadow` are what is in effect.

    An alias whose new version cannot be loaded keeps its old one. `problems` are the differences between the two, by
    subject: "routing", "canary", "shadow" or "alias …".
    """

    def __init__(self) -> None:
        self.routing = Routing()
        self.aliases: dict[str, Policy] = {}
        self.canary: Canary | None = None
        self.shadow: Shadow | None = None
        self.problems: dict[str, ActserveError] = {}

    @property
    def has_candidate(self) -> bool:
        """Whether a canary or a shadow is in effect."""
        return self.canary is not None or self.shadow is not None

    def follow(self, routing: Routing | StoreError | None) -> None:
        """Adopt new routing. If it cannot be read, or disappeared with the store, the last one stays in effect."""
        self.problems.pop(ROUTING, None)
        if isinstance(routing, Routing):
            self.routing = routing
        elif routing is not None:
            self.problems[ROUTING] = routing

    async def load(self, live: Policy, load: Load) -> None:
        """Load the versions of `routing`, and put them into effect beside `live`."""
        self.problems = {subject: error for subject, error in self.problems.items() if subject == ROUTING}
        aliases = {}
        for alias, version in self.routing.aliases.items():
            policy = await self._load(f"alias {alias}", version, load) or self.aliases.get(alias)
            if policy is not None:
                aliases[alias] = policy
        self.aliases = aliases
        share = self.routing.canary
        canary = await self._load_candidate("canary", share.version if share else None, live, load)
        if canary is None or share is None:
            self.canary = None
        elif self.canary is None or (self.canary.policy, self.canary.share) != (canary, share.share):
            self.canary = Canary(canary, share.share)
        shadow = await self._load_candidate("shadow", self.routing.shadow, live, load)
        if shadow is None:
            self.shadow = None
        elif self.shadow is None or self.shadow.policy is not shadow:
            self.shadow = Shadow(shadow)

    async def _load_candidate(self, role: str, version: int | None, live: Policy, load: Load) -> Policy | None:
        """A version that can replace `live` for clients. None if there is none, or if it is the live version."""
        if version is None or version == live.version:
            return None
        policy = await self._load(role, version, load)
        if policy is None:
            return None
        if not serves_clients_of(live.signature, policy.signature):
            self.problems[role] = InvalidRouting(
                f"{policy.artifact.label} differs from the live version in its inputs or outputs"
            )
            return None
        if role == "shadow" and live.signature.state:
            self.problems[role] = InvalidRouting(
                "a policy with state cannot have a shadow: the state in a request is the live version's"
            )
            return None
        return policy

    async def _load(self, subject: str, version: int, load: Load) -> Policy | None:
        policy = await load(version)
        if isinstance(policy, ActserveError):
            self.problems[subject] = policy
            return None
        return policy

    def describe(self) -> dict[str, Any]:
        """JSON-able: the pin, the aliases, canary and shadow that are in effect, and the problems."""
        shadow = self.shadow
        return {
            "pin": self.routing.pin,
            "aliases": {alias: policy.version for alias, policy in self.aliases.items()},
            "canary": self.canary and {"version": self.canary.policy.version, "share": self.canary.share},
            "shadow": shadow and {"version": shadow.policy.version, **shadow.outcomes},
            "problems": {subject: {"code": e.code, "message": e.message} for subject, e in self.problems.items()},
        }


def serves_clients_of(live: Signature, candidate: Signature) -> bool:
    """Whether a version takes and gives what clients of the live one depend on.

    State does not count, as the service may hold it. Nor do limits that the live version lacks, and their output.
    """
    outputs = list(map(_unbounded, candidate.outputs))
    if live.limits is None and candidate.limits is not None:
        outputs = [spec for spec in outputs if spec.name != LIMITED]
    return outputs == list(map(_unbounded, live.outputs)) and all(
        getattr(candidate, part) == getattr(live, part) for part in ("observations", "parameters", "exploration")
    )


def _unbounded(spec: TensorSpec) -> TensorSpec:
    return replace(spec, low=None, high=None)
