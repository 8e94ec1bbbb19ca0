"""Regions: parts of shared memory that clients on this host register, so that tensors need not travel in bodies.

A region is a POSIX shared memory object (a file in /dev/shm) of the service's own user. It is read and written with
system calls at its offsets, not mapped: a client that shortens it then causes an error, not the death of the worker.
Registrations are in one file, which all workers read: a client may register at one worker and act at another.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from actserve.core.errors import InvalidRequest, NotFound
from actserve.core.signature import Array
from actserve.server.access.tokens import Token

FOLDER = Path("/dev/shm")
MAX_REGIONS = 256
_KEY = re.compile(r"/?(?!\.{1,2}$)[A-Za-z0-9_.\-]{1,200}")
_NAME = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True)
class Region:
    """`offset` and `byte_size` are those of the registration, in the object `key`. Offsets of methods count from it."""

    name: str
    key: str
    offset: int
    byte_size: int


class OpenRegion:
    """A region whose object is open."""

    def __init__(self, region: Region, fd: int) -> None:
        self.region = region
        self._fd = fd

    def read(self, offset: int, buffer: Array) -> None:
        """Fill `buffer`, (n,) uint8, from `offset` on. Raises `InvalidRequest`."""
        self.check(offset, buffer.nbytes)
        done = 0
        while done < buffer.nbytes:
            count = os.preadv(self._fd, [buffer[done:].data], self.region.offset + offset + done)
            if not count:
                raise self._shortened(offset + buffer.nbytes)
            done += count

    def write(self, offset: int, data: bytes) -> None:
        """Raises `InvalidRequest`."""
        self.check(offset, len(data))
        if os.fstat(self._fd).st_size < self.region.offset + offset + len(data):  # writing would make it longer
            raise self._shortened(offset + len(data))
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, self.region.offset + offset + len(data) - len(view))
            view = view[count:]

    def close(self) -> None:
        os.close(self._fd)

    def check(self, offset: int, size_bytes: int) -> None:
        """Raises `InvalidRequest` unless these bytes are within the region."""
        if offset < 0 or offset + size_bytes > self.region.byte_size:
            raise InvalidRequest(
                f"shared memory region {self.region.name!r}: expected bytes within 0 to {self.region.byte_size:,}; got "
                f"{offset:,} to {offset + size_bytes:,}"
            )

    def _shortened(self, end: int) -> InvalidRequest:
        return InvalidRequest(
            f"shared memory region {self.region.name!r}: expected at least {self.region.offset + end:,} bytes; the "
            "object has become shorter"
        )


class Regions:
    """The registered regions. `path` is the file that all workers share; it is created with the first registration.

    Names are those of one `owner`, a client's token, or of all clients without one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None  # of the file, when it was read
        self._registered: dict[tuple[str | None, str], Region] = {}
        self._open: dict[tuple[str | None, str], OpenRegion] = {}

    def register(self, owner: str | None, region: Region) -> None:
        """Raises `InvalidRequest` if the name is in use, or the object is not one that may be registered."""
        os.close(_open(region))
        with self._changing() as registered:
            if (owner, region.name) in registered:
                raise InvalidRequest(f"a shared memory region {region.name!r} is registered; unregister it first")
            if len(registered) >= MAX_REGIONS:
                raise InvalidRequest(f"expected at most {MAX_REGIONS} shared memory regions; unregister some first")
            registered[owner, region.name] = region

    def unregister(self, owner: str | None, name: str | None) -> None:
        """Without a name, all of this owner."""
        with self._changing() as registered:
            for known in list(registered):
                if known[0] == owner and name in (None, known[1]):
                    del registered[known]

    def registered(self, owner: str | None, name: str | None = None) -> list[Region]:
        """Raises `NotFound` for an unknown name."""
        self._refresh()
        found = [region for (of, known), region in self._registered.items() if of == owner and name in (None, known)]
        if name is not None and not found:
            raise NotFound(f"no shared memory region {name[:80]!r} is registered")
        return found

    def find(self, owner: str | None, name: str) -> OpenRegion:
        """Raises `InvalidRequest` if it is not registered, or its object is gone."""
        self._refresh()
        key = (owner, name)
        if key not in self._registered:
            raise InvalidRequest(f"no shared memory region {name[:80]!r} is registered")
        if key not in self._open:
            region = self._registered[key]
            self._open[key] = OpenRegion(region, _open(region))
        return self._open[key]

    def close(self) -> None:
        for opened in self._open.values():
            opened.close()
        self._open.clear()

    def _refresh(self) -> None:
        """Read the file if another process has changed it."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return
        if self._stamp != (found.st_ino, found.st_mtime_ns):
            self._registered = _load(self._path)
            self._stamp = (found.st_ino, found.st_mtime_ns)
            self.close()

    @contextmanager
    def _changing(self) -> Iterator[dict[tuple[str | None, str], Region]]:
        """The registrations, to be changed; no other process changes them meanwhile."""
        with open(self._path.with_name(f"{self._path.name}.lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            registered = _load(self._path) if self._path.exists() else {}
            yield registered
            document = [{"owner": owner, **asdict(region)} for (owner, _), region in registered.items()]
            written = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            written.write_text(json.dumps(document))
            os.replace(written, self._path)


def owner_of(token: Token | None) -> str | None:
    """The owner of regions that a client with this token registers."""
    return None if token is None else token.name


def _load(path: Path) -> dict[tuple[str | None, str], Region]:
    found = {}
    for fields in json.loads(path.read_text()):
        owner = fields.pop("owner")
        region = Region(**fields)
        found[owner, region.name] = region
    return found


def _open(region: Region) -> int:
    """The file descriptor of the region's object. Raises `InvalidRequest`."""
    if _NAME.fullmatch(region.name) is None or _KEY.fullmatch(region.key) is None:
        raise InvalidRequest(
            "expected the name of a region in visible ASCII, and the key of a shared memory object without folders; "
            f"got {region.name[:80]!r} and {region.key[:80]!r}"
        )
    try:
        fd = os.open(FOLDER / region.key.lstrip("/"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidRequest(f"shared memory object {region.key!r} cannot be opened: {error.strerror}") from None
    found = os.fstat(fd)
    end = region.offset + region.byte_size
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        reason = "expected a shared memory object of the service's own user; got another's"
    elif not 0 <= region.offset < end <= found.st_size:
        reason = f"expected bytes within 0 to {found.st_size:,}; got {region.offset:,} to {end:,}"
    else:
        return fd
    os.close(fd)
    raise InvalidRequest(f"shared memory object {region.key!r}: {reason}")
