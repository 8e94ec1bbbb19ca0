from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actserve.core.errors import (
    CorruptFile,
    InvalidManifest,
    InvalidName,
    MisplacedVersion,
    MissingFile,
    NewerManifest,
    StoreError,
    UnexpectedFile,
    UnfinishedVersion,
    UnknownPolicy,
    UnknownVersion,
)
from actserve.core.signature import Signature, TensorSpec
from actserve.store.artifact import FORMAT, MANIFEST, Manifest, Program
from actserve.store.local import ModelStore

MANIFEST_DRAFT = Manifest(
    format=FORMAT,
    name="walker",
    version=1,
    parent=None,
    created="2026-01-01T00:00:00+00:00",
    signature=Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("action", "int64", ()),), 4),
    environment=None,
    programs={"onnx": Program("policy.onnx")},
    files={},
    provenance={"fingerprint": "f"},
    certificate={},
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "built"
    file.write_bytes(b"program")
    return file


@pytest.fixture
def store(tmp_path: Path, source: Path) -> ModelStore:
    store = ModelStore(tmp_path / "store")
    store.publish(MANIFEST_DRAFT, {"policy.onnx": source})
    return store


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / MANIFEST).read_bytes())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def test_what_was_published_is_found_and_read(store: ModelStore) -> None:
    artifact = store.resolve("walker")
    assert (store.names(), store.versions("walker"), artifact.label) == (["walker"], [1], "walker@1")
    assert artifact.read_program("onnx") == b"program"
    assert artifact.manifest == Manifest.from_json(artifact.manifest.to_json(), "walker@1")
    store.verify(artifact)


def test_the_highest_version_is_the_default(store: ModelStore, source: Path) -> None:
    for _ in range(10):
        store.publish(MANIFEST_DRAFT, {"policy.onnx": source})
    assert store.resolve("walker").manifest.version == 11
    assert store.resolve("walker", 2).manifest.version == 2


@pytest.mark.parametrize("name", ["nobody", "", "..", ".", "walker/1", "../store/walker", "walker\0", "WALKER"])
def test_names_are_looked_up_never_joined(store: ModelStore, name: str) -> None:
    with pytest.raises(UnknownPolicy, match="walker"):
        store.resolve(name)


def test_a_file_that_it_never_had_is_missing(store: ModelStore) -> None:
    with pytest.raises(MissingFile, match=r"there is no golden\.safetensors in its manifest"):
        store.resolve("walker").read("golden.safetensors")


def test_an_unknown_version_names_the_known(store: ModelStore) -> None:
    with pytest.raises(UnknownVersion, match="known: 1"):
        store.resolve("walker", 2)


@pytest.mark.parametrize("name", ["", "Walker", "a/b", "..", "-a", "a_b", "a" * 9 + "\n"])
def test_a_bad_name_is_not_published(store: ModelStore, source: Path, name: str) -> None:
    with pytest.raises(InvalidName):
        store.publish(dataclasses.replace(MANIFEST_DRAFT, name=name), {"policy.onnx": source})


def corrupt(folder: Path) -> None:
    (folder / "policy.onnx").write_bytes(b"Program")


def truncate(folder: Path) -> None:
    (folder / "policy.onnx").write_bytes(b"prog")


def remove(folder: Path) -> None:
    (folder / "policy.onnx").unlink()


def add(folder: Path) -> None:
    (folder / "extra.so").write_bytes(b"")


def rename_file(folder: Path) -> None:
    (folder / "policy.onnx").rename(folder / "other.onnx")


def link(folder: Path) -> None:
    (folder / "policy.onnx").rename(folder.parent / "elsewhere")
    (folder / "policy.onnx").symlink_to(folder.parent / "elsewhere")


def newer(folder: Path) -> None:
    edit(folder, lambda document: document.update(format=FORMAT + 1, marvel=True))


def half_written(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def not_json(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b'{"format": 1,')


def deep_json(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"[" * 100_000)


def wrong_type(folder: Path) -> None:
    edit(folder, lambda document: document.update(signature=7))


def unknown_field(folder: Path) -> None:
    edit(folder, lambda document: document.update(marvel=True))


def unlisted_program(folder: Path) -> None:
    edit(folder, lambda document: document.update(programs={"onnx": {"file": "../../x", "requires": {}}}))


def other_name(folder: Path) -> None:
    edit(folder, lambda document: document.update(name="runner"))


@pytest.mark.parametrize(
    ("breakage", "kind", "message"),
    [
        (corrupt, CorruptFile, "is not what was published"),
        (truncate, CorruptFile, "4 bytes, the manifest says 7"),
        (remove, MissingFile, r"policy\.onnx is in the manifest"),
        (add, UnexpectedFile, r"extra\.so is in the folder"),
        (rename_file, MissingFile, r"policy\.onnx"),
        (link, UnexpectedFile, "not a plain file"),
        (newer, NewerManifest, f"format {FORMAT + 1}.*upgrade"),
        (half_written, UnfinishedVersion, "cut short"),
        (not_json, InvalidManifest, "not JSON"),
        (deep_json, InvalidManifest, "not JSON"),
        (wrong_type, InvalidManifest, "signature"),
        (unknown_field, InvalidManifest, "marvel"),
        (unlisted_program, InvalidManifest, "not in files"),
        (other_name, MisplacedVersion, "runner@1"),
    ],
)
def test_every_breakage_has_its_own_clear_error(
    store: ModelStore, breakage: Callable[[Path], None], kind: type[StoreError], message: str
) -> None:
    breakage(store.root / "walker" / "1")
    with pytest.raises(kind, match=message) as caught:
        store.verify(store.resolve("walker"))
    assert str(store.root) not in caught.value.message


def test_what_only_building_needs_can_be_left_out(store: ModelStore, source: Path) -> None:
    store.publish(MANIFEST_DRAFT, {"policy.onnx": source, "program.safetensors": source})
    (store.root / "walker" / "2" / "program.safetensors").unlink()
    artifact = store.resolve("walker")
    assert artifact.read_program("onnx") == b"program"
    with pytest.raises(MissingFile, match=r"walker@2: program\.safetensors cannot be read: No such file"):
        store.verify(artifact)


def test_a_copied_version_folder_is_refused(store: ModelStore) -> None:
    os.rename(store.root / "walker" / "1", store.root / "walker" / "5")
    with pytest.raises(MisplacedVersion, match=r"walker@5: its manifest says walker@1"):
        store.resolve("walker")


def test_staging_and_strangers_are_not_versions(store: ModelStore) -> None:
    for stranger in (".staging-x", "01", "0", "-1", "v2", "latest"):
        (store.root / "walker" / stranger).mkdir()
    (store.root / "walker" / "7").write_bytes(b"a file")
    (store.root / "walker" / "8").symlink_to("1")
    (store.root / "empty").mkdir()
    assert store.versions("walker") == [1]
    assert store.names() == ["walker"]


def test_a_missing_store_is_empty(tmp_path: Path) -> None:
    assert ModelStore(tmp_path / "nowhere").names() == []


def test_two_publishers_get_two_versions(store: ModelStore, source: Path) -> None:
    start = threading.Barrier(8)
    versions: list[int] = []

    def publish() -> None:
        start.wait()
        versions.append(store.publish(MANIFEST_DRAFT, {"policy.onnx": source}).manifest.version)

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(2, 10))
    for version in versions:
        store.verify(store.resolve("walker", version))


def test_find_passes_over_broken_versions(store: ModelStore, source: Path) -> None:
    store.publish(MANIFEST_DRAFT, {"policy.onnx": source})
    corrupt(store.root / "walker" / "2")
    store.publish(MANIFEST_DRAFT, {"policy.onnx": source})
    assert [artifact.label for artifact in store.find("walker", "f")] == ["walker@3", "walker@1"]
    assert store.find("walker", "g") == []
    assert store.find("nobody", "f") == []
