"""Loaded: the versions that are in memory.

Concurrent requests for a version share one load. A version is unloaded when no reference to its `Policy` is left.
Requests, streams and the fast path hold such a reference while they act, so a version in use is never unloaded, and no
usage counter is needed.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Awaitable, Callable, Container
from functools import partial

from actserve.core.errors import NotFetched
from actserve.core.settings import Settings
from actserve.engine.malloc import trim
from actserve.engine.narrower import narrower
from actserve.engine.policy import Policy
from actserve.engine.recorders import ServiceRecorder
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve.telemetry.counts import Counts

log = logging.getLogger("actserve")

UNUSED_S = 60.0  # an unused version stays in memory for so long after its last use

Key = tuple[str, int]  # name and version


class Loaded:
    """The policies of one store that are in memory. `get` loads them; `close` closes them."""

    def __init__(
        self, store: ModelStore, settings: Settings, counts: Counts, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._settings = settings
        self._counts = counts
        self._clock = clock
        self.recorder: ServiceRecorder | None = None  # of what the policies see and do
        self._policies: weakref.WeakValueDictionary[Key, Policy] = weakref.WeakValueDictionary()
        self._loading: dict[Key, asyncio.Task[Policy]] = {}
        self._kept: dict[Key, tuple[Policy, float]] = {}  # with the time until which it is kept
        self._kept_for_sessions: dict[Key, tuple[Policy, float]] = {}
        self._finalizers: list[weakref.finalize[..., Policy]] = []
        self._unloading: set[asyncio.Task[None]] = set()

    @property
    def versions(self) -> list[Key]:
        return sorted(self._policies)

    @property
    def policies(self) -> list[Policy]:
        return list(self._policies.values())

    async def get(self, name: str, version: int, fetch: bool = True) -> Policy:
        """The policy, verified and warm. `fetch`: a remote store may download it.

        Raises `NotFound`, `StoreError`, `RuntimeRefused` or `RuntimeFailure`.
        """
        key = (name, version)
        policy = self._policies.get(key)
        if policy is not None:
            return policy
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(key, fetch))
            self._loading[key].add_done_callback(partial(self._load_done, key))
        try:
            return await asyncio.shield(self._loading[key])  # a cancelled caller must not cancel the other callers
        except NotFetched:
            if not fetch:
                raise
        return await self.get(name, version)  # the failed load was started by a caller that passed `fetch=False`

    def keep(self, policy: Policy) -> None:
        """Keep `policy`, which is not the live version, in memory for `UNUSED_S` after its last use."""
        self._kept[key_of(policy)] = (policy, self._clock() + UNUSED_S)

    def keep_for_sessions(self, policy: Policy) -> None:
        """The same for a version with sessions, but at most as long as it has any."""
        self._kept_for_sessions[key_of(policy)] = (policy, self._clock() + UNUSED_S)

    def sweep(self, session_versions: Callable[[], Container[Key]], stored: Container[Key]) -> None:
        """Release the policies whose time has passed.

        `session_versions` returns the versions that have sessions. Such a version stays in memory if it is no longer
        `stored`, because it could not be loaded again.
        """
        now = self._clock()
        self._kept = {key: kept for key, kept in self._kept.items() if kept[1] > now}
        if self._kept_for_sessions:
            needed = session_versions()
            self._kept_for_sessions = {
                key: kept
                for key, kept in self._kept_for_sessions.items()
                if key in needed and (kept[1] > now or key not in stored)
            }

    async def close(self) -> None:
        """Answer the accepted requests, then close every runtime."""
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        for finalizer in self._finalizers:
            finalizer.detach()
        await asyncio.gather(*(policy.close() for policy in self._policies.values()), *self._unloading)
        self._kept.clear()
        self._kept_for_sessions.clear()

    async def _load(self, key: Key, fetch: bool) -> Policy:
        artifact = await asyncio.to_thread(self._store.resolve, *key, fetch)
        others: list[Artifact] = []
        if self._settings.precision == "any":
            others = await asyncio.to_thread(narrower, self._store, artifact, fetch)
        policy = await asyncio.to_thread(Policy.load, artifact, self._settings, others)
        policy.batcher.meters = self._counts.meters(policy.program)
        if self.recorder is not None:
            policy.recorder = self.recorder.of(policy.artifact, policy.choice.runtime)
        policy.start()
        self._policies[key] = policy
        # The finalizer may run in any thread.
        in_loop = asyncio.get_running_loop().call_soon_threadsafe
        finalizer = weakref.finalize(policy, in_loop, self._unload, artifact.label, policy.closing())
        finalizer.atexit = False
        self._finalizers = [*(known for known in self._finalizers if known.alive), finalizer]
        return policy

    def _load_done(self, key: Key, task: asyncio.Task[Policy]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # mark it as retrieved: the callers get it from `get`

    def _unload(self, label: str, closing: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(_close(label, closing))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)


async def _close(label: str, closing: Callable[[], Awaitable[None]]) -> None:
    await closing()
    await asyncio.to_thread(trim)
    log.info("%s is unloaded", label)


def key_of(policy: Policy) -> Key:
    return policy.name, policy.version
