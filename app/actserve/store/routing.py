"""Routing: which versions of a policy act, and for whom, as its operator wishes.

It is one small file beside the versions, `<root>/<name>/routing.json`, so that all workers follow it and it outlives
restarts. A store that is far away is read only: there it lies in this host's copy of the store.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actserve.core.errors import InvalidRequest, InvalidRouting, UnknownVersion
from actserve.store.artifact import read_plain
from actserve.store.local import STAGING, ModelStore

FILE = "routing.json"
LIMIT_BYTES = 64 << 10

Version = Annotated[int, Field(strict=True, ge=1, lt=10**9)]
Alias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")]  # never a number


class Share(BaseModel):
    """A candidate, and the part of the traffic that it gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Version
    share: float = Field(gt=0, lt=1)


class Routing(BaseModel):
    """What an operator wishes for one policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pin: Version | None = Field(None, description="The version to serve; None: the highest.")
    aliases: dict[Alias, Version] = Field({}, max_length=64, description="Names that URLs may have for versions.")
    canary: Share | None = None
    shadow: Version | None = Field(None, description="The version that is asked too, and whose actions nobody gets.")

    @property
    def versions(self) -> set[int]:
        """All that are named."""
        candidates = (self.pin, self.shadow, self.canary.version if self.canary else None)
        return {*self.aliases.values(), *(version for version in candidates if version is not None)}


def wanted(versions: Sequence[int], routing: Routing, serving: int | None) -> list[int]:
    """Which versions to try in place of `serving`, the best first, until one can be served; none of them: it stays.

    `versions`: ascending, all there are. When nothing is served, what is below the pin is better than nothing. That a
    version has gone from the store is no reason to stop serving it.
    """
    if routing.pin is not None and serving is not None:
        return [] if serving == routing.pin else [routing.pin]
    least = serving or 0
    return [v for v in reversed(versions) if least < v and (routing.pin is None or v <= routing.pin)]


def read(root: Path, name: str) -> Routing | None:
    """None: nobody has wished for anything. Raises `InvalidRouting`."""
    try:
        return Routing.model_validate_json(read_plain(root / name / FILE, LIMIT_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidRouting(f"{name}: {FILE} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        spot = ".".join(map(str, first["loc"])) or "the whole"
        raise InvalidRouting(f"{name}: {FILE}: {spot[:200]}: {first['msg']}") from None


# The operator's wishes. Each writes the file and returns what is in it. Raises `NotFound`, `InvalidRequest` or, when
# the file cannot be read or written, `InvalidRouting`.


def pin(store: ModelStore, name: str, version: int | None) -> Routing:
    """Serve `version`, whatever is published; None: the highest again."""
    return _change(store, name, version, pin=version)


def roll_back(store: ModelStore, name: str, serving: int | None = None) -> Routing:
    """Pin the version before `serving`, by default the one before the pinned or the highest one."""
    versions = store.versions(name)
    latest = serving or (read(store.root, name) or Routing()).pin or versions[-1]
    lower = [version for version in versions if version < latest]
    if not lower:
        raise InvalidRequest(f"expected a version of {name} before {latest}, to go back to; got none")
    return pin(store, name, lower[-1])


def alias(store: ModelStore, name: str, alias: str, version: int | None) -> Routing:
    """Let URLs say `alias` for `version`; None: no longer."""
    with _locked(store, name, version) as before:
        others = {known: v for known, v in before.aliases.items() if known != alias}
        return _write(store.root / name, before, aliases=others | ({} if version is None else {alias: version}))


def canary(store: ModelStore, name: str, version: int | None, share: float = 0.1) -> Routing:
    """Have `version` act on this share of the traffic, 0 < share < 1; None: on none."""
    return _change(store, name, version, canary=None if version is None else {"version": version, "share": share})


def shadow(store: ModelStore, name: str, version: int | None) -> Routing:
    """Ask `version` too, and compare; None: no longer."""
    return _change(store, name, version, shadow=version)


def _change(store: ModelStore, name: str, version: int | None, **changes: Any) -> Routing:
    with _locked(store, name, version) as before:
        return _write(store.root / name, before, **changes)


@contextmanager
def _locked(store: ModelStore, name: str, version: int | None) -> Iterator[Routing]:
    """What there is, while nobody else changes it. Raises `UnknownVersion` for a `version` that is not in the store,
    `InvalidRouting` for what the disk refuses."""
    versions = store.versions(name)
    if version is not None and version not in versions:
        raise UnknownVersion(name, version, versions)
    folder = store.root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield read(store.root, name) or Routing()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InvalidRouting(f"{name}: {FILE} cannot be written: {error.strerror}") from error


def _write(folder: Path, before: Routing, **changes: Any) -> Routing:
    try:
        routing = Routing.model_validate(before.model_dump() | changes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        got = str(first["input"])[:80]
        raise InvalidRequest(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; got {got!r}") from None
    descriptor, draft = tempfile.mkstemp(prefix=STAGING, dir=folder)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(routing.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(descriptor)
            os.fchmod(descriptor, 0o644)
        os.replace(draft, folder / FILE)
    except OSError:
        os.unlink(draft)
        raise
    return routing
