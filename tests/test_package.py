"""Packages that reach the AOTI loader, and packages that are refused before."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from actserve.engine.runtimes import package
from actserve.engine.runtimes.package import inspect_package
from actserve.store.artifact import Artifact

MODEL = "p/data/aotinductor/model/"


def zipped(*members: str | zipfile.ZipInfo, content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member in members:
            archive.writestr(member, content)
    return buffer.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o120777 << 16
    return member


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"not a package", "it is not a zip archive"),
        (b"", "it is not a zip archive"),
        (zipped(), "it holds no AOTInductor model"),
        (zipped("p/archive_format"), "it holds no AOTInductor model"),
        (zipped(MODEL + "m.cpp"), "it is .cpp-only, without a .so: loading it would run a compiler"),
        (zipped(MODEL + "m.so", "p/../../etc/x"), "its member 'p/../../etc/x' is outside the package"),
        (zipped(MODEL + "m.so", "/etc/x"), "its member '/etc/x' is outside the package"),
        (zipped(MODEL + "m.so", "p\\..\\x"), "its member 'p\\\\..\\\\x' is outside the package"),
        (zipped(MODEL + "m.so", link("p/data/link")), "its member 'p/data/link' is a symbolic link"),
        (zipped(MODEL + "m.so", "p/data/aotinductor/other/m.so"), "it holds several models: model, other"),
        (zipped(MODEL + "m.so", "q/data/aotinductor/model/m.so"), "it holds several archives"),
        (
            zipped(MODEL + "m.so", "p/data/weights/pickled"),
            "its member 'p/data/weights/pickled' is no part of an AOTInductor model",
        ),
        (zipped(MODEL + "m.so", "p/models/m.json"), "its member 'p/models/m.json' is no part of an AOTInductor model"),
        (zipped(MODEL + "m.so", MODEL + "n.so"), "it holds 2 .so files; expected one"),
    ],
)
def test_a_package_that_the_loader_must_not_see(tmp_path: Path, data: bytes, reason: str) -> None:
    assert inspect_package(data) == reason
    (tmp_path / "p.pt2").write_bytes(data)
    assert inspect_package(tmp_path / "p.pt2") == reason


def test_a_package_holds_a_name_once() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zipped(MODEL + "m.so", MODEL + "m.so")
    assert inspect_package(data) == f"it holds {MODEL + 'm.so'!r} twice"


def test_a_package_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_UNPACKED_BYTES", 1000)
    data = zipped(MODEL + "m.so", content=bytes(1001))
    assert inspect_package(data) == "it would unpack to 1,001 bytes; at most 1,000 are read"
    monkeypatch.setattr(package, "MAX_MEMBERS", 0)
    assert inspect_package(data) == "it has 1 members; at most 0 are read"


def test_what_aotinductor_wrote_is_accepted(cart: Artifact) -> None:
    assert inspect_package(cart.folder / "policy.pt2") is None
