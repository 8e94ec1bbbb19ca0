"""Checks the contents of a `.pt2` package with zipfile, before the loader opens it.

The loader is not safe for untrusted files: it trusts member names, compiles sources, and unpickles weights.
"""

from __future__ import annotations

import io
import stat
import zipfile
from pathlib import Path, PurePosixPath

MAX_UNPACKED_BYTES = 4 << 30
MAX_MEMBERS = 10_000
_MODELS = ("data", "aotinductor")  # below the archive's root folder; contains one folder per model
_OTHER_MEMBERS = {"archive_format", "archive_version", "byteorder", ".data"}


def inspect_package(package: bytes | Path) -> str | None:
    """Why the loader must not open this package, or None."""
    try:
        with zipfile.ZipFile(io.BytesIO(package) if isinstance(package, bytes) else package) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # NotImplementedError: unknown zip version
        return "it is not a zip archive"
    return _bad_member(members) or _bad_contents(members)


def _bad_member(members: list[zipfile.ZipInfo]) -> str | None:
    if len(members) > MAX_MEMBERS:
        return f"it has {len(members):,} members; at most {MAX_MEMBERS:,} are read"
    unpacked = sum(member.file_size for member in members)
    if unpacked > MAX_UNPACKED_BYTES:
        return f"it would unpack to {unpacked:,} bytes; at most {MAX_UNPACKED_BYTES:,} are read"
    seen: set[str] = set()
    for member in members:
        name = member.orig_filename
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name or ":" in name:
            return f"its member {name[:100]!r} is outside the package"
        if stat.S_ISLNK(member.external_attr >> 16):
            return f"its member {name[:100]!r} is a symbolic link"
        if name in seen:
            return f"it holds {name[:100]!r} twice"
        seen.add(name)
    return None


def _bad_contents(members: list[zipfile.ZipInfo]) -> str | None:
    paths = [PurePosixPath(member.filename).parts for member in members]
    if len({path[0] for path in paths if path}) > 1:
        return "it holds several archives"
    for path in paths:
        if path[1:3] != _MODELS and not {*path[1:2]} & _OTHER_MEMBERS:
            return f"its member {'/'.join(path)[:100]!r} is no part of an AOTInductor model"
    inside = [path[3:] for path in paths if path[1:3] == _MODELS and len(path) > 4]
    models = sorted({path[0] for path in inside})
    if not models:
        return "it holds no AOTInductor model"
    if len(models) > 1:
        return f"it holds several models: {', '.join(models)[:100]}"
    libraries = [path[-1] for path in inside if path[-1].endswith(".so")]
    if not libraries:
        return "it is .cpp-only, without a .so: loading it would run a compiler"
    if len(libraries) > 1:
        return f"it holds {len(libraries)} .so files; expected one"
    return None
