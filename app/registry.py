"""Registry: which policies are live. The highest version that can be served is; what cannot is never run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from app.errors import ActserveError, NotServing, StoreError, UnknownPolicy, UnknownVersion
from app.policy import Policy
from app.settings import Settings
from app.store import ModelStore
from app.telemetry.counts import Counts

log = logging.getLogger("actserve")


class Registry:
    """The live policies of one store. `start` loads in the background; `get` finds; `close` drains."""

    def __init__(self, store: ModelStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self.generation = 0
        self.swaps = 0  # live versions that another has replaced
        self.counts = Counts()
        self._live: dict[str, Policy] = {}  # the current version of each
        self._pinned: dict[tuple[str, int], asyncio.Task[Policy]] = {}  # other versions, loaded when first asked for
        self._refused: dict[str, dict[int, ActserveError]] = {}  # why a version is not served
        self._loading: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loading = asyncio.create_task(self._load_all())

    async def close(self) -> None:
        """Answer what was accepted, then close every runtime."""
        if self._loading is not None:
            self._loading.cancel()
        pinned = await asyncio.gather(*self._pinned.values(), return_exceptions=True)
        policies = [*self._live.values(), *(policy for policy in pinned if isinstance(policy, Policy))]
        await asyncio.gather(*(policy.close() for policy in policies))

    @property
    def loading(self) -> bool:
        return self._loading is None or not self._loading.done()

    def not_ready(self) -> str | None:
        """Why requests cannot be answered yet, or None."""
        if self.loading:
            return "policies are being loaded"
        if not self._live:
            return "no policy in the store can be served"
        return None

    @property
    def default(self) -> str | None:
        """The policy behind `/act`: the one that the settings name, else the first by name."""
        return self._settings.policy or min(self._live, default=None)

    @property
    def live(self) -> list[Policy]:
        return list(self._live.values())

    @property
    def names(self) -> list[str]:
        return sorted({*self._live, *self._refused})

    async def get(self, name: str | None = None, version: int | None = None) -> Policy:
        """The live policy, by default the default one. Raises `NotFound`, `Unavailable`, or why it is not served."""
        if name is None:
            name = self.default
        if name in self._live:
            policy = self._live[name]
            if version is None or version == policy.artifact.manifest.version:
                return policy
            return await self._get_pinned(name, version)
        if self.loading:
            raise NotServing("policies are still being loaded; try again shortly")
        if name in self._refused:
            raise max(self._refused[name].items())[1]  # the highest version's reason
        raise UnknownPolicy(name or "", sorted(self._live))

    async def find(self, name: str, version: str | None) -> Policy:
        """The same for a version as clients write it. Raises `UnknownVersion` for what is no number, too."""
        if version is None:
            return await self.get(name)
        if not (version.isascii() and version.isdecimal() and len(version) < 10):
            raise UnknownVersion(name[:80], version, self.describe(name)["versions"])
        return await self.get(name, int(version))

    def describe(self, name: str) -> dict[str, Any]:
        """JSON-able: the live version of `name`, its manifest, and the versions that were refused."""
        if name not in self.names:
            raise UnknownPolicy(name, self.names)
        policy = self._live.get(name)
        current = policy.describe() if policy else {"name": name, "version": None, "runtime": None, "reason": None}
        refused = {v: {"code": e.code, "message": e.message} for v, e in self._refused.get(name, {}).items()}
        manifest = policy.artifact.manifest.to_dict() if policy else None
        return {**current, "versions": self._versions(name), "refused": refused, "manifest": manifest}

    def _versions(self, name: str) -> list[int]:
        """What there is of `name`, what is served of it included, wherever the store has gone meanwhile."""
        with contextlib.suppress(UnknownPolicy):
            return self._store.versions(name)
        return [self._live[name].artifact.manifest.version] if name in self._live else []

    async def _load_all(self) -> None:
        try:
            await asyncio.to_thread(self._store.refresh)
        except StoreError as error:
            log.warning("%s; what was fetched before is served", error.message)
        for name in self._store.names():
            await self._load_best(name)

    async def _load_best(self, name: str) -> None:
        """Serve the highest version that can be; remember why each higher one cannot."""
        for version in reversed(self._store.versions(name)):
            try:
                self._live[name] = await self._load(name, version)
                self.generation += 1
                return
            except ActserveError as error:
                log.error("not served: %s", error.message)
                self._refused.setdefault(name, {})[version] = error
            except Exception:  # one policy must not keep the others from being served
                log.exception("not served: %s@%s", name, version)
                self._refused.setdefault(name, {})[version] = StoreError(f"{name}@{version} could not be loaded")

    async def _load(self, name: str, version: int, fetch: bool = True) -> Policy:
        artifact = await asyncio.to_thread(self._store.resolve, name, version, fetch)
        policy = await asyncio.to_thread(Policy.load, artifact, self._settings)
        policy.batcher.meters = self.counts.meters(policy.program)
        policy.start()
        return policy

    async def _get_pinned(self, name: str, version: int) -> Policy:
        key = (name, version)
        if key not in self._pinned:
            self._pinned[key] = asyncio.create_task(self._load(name, version, fetch=False))  # it is a request's wish
        try:
            return await asyncio.shield(self._pinned[key])  # one caller's cancellation is not another's
        except ActserveError:
            self._pinned.pop(key, None)  # the next request may find it mended
            raise
