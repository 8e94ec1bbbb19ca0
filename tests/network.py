"""A store behind a network that can be cut, as an fsspec file system: network://bucket/store."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem

from actserve.store.local import ModelStore

URL = "network://bucket/store"


class Network(AbstractFileSystem):
    protocol = "network"
    files: ClassVar[dict[str, bytes]] = {}  # by path, "bucket/store/walker/1/manifest.json"
    asked: ClassVar[list[str]] = []  # the files that somebody wanted to open
    answers_left: ClassVar[float] = float("inf")  # until the network is gone

    @classmethod
    def answer(cls) -> None:
        if cls.answers_left <= 0:
            raise TimeoutError("endpoint https://10.0.0.1/bucket/store timed out")
        cls.answers_left -= 1

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        self.answer()
        inside = {
            file.removeprefix(f"{path}/").partition("/")[0::2] for file in self.files if file.startswith(f"{path}/")
        }
        if not inside:
            raise FileNotFoundError(path)
        kinds = {name: "directory" if rest else "file" for name, rest in inside}
        return [{"name": f"{path}/{name}", "type": kind, "size": 0} for name, kind in kinds.items()]

    def open(self, path: str, *_: Any, **__: Any) -> Reading:
        self.answer()
        path = self._strip_protocol(path)
        self.asked.append(path.removeprefix("bucket/store/"))
        if path not in self.files:
            raise FileNotFoundError(path)
        return Reading(self.files[path])


class Reading(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        Network.answer()
        return super().read(size)


def upload(store: ModelStore) -> None:
    for file in store.root.rglob("*"):
        if file.is_file():
            Network.files[f"bucket/store/{file.relative_to(store.root)}"] = file.read_bytes()


@contextmanager
def network() -> Iterator[None]:
    """An empty one."""
    fsspec.register_implementation(Network.protocol, Network, clobber=True)
    Network.files.clear()
    Network.asked.clear()
    Network.answers_left = float("inf")
    yield
    Network.files.clear()
