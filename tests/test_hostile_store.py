"""A malicious store: what its manifests and folders cannot do."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actserve.core.errors import InvalidManifest, StoreError
from actserve.store.artifact import FILE_LIMIT_BYTES, FILES_LIMIT, MANIFEST, MANIFEST_LIMIT_BYTES, SIGNATURE
from actserve.store.local import ModelStore
from tests.test_store import MANIFEST_DRAFT, edit

SECRET = b"what nobody else may read"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    (tmp_path / "built").write_bytes(b"program")
    (tmp_path / "secret").write_bytes(SECRET)
    store = ModelStore(tmp_path / "store")
    store.publish(MANIFEST_DRAFT, {"policy.onnx": tmp_path / "built"})
    return store


@pytest.fixture
def folder(store: ModelStore) -> Path:
    return store.root / "walker" / "1"


def record(data: bytes = SECRET, **changes: Any) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), **changes}


@pytest.mark.parametrize(
    "name",
    [
        "../../../secret",
        "/etc/passwd",
        "a/../b",
        "..",
        ".",
        "",
        ".hidden",
        "a\\b",
        "a\0b",
        "c:x",
        "x" * 101,
        "é",
        "x\n",
    ],
)
def test_a_manifest_names_plain_files_of_its_own_folder(store: ModelStore, folder: Path, name: str) -> None:
    edit(folder, lambda document: document.update(files={name: record()}, programs={"onnx": {"file": name}}))
    with pytest.raises(InvalidManifest, match=r"(?s)manifest\.json: files\..*String should match pattern"):
        store.resolve("walker")


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE])
def test_the_manifest_does_not_list_itself(store: ModelStore, folder: Path, name: str) -> None:
    edit(folder, lambda document: document["files"].update({name: record()}))
    with pytest.raises(InvalidManifest, match="cannot be one of files"):
        store.resolve("walker")


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes": -1},
        {"bytes": FILE_LIMIT_BYTES + 1},
        {"bytes": 10**400},
        {"bytes": "many"},
        {"sha256": "0" * 63},
        {"sha256": "../" * 22},
        {"sha256": None},
    ],
)
def test_sizes_and_hashes_are_that(store: ModelStore, folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, lambda document: document.update(files={"policy.onnx": record(b"program", **changes)}))
    with pytest.raises(InvalidManifest):
        store.resolve("walker")


def huge(document: dict[str, Any]) -> None:
    document["provenance"] = {"x": "y" * MANIFEST_LIMIT_BYTES}


def crowded(document: dict[str, Any]) -> None:
    document["files"] = {f"f{number}": record() for number in range(FILES_LIMIT + 1)}


@pytest.mark.parametrize(("change", "message"), [(huge, "more than 4,194,304 bytes"), (crowded, "at most 64 items")])
def test_a_manifest_is_bounded(
    store: ModelStore, folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(InvalidManifest, match=message):
        store.resolve("walker")


@pytest.mark.parametrize("levels", [100, 10_000, 1_000_000])
@pytest.mark.parametrize("field", ["provenance", "certificate", "environment", "signature", "programs"])
def test_deep_nesting_is_an_error_or_nothing(store: ModelStore, folder: Path, field: str, levels: int) -> None:
    document = json.loads((folder / MANIFEST).read_bytes()) | {field: "HERE"}
    deep = '{"a":' * levels + "1" + "}" * levels
    (folder / MANIFEST).write_text(json.dumps(document).replace('"HERE"', deep))
    try:
        artifact = store.resolve("walker")
    except InvalidManifest:
        return
    assert (levels, field in ("provenance", "certificate")) == (100, True)
    artifact.manifest.to_json()


@pytest.mark.parametrize("name", [MANIFEST, "policy.onnx", SIGNATURE])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "endless"])
def test_only_plain_files_are_read(store: ModelStore, folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if kind == "link":
        (folder / name).symlink_to(folder.parents[2] / "secret")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    errors: list[Exception] = []

    def look() -> None:
        try:
            artifact = store.resolve("walker")
            store.verify(artifact)
            assert (name, artifact.signer) == (SIGNATURE, None)
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for ever"
    assert len(errors) == (name != SIGNATURE)
    assert SECRET.decode() not in str(errors)


def test_a_file_that_is_swapped_after_it_was_looked_at_is_not_opened(store: ModelStore, folder: Path) -> None:
    artifact = store.resolve("walker")
    (folder / "policy.onnx").unlink()
    (folder / "policy.onnx").symlink_to(folder.parents[2] / "built")  # the same bytes, elsewhere
    with pytest.raises(StoreError, match=r"policy\.onnx cannot be read"):
        artifact.read_program("onnx")


def test_versions_and_policies_are_no_links(store: ModelStore, folder: Path) -> None:
    (folder.parent / "2").symlink_to("1")
    (store.root / "runner").symlink_to("walker")
    assert (store.names(), store.versions("walker")) == (["walker"], [1])


def test_a_sparse_giant_is_not_read(store: ModelStore, folder: Path) -> None:
    edit(folder, lambda document: document.update(files={"policy.onnx": record(bytes=1 << 40)}))
    os.truncate(folder / "policy.onnx", 1 << 40)
    with pytest.raises(InvalidManifest, match="less than or equal to"):
        store.resolve("walker")
