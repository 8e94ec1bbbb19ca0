"""Registry: the live policies.

The live version of a policy is the highest one that can be served, or the pinned one. The registry polls its store: it
loads, verifies and warms a new version beside the old one, and then sends all traffic to the new one. The old version
is unloaded after its last request, stream and session have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Set
from typing import Any, TypeAlias

from actserve.core.errors import (
    ActserveError,
    NotServing,
    SessionsUnavailable,
    StoreError,
    UnknownPolicy,
    UnknownVersion,
)
from actserve.core.settings import Settings
from actserve.core.signature import Arrays, Exploration
from actserve.engine.policy import Acted, Policy
from actserve.engine.recorders import ServiceRecorder
from actserve.engine.registry.candidates import Candidates
from actserve.engine.registry.loaded import Key, Loaded, key_of
from actserve.engine.registry.refusals import Refusals
from actserve.engine.registry.shadow import OUTCOMES
from actserve.store import routing
from actserve.store.local import ModelStore
from actserve.store.routing import Routing
from actserve.telemetry.counts import Counts

log = logging.getLogger("actserve")

LOADING = "policies are being loaded"
Found: TypeAlias = dict[str, tuple[list[int], Routing | StoreError | None]]  # versions and routing, by policy


class Registry:
    """The live policies of one store. `start` begins to poll the store; `close` drains.

    `generation` changes when the version for a request may change. `swaps` counts hot swaps, by policy.
    """

    def __init__(self, store: ModelStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self.generation = 0
        self.counts = Counts()
        self.swaps: Counter[str] = Counter()
        self.session_versions: Callable[[], Set[Key]] = frozenset  # returns the versions that have sessions
        self._stored: dict[str, list[int]] = {}  # the store's versions at the last poll
        self._live: dict[str, Policy] = {}
        self._default: str | None = None
        self._candidates: dict[str, Candidates] = {}
        self._loaded = Loaded(store, settings, self.counts)
        self._refused = Refusals(self._loaded, settings.poll_s)
        self._poller: asyncio.Task[None] | None = None
        self._first_poll = asyncio.Event()  # set when it is done
        self._loading_reason = LOADING
        self._poll_lock = asyncio.Lock()
        self._unreachable: str | None = None

    @property
    def recorder(self) -> ServiceRecorder | None:
        """Records what the policies see and do; None: nothing does."""
        return self._loaded.recorder

    def record(self, recorder: ServiceRecorder) -> None:
        """Record every policy that is loaded from now on."""
        self._loaded.recorder = recorder

    def start(self, delay_s: float = 0.0, reason: str = "") -> None:
        """Begin to poll the store after `delay_s`. Until then, requests are refused with `reason`."""
        if delay_s:
            self._loading_reason = f"{reason}; policies are loaded in {delay_s:.0f} s"
        self._poller = asyncio.create_task(self._poll_forever(delay_s))

    async def wait_loaded(self, timeout_s: float) -> None:
        """Wait until the first poll has loaded the store's policies, or until the timeout."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._first_poll.wait(), timeout_s)

    async def close(self) -> None:
        """Answer the accepted requests, then close every runtime."""
        if self._poller is not None:
            self._poller.cancel()
        await self._loaded.close()

    # live versions

    @property
    def loading(self) -> bool:
        return not self._first_poll.is_set()

    def not_ready(self) -> str | None:
        """Why requests cannot be answered yet, or None."""
        if self.loading:
            return self._loading_reason
        if self.failed:
            return self.failed
        if not self._live:
            return self._unreachable or "no policy in the store can be served"
        if self._settings.policy not in (None, *self._live):
            return f"there is no policy {self._settings.policy!r} to serve by default"
        return None

    @property
    def failed(self) -> str | None:
        """Why a policy in memory can no longer act, until its process is replaced; None if all can."""
        return next((policy.batcher.failed for policy in self._in_memory if policy.batcher.failed), None)

    def check_programs(self, elapsed_ns: int) -> None:
        """To be called regularly, `elapsed_ns` after the last call. See `Batcher.check_program`."""
        for policy in self._in_memory:
            policy.check_program(elapsed_ns)

    @property
    def _in_memory(self) -> set[Policy]:
        return {*self._live.values(), *self._loaded.policies}

    @property
    def default(self) -> str | None:
        """The policy behind `/act`: the one in the settings, else the first by name at the first poll.

        A policy that is published later does not become the default, so clients that name no policy keep theirs.
        """
        return self._settings.policy or self._default or min(self._live, default=None)

    @property
    def live(self) -> list[Policy]:
        return list(self._live.values())

    @property
    def names(self) -> list[str]:
        return sorted({*self._live, *self._refused.names})

    async def get(self, name: str | None = None, version: int | None = None) -> Policy:
        """The live version of `name`, by default of the default policy; or the given version.

        Raises `NotFound`, `Unavailable`, or the error for which the version cannot be served.
        """
        policy = self._get_live(name or self.default)
        if version is not None and version != policy.version:
            policy = await self._loaded.get(policy.name, version, fetch=False)  # requests must not start downloads
            self._loaded.keep(policy)
        return policy

    async def resume(self, name: str, version: int) -> Policy:
        """The version of an existing session. Raises as `get`."""
        policy = self._get_live(name)
        if version != policy.version:
            policy = await self._loaded.get(name, version, fetch=False)
            self._loaded.keep_for_sessions(policy)
        return policy

    def _get_live(self, name: str | None) -> Policy:
        if name in self._live:
            return self._live[name]
        if not self.loading and name is not None and (refused := self._refused.of(name)):
            raise refused[max(refused)]
        raise self._unknown(name or "", sorted(self._live))

    def _unknown(self, name: str, known: list[str]) -> ActserveError:
        """The error for a policy that is not there, as far as the store could be read."""
        if self.loading:
            return NotServing(f"{self._loading_reason}; try again shortly")
        if self._unreachable is not None:
            return NotServing(f"{self._unreachable}; try again shortly")
        return UnknownPolicy(name, known)

    async def find(self, name: str, version: str | None) -> Policy:
        """As `get`; `version` is a number or an alias, from a URL. Raises `UnknownVersion` for other texts."""
        if version is None:
            return await self.get(name)
        if version.isascii() and version.isdecimal() and len(version) < 10:
            return await self.get(name, int(version))
        await self.get(name)
        if name in self._candidates and version in self._candidates[name].aliases:
            return self._candidates[name].aliases[version]
        raise UnknownVersion(name[:80], version, self._versions(name))

    # canary and shadow

    async def begin(self, name: str | None = None) -> Policy:
        """The version for all steps of a new episode of `name`. Raises as `get`."""
        return self.route(await self.get(name), new_episode=True)

    def route(self, policy: Policy, new_episode: bool = False) -> Policy:
        """The version that acts on a request for `policy`: the canary if the request is in its share, else `policy`.

        A client that carries the state itself stays on the live version, because the state is that version's. If the
        service holds the state, a whole episode goes to the canary.
        """
        candidates = self._candidates_of_live(policy)
        if candidates is None or candidates.canary is None or (policy.signature.state and not new_episode):
            return policy
        return candidates.canary.policy if candidates.canary.takes_next() else policy

    def mirror(self, policy: Policy, tensors: Arrays, size: int, exploration: Exploration | None, acted: Acted) -> None:
        """Send the shadow of `policy` a copy of a request and its answer. The request does not wait for it."""
        candidates = self._candidates_of_live(policy)
        if candidates is not None and candidates.shadow is not None:
            candidates.shadow.offer(tensors, size, exploration, acted)

    def has_candidate(self, name: str) -> bool:
        """Whether `name` has a canary or a shadow."""
        return name in self._candidates and self._candidates[name].has_candidate

    def shadow_outcomes(self, name: str) -> dict[str, int]:
        """The shadow's items, by outcome."""
        shadow = self._candidates[name].shadow if name in self._candidates else None
        return dict.fromkeys(OUTCOMES, 0) if shadow is None else shadow.outcomes

    def _candidates_of_live(self, policy: Policy) -> Candidates | None:
        """The candidates of `policy`, if it is a live version."""
        return self._candidates.get(policy.name) if self._live.get(policy.name) is policy else None

    # description

    def describe(self, name: str) -> dict[str, Any]:
        """JSON-able: the live version of `name`, its candidates, and the refused versions with their errors."""
        if name not in self.names:
            raise self._unknown(name, self.names)
        policy = self._live.get(name)
        current = policy.describe() if policy else {"name": name, "version": None, "runtime": None, "reason": None}
        refused = {v: {"code": e.code, "message": e.message} for v, e in self._refused.of(name).items()}
        return {
            **current,
            "versions": self._versions(name),
            "loaded": [version for loaded, version in self._loaded.versions if loaded == name],
            "refused": refused,
            "routing": self._candidates.get(name, Candidates()).describe(),
        }

    def manifest(self, name: str) -> dict[str, Any] | None:
        """JSON-able: the manifest of the live version of `name`, or None."""
        return self._live[name].artifact.manifest.to_dict() if name in self._live else None

    def _versions(self, name: str) -> list[int]:
        """The store's versions of `name`; if it has none any more, the live one."""
        return self._stored.get(name) or ([self._live[name].version] if name in self._live else [])

    # polling the store

    async def _poll_forever(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._loading_reason = LOADING
        while True:
            try:
                await self.poll()
            except Exception:  # an error in the store must not stop the live policies
                log.exception("the store could not be polled")
            self._first_poll.set()
            self._default = self._default or min(self._live, default=None)
            await asyncio.sleep(self._settings.poll_s)

    async def poll(self, retry: bool = False) -> None:
        """Read the store and update the live versions. `retry`: load refused versions again without a wait."""
        async with self._poll_lock:
            if retry:
                self._refused.retry()
            unreachable, found = await asyncio.to_thread(self._read_store)
            if unreachable not in (None, self._unreachable):
                log.warning("%s; versions that were fetched before are still served", unreachable)
            self._unreachable = unreachable or self._unreachable  # until what is found now is served
            self._stored = {name: versions for name, (versions, _) in found.items()}
            for name, (versions, policy_routing) in found.items():
                await self._update(name, versions, policy_routing)
            self._unreachable = unreachable
            for name in self._refused.names:
                routed = self._candidates[name].routing.versions
                self._refused.keep(name, routed.union(self._stored.get(name, ())))
            stored = {(name, version) for name, versions in self._stored.items() for version in versions}
            with contextlib.suppress(SessionsUnavailable):
                self._loaded.sweep(self.session_versions, stored)

    def _read_store(self) -> tuple[str | None, Found]:
        """Why the store cannot be read, or None; the versions and the routing of each policy. Blocks."""
        unreachable = self._refresh()
        found: Found = {}
        names = self._store.names()
        for name in names:
            with contextlib.suppress(UnknownPolicy):  # deleted meanwhile
                versions = self._store.versions(name)
                try:
                    found[name] = versions, routing.read(self._store.root, name)
                except StoreError as error:
                    found[name] = versions, error
        if not found or len(found) < len(names):  # a store that went away meanwhile looks like an empty one
            unreachable = unreachable or self._refresh()
        return unreachable, found

    def _refresh(self) -> str | None:
        try:
            self._store.refresh()
        except StoreError as error:
            return error.message
        return None

    async def _update(self, name: str, versions: list[int], policy_routing: Routing | StoreError | None) -> None:
        candidates = self._candidates.setdefault(name, Candidates())
        candidates.follow(policy_routing)
        for version in routing.versions_to_try(versions, candidates.routing, self._serving(name)):
            policy = await self._refused.load(name, version)
            if isinstance(policy, Policy):
                self._go_live(name, policy)
                break
        if name in self._live:
            before = candidates.canary, candidates.shadow
            await candidates.load(self._live[name], lambda version: self._refused.load(name, version))
            self.generation += before != (candidates.canary, candidates.shadow)

    def _serving(self, name: str) -> int | None:
        return self._live[name].version if name in self._live else None

    def _go_live(self, name: str, policy: Policy) -> None:
        old = self._live.get(name)
        self._live[name] = policy
        self.generation += 1
        if old is not None:
            self.swaps[name] += 1
            self._retire(old)
            log.info("%s takes over from %s", policy.artifact.label, old.artifact.label)

    def _retire(self, policy: Policy) -> None:
        """Keep a replaced version in memory if it has sessions. Otherwise it is unloaded after its last request."""
        try:
            has_sessions = key_of(policy) in self.session_versions()
        except SessionsUnavailable:
            has_sessions = True
        if has_sessions:
            self._loaded.keep_for_sessions(policy)
