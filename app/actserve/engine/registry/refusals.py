"""Refusals: which versions cannot be served, and why.

They are tried again, after twice the time each time: a version may have been looked at while it was copied here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass
from time import monotonic

from actserve.core.errors import ActserveError, StoreError
from actserve.engine.policy import Policy
from actserve.engine.registry.loaded import Loaded

log = logging.getLogger("actserve")

AT_MOST_S = 300.0


@dataclass(frozen=True)
class Refusal:
    error: ActserveError
    wait_s: float
    again_s: float  # when it is tried again, by the clock


class Refusals:
    """Has versions `loaded`. The first to be refused is tried again after twice `wait_s`."""

    def __init__(self, loaded: Loaded, wait_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._loaded = loaded
        self._wait_s = wait_s
        self._clock = clock
        self._found: dict[str, dict[int, Refusal]] = {}

    @property
    def names(self) -> list[str]:
        return [name for name, refused in self._found.items() if refused]

    def of(self, name: str) -> dict[int, ActserveError]:
        """By version."""
        return {version: refusal.error for version, refusal in self._found.get(name, {}).items()}

    async def load(self, name: str, version: int) -> Policy | ActserveError:
        """The policy, or why it cannot be served."""
        refused = self._found.setdefault(name, {})
        before = refused.get(version)
        if before is not None and self._clock() < before.again_s:
            return before.error
        try:
            policy = await self._loaded.get(name, version)
        except ActserveError as caught:
            error = caught
        except Exception:  # one policy must not keep the others from being served
            log.exception("not served: %s@%s", name, version)
            error = StoreError(f"{name}@{version} could not be loaded")
        else:
            refused.pop(version, None)
            return policy
        if before is None or before.error.message != error.message:
            log.error("not served: %s", error.message)
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold the program
        wait_s = min(2 * (before.wait_s if before else self._wait_s), AT_MOST_S)
        refused[version] = Refusal(error, wait_s, self._clock() + wait_s)
        return error

    def retry(self) -> None:
        """Try all again, however short a time ago they were refused."""
        for refused in self._found.values():
            for version, refusal in refused.items():
                refused[version] = Refusal(refusal.error, self._wait_s, self._clock())

    def keep(self, name: str, versions: Container[int]) -> None:
        """Forget those of `name` that are none of `versions`."""
        refused = self._found.get(name, {})
        self._found[name] = {version: refusal for version, refusal in refused.items() if version in versions}
