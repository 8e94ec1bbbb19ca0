"""Loaded: the versions that are in memory.

A version is loaded once, however many ask for it, and unloaded when nobody refers to it any more: whoever acts with a
`Policy` holds it meanwhile, be it a request, a stream or a door of the lane. So nothing has to be counted, and nobody
is cut short.
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
from actserve.engine.malloc import give_back
from actserve.engine.policy import Policy
from actserve.store.local import ModelStore
from actserve.telemetry.counts import Counts

log = logging.getLogger("actserve")

UNUSED_S = 60.0  # after it was last asked for by its number

Key = tuple[str, int]  # name and version


class Loaded:
    """The policies of one store that are in memory. `get` brings them there; `close` ends them."""

    def __init__(
        self, store: ModelStore, settings: Settings, counts: Counts, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._settings = settings
        self._counts = counts
        self._clock = clock
        self._policies: weakref.WeakValueDictionary[Key, Policy] = weakref.WeakValueDictionary()
        self._loading: dict[Key, asyncio.Task[Policy]] = {}
        self._asked: dict[Key, tuple[Policy, float]] = {}  # kept until then
        self._resumed: dict[Key, tuple[Policy, float]] = {}  # likewise, for sessions
        self._ends: list[weakref.finalize[..., Policy]] = []
        self._unloading: set[asyncio.Task[None]] = set()

    @property
    def versions(self) -> list[Key]:
        return sorted(self._policies)

    async def get(self, name: str, version: int, fetch: bool = True) -> Policy:
        """The policy, verified and warm. `fetch`: from a store that is far away, have it brought here if need be.

        Raises `NotFound`, or the `StoreError`, `RuntimeRefused` or `RuntimeFailure` that it cannot be served for.
        """
        key = (name, version)
        policy = self._policies.get(key)
        if policy is not None:
            return policy
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(key, fetch))
            self._loading[key].add_done_callback(partial(self._arrived, key))
        try:
            return await asyncio.shield(self._loading[key])  # one caller's cancellation is not another's
        except NotFetched:
            if not fetch:
                raise
        return await self.get(name, version)  # it was being loaded for somebody who has nothing fetched

    def keep(self, policy: Policy) -> None:
        """Have `policy`, which was asked for by its number, stay loaded for a while though nobody is using it."""
        self._asked[key_of(policy)] = (policy, self._clock() + UNUSED_S)

    def keep_for_sessions(self, policy: Policy) -> None:
        """The same for one that sessions are on, and no longer than they are."""
        self._resumed[key_of(policy)] = (policy, self._clock() + UNUSED_S)

    def sweep(self, sessions: Callable[[], Container[Key]], stored: Container[Key]) -> None:
        """Let go of what was kept for long enough. `sessions`: the versions that any is on; while there is one, what is
        not `stored` and could not be loaded again stays."""
        now = self._clock()
        self._asked = {key: kept for key, kept in self._asked.items() if kept[1] > now}
        if self._resumed:
            needed = sessions()
            self._resumed = {
                key: kept
                for key, kept in self._resumed.items()
                if key in needed and (kept[1] > now or key not in stored)
            }

    async def close(self) -> None:
        """Answer what was accepted, then close every runtime."""
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        for end in self._ends:
            end.detach()
        await asyncio.gather(*(policy.close() for policy in self._policies.values()), *self._unloading)
        self._asked.clear()
        self._resumed.clear()

    async def _load(self, key: Key, fetch: bool) -> Policy:
        artifact = await asyncio.to_thread(self._store.resolve, *key, fetch)
        policy = await asyncio.to_thread(Policy.load, artifact, self._settings)
        policy.batcher.meters = self._counts.meters(policy.program)
        policy.start()
        self._policies[key] = policy
        # Garbage may be collected in any thread.
        in_loop = asyncio.get_running_loop().call_soon_threadsafe
        end = weakref.finalize(policy, in_loop, self._unload, artifact.label, policy.closing())
        end.atexit = False
        self._ends = [*(end for end in self._ends if end.alive), end]
        return policy

    def _arrived(self, key: Key, task: asyncio.Task[Policy]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # whoever waited for it has it

    def _unload(self, label: str, closing: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(_end(label, closing))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)


async def _end(label: str, closing: Callable[[], Awaitable[None]]) -> None:
    await closing()
    await asyncio.to_thread(give_back)
    log.info("%s is unloaded", label)


def key_of(policy: Policy) -> Key:
    return policy.name, policy.version
