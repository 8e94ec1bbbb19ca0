"""Routing: the operator's choice of versions for one policy: pin, aliases, canary and shadow.

It is a small file beside the versions, `<root>/<name>/routing.json`. All workers follow it, and it survives restarts.
For a remote store, which is read only, it is in this host's cache.
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
    """A canary version and its share of the traffic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Version
    share: float = Field(gt=0, lt=1)


class Routing(BaseModel):
    """The operator's settings for one policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pin: Version | None = Field(None, description="The version to serve; None: the highest.")
    aliases: dict[Alias, Version] = Field({}, max_length=64, description="Names for versions, usable in URLs.")
    canary: Share | None = None
    shadow: Version | None = Field(None, description="The version that gets copies of requests.")

    @property
    def versions(self) -> set[int]:
        """All versions that the routing names."""
        candidates = (self.pin, self.shadow, self.canary.version if self.canary else None)
        return {*self.aliases.values(), *(version for version in candidates if version is not None)}


def versions_to_try(versions: Sequence[int], routing: Routing, serving: int | None) -> list[int]:
    """The versions to try in place of `serving`, best first. The first that loads goes live; if none does, it stays.

    `versions` are all versions in the store, ascending. If nothing is served, versions below the pin are a fallback. A
    version that was deleted from the store is still served.
    """
    if routing.pin is not None and serving is not None:
        return [] if serving == routing.pin else [routing.pin]
    least = serving or 0
    return [v for v in reversed(versions) if least < v and (routing.pin is None or v <= routing.pin)]


def read(root: Path, name: str) -> Routing | None:
    """The policy's routing, or None if it has none. Raises `InvalidRouting`."""
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


# The functions below change the file and return its new content. They raise `NotFound`, `InvalidRequest` or, if the
# file cannot be read or written, `InvalidRouting`.


def pin(store: ModelStore, name: str, version: int | None) -> Routing:
    """Serve `version` even if higher ones are published; None: serve the highest."""
    return _change(store, name, version, pin=version)


def roll_back(store: ModelStore, name: str, serving: int | None = None) -> Routing:
    """Pin the version before `serving`, by default the one before the pinned or the highest one."""
    versions = store.versions(name)
    latest = serving or (read(store.root, name) or Routing()).pin or versions[-1]
    lower = [version for version in versions if version < latest]
    if not lower:
        raise InvalidRequest(f"expected a version of {name} below {latest} to roll back to; got none")
    return pin(store, name, lower[-1])


def alias(store: ModelStore, name: str, alias: str, version: int | None) -> Routing:
    """Make `alias` a name for `version`; None removes it."""
    with _locked(store, name, version) as before:
        others = {known: v for known, v in before.aliases.items() if known != alias}
        return _write(store.root / name, before, aliases=others | ({} if version is None else {alias: version}))


def canary(store: ModelStore, name: str, version: int | None, share: float = 0.1) -> Routing:
    """Send `share` of the traffic to `version`, 0 < share < 1; None removes the canary."""
    return _change(store, name, version, canary=None if version is None else {"version": version, "share": share})


def shadow(store: ModelStore, name: str, version: int | None) -> Routing:
    """Send copies of requests to `version` and compare its actions; None removes the shadow."""
    return _change(store, name, version, shadow=version)


def _change(store: ModelStore, name: str, version: int | None, **changes: Any) -> Routing:
    with _locked(store, name, version) as before:
        return _write(store.root / name, before, **changes)


@contextmanager
def _locked(store: ModelStore, name: str, version: int | None) -> Iterator[Routing]:
    """The current routing, with an exclusive lock on it.

    Raises `UnknownVersion` for a `version` that is not in the store, and `InvalidRouting` if the disk fails.
    """
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
