"""Manifest and Artifact: one immutable version of one policy, and the record that describes it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json

from app.environment import Environment
from app.errors import CorruptFile, InvalidManifest, MissingFile, NewerManifest, UnexpectedFile, UnfinishedVersion
from app.signature import Signature

FORMAT = 1  # of the manifest; a reader refuses what is newer than itself
MANIFEST = "manifest.json"
GOLDEN = "golden.safetensors"
MANIFEST_LIMIT_BYTES = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    __pydantic_config__ = ConfigDict(extra="forbid")

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Program:
    """One program file and what it needs of the host that runs it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: str
    requires: dict[str, Any] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()  # what was done to the captured graph before it was built


@dataclass(frozen=True)
class Manifest:
    """The store's record of one artifact. Written once, never changed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    name: str
    version: int
    parent: int | None  # the version that this one was made from, for another host
    created: str  # ISO 8601, UTC
    signature: Signature
    environment: Environment | None
    programs: dict[str, Program]  # by runtime name
    files: dict[str, FileRecord]  # everything in the folder but the manifest itself
    provenance: dict[str, Any]  # where it came from: factory, checkpoint, fingerprint, versions
    certificate: dict[str, Any]  # the evidence that the programs do what the policy does

    def to_json(self) -> bytes:
        return json.dumps(self.to_dict(), indent=1).encode() + b"\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. A Manifest is all data: nothing in it names a path or a host."""
        dumped: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return dumped

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        """Parse and validate. `where` names the artifact in errors. Raises `InvalidManifest` or `NewerManifest`."""
        try:
            raw = from_json(data)
        except ValueError as error:
            raise InvalidManifest(f"{where}: {MANIFEST} is not JSON: {error}") from None
        found = raw.get("format") if isinstance(raw, dict) else None
        if isinstance(found, int) and found > FORMAT:
            raise NewerManifest(
                f"{where}: the manifest has format {found}, this actserve reads up to {FORMAT}; upgrade actserve",
                expected=FORMAT,
                got=found,
            )
        try:
            manifest = _adapter().validate_python(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            spot = ".".join(map(str, first["loc"])) or "the whole"
            raise InvalidManifest(f"{where}: {MANIFEST}: {spot}: {first['msg']}") from None
        for runtime, program in manifest.programs.items():
            if program.file not in manifest.files:
                raise InvalidManifest(f"{where}: {MANIFEST}: the {runtime} program {program.file!r} is not in files")
        return manifest


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


@dataclass(frozen=True)
class Artifact:
    """One version folder, opened: its manifest was read; its files are hashed each time they are read."""

    folder: Path
    manifest: Manifest

    @property
    def label(self) -> str:
        return f"{self.manifest.name}@{self.manifest.version}"

    @staticmethod
    def open(folder: Path, label: str) -> Artifact:
        """Read the manifest and look over the folder (names and sizes, not contents). Raises a `StoreError`."""
        try:
            with open(folder / MANIFEST, "rb", opener=_no_follow) as file:
                data = file.read(MANIFEST_LIMIT_BYTES)
        except FileNotFoundError:
            raise UnfinishedVersion(f"{label}: there is no {MANIFEST}: publishing it was cut short") from None
        except OSError as error:
            raise InvalidManifest(f"{label}: {MANIFEST} cannot be read: {error.strerror}") from None
        artifact = Artifact(folder, Manifest.from_json(data, label))
        artifact._look_over()
        return artifact

    def _look_over(self) -> None:
        present = {entry.name: entry for entry in os.scandir(self.folder)}
        present.pop(MANIFEST, None)
        listed = self.manifest.files
        for name in listed.keys() - present.keys():
            raise MissingFile(f"{self.label}: {name} is in the manifest and not in the folder", file=name)
        for name in present.keys() - listed.keys():
            raise UnexpectedFile(f"{self.label}: {name} is in the folder and not in the manifest", file=name)
        for name, entry in present.items():
            if not entry.is_file(follow_symlinks=False):
                raise UnexpectedFile(f"{self.label}: {name} is not a plain file", file=name)
            self._check_size(name, entry.stat(follow_symlinks=False).st_size)

    def _check_size(self, name: str, size: int) -> None:
        expected = self.manifest.files[name].bytes
        if size != expected:
            raise CorruptFile(
                f"{self.label}: {name} has {size:,} bytes, the manifest says {expected:,}",
                file=name,
                expected_bytes=expected,
                got_bytes=size,
            )

    def read(self, name: str) -> bytes:
        """The bytes of one file, verified: what was hashed is what is returned. Raises a `StoreError`."""
        try:
            with open(self.folder / name, "rb", opener=_no_follow) as file:
                data = file.read(self.manifest.files[name].bytes + 1)
        except OSError as error:
            raise MissingFile(f"{self.label}: {name} cannot be read: {error.strerror}", file=name) from None
        self._check_size(name, len(data))
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.manifest.files[name].sha256:
            raise CorruptFile(
                f"{self.label}: {name} is not what was published: its SHA-256 is {digest[:12]}…, "
                f"the manifest says {self.manifest.files[name].sha256[:12]}…",
                file=name,
            )
        return data

    def read_program(self, runtime: str) -> bytes:
        return self.read(self.manifest.programs[runtime].file)


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)
