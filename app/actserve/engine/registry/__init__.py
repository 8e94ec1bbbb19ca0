"""Registry: which policies are live.

The highest version that can be served is, or the one that an operator pinned; what cannot be served is never run. The
registry follows its store: a new version is loaded, verified and warmed beside the old one, then traffic moves at once,
and the old one is unloaded when its last request, stream and session have gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Set
from typing import Any

from actserve.core.errors import NotServing, SessionsUnavailable, StoreError, UnknownPolicy, UnknownVersion
from actserve.core.settings import Settings
from actserve.core.signature import Arrays, Exploration
from actserve.engine.policy import Acted, Policy
from actserve.engine.registry.candidates import ROUTING, Candidates
from actserve.engine.registry.loaded import Key, Loaded, key_of
from actserve.engine.registry.refusals import Refusals
from actserve.engine.registry.shadow import OUTCOMES
from actserve.store import routing
from actserve.store.local import ModelStore
from actserve.store.routing import Routing
from actserve.telemetry.counts import Counts

log = logging.getLogger("actserve")

LOADING = "policies are being loaded"


class Registry:
    """The live policies of one store. `start` has it follow the store; `get` finds; `close` drains.

    `generation` changes whenever requests are to go another way. `swaps` counts, by policy, how often a version took
    over from another.
    """

    def __init__(self, store: ModelStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self.generation = 0
        self.counts = Counts()
        self.swaps: Counter[str] = Counter()
        self.in_sessions: Callable[[], Set[Key]] = frozenset  # the versions that sessions are on
        self._stored: dict[str, list[int]] = {}  # the versions that there were at the last look
        self._live: dict[str, Policy] = {}
        self._default: str | None = None
        self._beside: dict[str, Candidates] = {}
        self._loaded = Loaded(store, settings, self.counts)
        self._refused = Refusals(self._loaded, settings.poll_s)
        self._following: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()  # at the whole store, once
        self._loading = LOADING
        self._polling = asyncio.Lock()
        self._unreachable: str | None = None

    def start(self, rest_s: float = 0.0, reason: str = "") -> None:
        """`rest_s`: before anything is loaded, for a `reason` that whoever asks is told."""
        if rest_s:
            self._loading = f"{reason}; policies are loaded in {rest_s:.0f} s"
        self._following = asyncio.create_task(self._follow(rest_s))

    async def looked(self, within_s: float) -> None:
        """Returns once what the store has is loaded, or as far as it got."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._looked.wait(), within_s)

    async def close(self) -> None:
        """Answer what was accepted, then close every runtime."""
        if self._following is not None:
            self._following.cancel()
        await self._loaded.close()

    # what is live

    @property
    def loading(self) -> bool:
        return not self._looked.is_set()

    def not_ready(self) -> str | None:
        """Why requests cannot be answered yet, or None."""
        if self.loading:
            return self._loading
        if not self._live:
            return "no policy in the store can be served"
        if self._settings.policy not in (None, *self._live):
            return f"there is no policy {self._settings.policy!r} to serve by default"
        return None

    @property
    def default(self) -> str | None:
        """The policy behind `/act`: the one that the settings name, else the first by name when this began. What is
        published later changes nothing for clients that name no policy."""
        return self._settings.policy or self._default or min(self._live, default=None)

    @property
    def live(self) -> list[Policy]:
        return list(self._live.values())

    @property
    def names(self) -> list[str]:
        return sorted({*self._live, *self._refused.names})

    async def get(self, name: str | None = None, version: int | None = None) -> Policy:
        """The live policy, by default the default one. Raises `NotFound`, `Unavailable`, or why it is not served."""
        policy = self._get_live(name or self.default)
        if version is not None and version != policy.version:
            policy = await self._loaded.get(policy.name, version, fetch=False)  # a request's wish
            self._loaded.keep(policy)
        return policy

    async def resume(self, name: str, version: int) -> Policy:
        """The version that a session is on. Raises as `get`."""
        policy = self._get_live(name)
        if version != policy.version:
            policy = await self._loaded.get(name, version, fetch=False)
            self._loaded.keep_for_sessions(policy)
        return policy

    def _get_live(self, name: str | None) -> Policy:
        if name in self._live:
            return self._live[name]
        if self.loading:
            raise self._loading_still()
        if name is not None and (refused := self._refused.of(name)):
            raise refused[max(refused)]
        raise UnknownPolicy(name or "", sorted(self._live))

    def _loading_still(self) -> NotServing:
        return NotServing(f"{self._loading}; try again shortly")

    async def find(self, name: str, version: str | None) -> Policy:
        """The same for a version or an alias as clients write it. Raises `UnknownVersion` for what is neither, too."""
        if version is None:
            return await self.get(name)
        if version.isascii() and version.isdecimal() and len(version) < 10:
            return await self.get(name, int(version))
        await self.get(name)
        if name in self._beside and version in self._beside[name].aliases:
            return self._beside[name].aliases[version]
        raise UnknownVersion(name[:80], version, self._versions(name))

    # canary and shadow

    async def begin(self, name: str | None = None) -> Policy:
        """The version that a new episode of `name` is on from its first to its last step. Raises as `get`."""
        return self.split(await self.get(name), begins=True)

    def split(self, policy: Policy, begins: bool = False) -> Policy:
        """Who acts on a request for `policy`, the live one: itself, or the canary if it is due.

        State that a client carries is the live version's: such steps stay there, and only episodes whose state the
        service keeps go to the canary, from where they begin.
        """
        beside = self._beside_live(policy)
        if beside is None or beside.canary is None or (policy.signature.state and not begins):
            return policy
        return beside.canary.policy if beside.canary.is_due else policy

    def mirror(self, policy: Policy, tensors: Arrays, size: int, exploration: Exploration | None, acted: Acted) -> None:
        """Let the shadow of `policy` see what was asked, and how `policy` acted. Costs the request nothing."""
        beside = self._beside_live(policy)
        if beside is not None and beside.shadow is not None:
            beside.shadow.offer(tensors, size, exploration, acted)

    def splits(self, name: str) -> bool:
        """Whether some of the requests for `name` go to another version than the live one."""
        return name in self._beside and self._beside[name].splits

    def shadowed(self, name: str) -> dict[str, int]:
        """Items that the shadow of `name` was asked about, by what came of it."""
        shadow = self._beside[name].shadow if name in self._beside else None
        return dict.fromkeys(OUTCOMES, 0) if shadow is None else shadow.outcomes

    def _beside_live(self, policy: Policy) -> Candidates | None:
        return self._beside.get(policy.name) if self._live.get(policy.name) is policy else None

    # what is told

    def describe(self, name: str) -> dict[str, Any]:
        """JSON-able: the live version of `name`, what acts beside it, and what was refused and why."""
        if name not in self.names:
            raise self._loading_still() if self.loading else UnknownPolicy(name, self.names)
        policy = self._live.get(name)
        current = policy.describe() if policy else {"name": name, "version": None, "runtime": None, "reason": None}
        refused = {v: {"code": e.code, "message": e.message} for v, e in self._refused.of(name).items()}
        return {
            **current,
            "versions": self._versions(name),
            "loaded": [version for loaded, version in self._loaded.versions if loaded == name],
            "refused": refused,
            "routing": self._beside.get(name, Candidates()).describe(),
        }

    def manifest(self, name: str) -> dict[str, Any] | None:
        """JSON-able: that of the live version of `name`, if there is one."""
        return self._live[name].artifact.manifest.to_dict() if name in self._live else None

    def _versions(self, name: str) -> list[int]:
        """What there is of `name`, what is served of it included, wherever the store has gone meanwhile."""
        return self._stored.get(name) or ([self._live[name].version] if name in self._live else [])

    # following the store

    async def _follow(self, rest_s: float) -> None:
        await asyncio.sleep(rest_s)
        self._loading = LOADING
        while True:
            try:
                await self.poll()
            except Exception:  # whatever a store does, what is live is served
                log.exception("the store could not be looked at")
            self._looked.set()
            self._default = self._default or min(self._live, default=None)
            await asyncio.sleep(self._settings.poll_s)

    async def poll(self, anew: bool = False) -> None:
        """Look at the store and do what it says. `anew`: try what was refused, however short a time ago that was."""
        async with self._polling:
            if anew:
                self._refused.retry()
            found = await asyncio.to_thread(self._look)
            self._stored = {name: versions for name, (versions, _) in found.items()}
            for name, (versions, wishes) in found.items():
                await self._update(name, versions, wishes)
            for name in self._refused.names:
                self._refused.keep(
                    name, self._beside[name].routing.versions.union(found[name][0] if name in found else ())
                )
            stored = {(name, version) for name, (versions, _) in found.items() for version in versions}
            with contextlib.suppress(SessionsUnavailable):
                self._loaded.sweep(self.in_sessions, stored)

    def _look(self) -> dict[str, tuple[list[int], Routing | StoreError | None]]:
        """In a thread: the versions that there are, and the operator's wishes."""
        unreachable = None
        try:
            self._store.refresh()
        except StoreError as error:
            unreachable = error.message
        if unreachable not in (None, self._unreachable):
            log.warning("%s; what was fetched before is served", unreachable)
        self._unreachable = unreachable
        found: dict[str, tuple[list[int], Routing | StoreError | None]] = {}
        for name in self._store.names():
            with contextlib.suppress(UnknownPolicy):  # it has just gone
                versions = self._store.versions(name)
                try:
                    found[name] = versions, routing.read(self._store.root, name)
                except StoreError as error:
                    found[name] = versions, error
        return found

    async def _update(self, name: str, versions: list[int], wishes: Routing | StoreError | None) -> None:
        beside = self._beside.setdefault(name, Candidates())
        self._heed(beside, wishes)
        for version in routing.wanted(versions, beside.routing, self._serving(name)):
            policy = await self._refused.load(name, version)
            if isinstance(policy, Policy):
                self._go_live(name, policy)
                break
        if name in self._live:
            before = beside.canary, beside.shadow
            await beside.follow(self._live[name], lambda version: self._refused.load(name, version))
            self.generation += before != (beside.canary, beside.shadow)

    def _heed(self, beside: Candidates, wishes: Routing | StoreError | None) -> None:
        """Take in the wishes. While they cannot be read, or have gone with the store, the last ones hold."""
        beside.problems.pop(ROUTING, None)
        if isinstance(wishes, Routing):
            beside.routing = wishes
        elif wishes is not None:
            beside.problems[ROUTING] = wishes

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
        """Nobody has to do anything for it to be unloaded, unless sessions are on it."""
        try:
            needed = key_of(policy) in self.in_sessions()
        except SessionsUnavailable:
            needed = True
        if needed:
            self._loaded.keep_for_sessions(policy)
