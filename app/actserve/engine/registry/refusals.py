"""Refusals: the versions that cannot be served, with the errors.

They are retried with exponential back-off, because a version may have been read while it was being copied.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass
from time import monotonic

from actserve.core.errors import ActserveError, StoreError
from actserve.engine.policy import Policy
from actserve.engine.registry.loaded import Loaded

log = logging.getLogger("actserve")

MAX_WAIT_S = 300.0


@dataclass(frozen=True)
class Refusal:
    error: ActserveError
    wait_s: float
    retry_at_s: float  # monotonic time


class Refusals:
    """Loads versions through `loaded`, and remembers failures. The first retry is after twice `wait_s`."""

    def __init__(self, loaded: Loaded, wait_s: float) -> None:
        self._loaded = loaded
        self._wait_s = wait_s
        self._refused: dict[str, dict[int, Refusal]] = {}

    @property
    def names(self) -> list[str]:
        return [name for name, refused in self._refused.items() if refused]

    def of(self, name: str) -> dict[int, ActserveError]:
        """The errors of a policy's refused versions, by version."""
        return {version: refusal.error for version, refusal in self._refused.get(name, {}).items()}

    async def load(self, name: str, version: int) -> Policy | ActserveError:
        """The policy, or the error if it cannot be served."""
        refused = self._refused.setdefault(name, {})
        before = refused.get(version)
        if before is not None and monotonic() < before.retry_at_s:
            return before.error
        try:
            policy = await self._loaded.get(name, version)
        except ActserveError as caught:
            error = caught
        except Exception:  # one broken policy must not stop the others
            log.exception("not served: %s@%s", name, version)
            error = StoreError(f"{name}@{version} could not be loaded")
        else:
            refused.pop(version, None)
            return policy
        if before is None or before.error.message != error.message:
            log.error("not served: %s", error.message)
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold references to the program
        wait_s = min(2 * (before.wait_s if before else self._wait_s), MAX_WAIT_S)
        refused[version] = Refusal(error, wait_s, monotonic() + wait_s)
        return error

    def retry(self) -> None:
        """Retry all versions on their next `load`, without a wait."""
        for refused in self._refused.values():
            for version, refusal in refused.items():
                refused[version] = Refusal(refusal.error, self._wait_s, monotonic())

    def keep(self, name: str, versions: Container[int]) -> None:
        """Forget all versions of `name` except `versions`."""
        refused = self._refused.get(name, {})
        self._refused[name] = {version: refusal for version, refusal in refused.items() if version in versions}
