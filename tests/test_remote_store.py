"""Stores behind a URL: which files are fetched and kept, with a network that fails and a store that is wrong."""

from __future__ import annotations

import importlib.util
import json
import pwd
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from actserve.core.errors import (
    CorruptFile,
    InvalidManifest,
    MisplacedVersion,
    MissingFile,
    NotFetched,
    StoreError,
    StoreUnreachable,
    UnfinishedVersion,
    UnknownPolicy,
    UnknownVersion,
    Unsigned,
    UntrustedProgram,
    UsageError,
)
from actserve.core.settings import Settings
from actserve.engine.policy import Policy
from actserve.server.app import create_app
from actserve.store.artifact import MANIFEST, SIGNATURE, Artifact
from actserve.store.local import ModelStore
from actserve.store.remote import RemoteStore, open_store
from actserve.store.trust import Trust
from actserve.store.trust.signing import PrivateKey
from tests.asgi import Caller
from tests.network import URL, Network, network, upload
from tests.publishing import republish
from tests.test_store import MANIFEST_DRAFT

PROGRAM = b"program" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with network():
        yield tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> ModelStore:
    """The store that is uploaded: walker@1 and walker@2."""
    (tmp_path / "built").write_bytes(PROGRAM)
    store = ModelStore(tmp_path / "source")
    for _ in range(2):
        store.publish(MANIFEST_DRAFT, {"policy.onnx": tmp_path / "built"})
    return store


@pytest.fixture
def remote(source: ModelStore) -> RemoteStore:
    upload(source)
    store = RemoteStore(URL)
    store.refresh()
    return store


def kept(store: RemoteStore) -> list[str]:
    """The artifacts in the cache, whole or not."""
    return sorted(str(path.relative_to(store.root)) for path in store.root.glob("*/*"))


@pytest.mark.parametrize("url", ["file://{folder}", "memory://{folder}"])
def test_a_version_is_fetched_once_and_is_like_any_other(source: ModelStore, url: str) -> None:
    url = url.format(folder=source.root)
    there, base = fsspec.core.url_to_fs(url)
    if not url.startswith("file"):
        there.put(f"{source.root}/", base, recursive=True)
    store = open_store(url)
    assert isinstance(store, RemoteStore)
    store.refresh()
    assert (store.names(), store.versions("walker")) == (["walker"], [1, 2])
    artifact = store.resolve("walker")
    assert (artifact.label, artifact.read_program("onnx"), artifact.fetched) == ("walker@2", PROGRAM, True)
    store.verify(artifact)
    assert kept(store) == ["walker/2"]
    assert (artifact.folder / MANIFEST).read_bytes() == (source.root / "walker" / "2" / MANIFEST).read_bytes()
    there.rm(base, recursive=True)
    assert store.resolve("walker", 2).manifest == artifact.manifest
    assert artifact.folder.stat().st_mode & 0o077 == 0


def test_unknown_names_are_not_asked_for(remote: RemoteStore) -> None:
    for name in ("nobody", "..", "", "walker/1", "../store/walker"):
        with pytest.raises(UnknownPolicy):
            remote.resolve(name)
    with pytest.raises(UnknownVersion, match="known: 1, 2"):
        remote.resolve("walker", 3)
    assert Network.asked == []


def test_strangers_are_neither_policies_nor_versions(source: ModelStore) -> None:
    upload(source)
    for path in ("Walker/1/x", "a_b/1/x", "walker/01/x", "walker/latest/x", "walker/README", "empty/x"):
        Network.files[f"bucket/store/{path}"] = b""
    store = RemoteStore(URL)
    store.refresh()
    assert (store.names(), store.versions("walker")) == (["walker"], [1, 2])


def test_new_versions_are_seen_when_it_is_asked_again(remote: RemoteStore, source: ModelStore, tmp_path: Path) -> None:
    source.publish(MANIFEST_DRAFT, {"policy.onnx": tmp_path / "built"})
    upload(source)
    assert remote.versions("walker") == [1, 2]
    remote.refresh()
    assert remote.versions("walker") == [1, 2, 3]


def test_when_the_network_is_gone_what_was_fetched_stays(remote: RemoteStore) -> None:
    remote.resolve("walker", 1)
    Network.answers_left = 0
    with pytest.raises(StoreUnreachable, match=r"^the remote store cannot be reached \(TimeoutError\)$"):
        remote.refresh()
    assert remote.versions("walker") == [1, 2]
    assert remote.resolve("walker", 1).read_program("onnx") == PROGRAM
    with pytest.raises(StoreUnreachable, match=r"^walker@2 cannot be reached \(TimeoutError\)$") as caught:
        remote.resolve("walker", 2)
    assert "10.0.0.1" not in caught.value.message
    begun_without = RemoteStore(URL)
    with pytest.raises(StoreUnreachable):
        begun_without.refresh()
    assert (begun_without.names(), begun_without.versions("walker")) == (["walker"], [1])
    assert begun_without.resolve("walker").label == "walker@1"
    Network.answers_left = float("inf")
    begun_without.refresh()
    assert begun_without.resolve("walker").label == "walker@2"


@pytest.mark.parametrize("answers", range(8))
def test_a_network_that_goes_while_fetching_leaves_nothing(
    remote: RemoteStore, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    monkeypatch.setattr("actserve.store.remote.CHUNK_BYTES", 1 << 11)
    Network.answers_left = answers
    with pytest.raises(StoreUnreachable):
        remote.resolve("walker")
    assert kept(remote) == []
    Network.answers_left = float("inf")
    assert remote.resolve("walker").read_program("onnx") == PROGRAM


def change(name: str, data: bytes | None) -> Callable[[], None]:
    """Have walker@2's file be `data`, or not be at all."""

    def apply() -> None:
        Network.files[f"bucket/store/walker/2/{name}"] = data or b""
        if data is None:
            del Network.files[f"bucket/store/walker/2/{name}"]

    return apply


def edit(**changes: Any) -> Callable[[], None]:
    def apply() -> None:
        document = json.loads(Network.files[f"bucket/store/walker/2/{MANIFEST}"])
        change(MANIFEST, json.dumps(document | changes).encode())()

    return apply


HASH = {"sha256": "0" * 64}


@pytest.mark.parametrize(
    ("lie", "kind", "message"),
    [
        (change("policy.onnx", b"Program" * 1000), CorruptFile, "in the remote store differs from the manifest"),
        (change("policy.onnx", PROGRAM[:-1]), CorruptFile, "differs from the manifest"),
        (change("policy.onnx", PROGRAM + b"x"), CorruptFile, "differs from the manifest"),
        (change("policy.onnx", None), MissingFile, r"walker@2: policy\.onnx is not in the remote store"),
        (change(MANIFEST, None), UnfinishedVersion, r"there is no manifest\.json in the remote store"),
        (change(MANIFEST, b"{"), InvalidManifest, "not JSON"),
        (change(MANIFEST, b" " * (5 << 20)), InvalidManifest, "more than 4,194,304 bytes"),
        (edit(version=1), MisplacedVersion, "walker@2: its manifest says walker@1"),
        (edit(name="../../x"), MisplacedVersion, "walker@2"),
        (edit(files={"../../x": HASH | {"bytes": 1}}), InvalidManifest, "pattern"),
        (edit(files={"x": HASH | {"bytes": 1 << 40}}), InvalidManifest, "less than or equal"),
        (
            edit(files={"policy.onnx": HASH | {"bytes": 0}} | {f"f{n}": HASH | {"bytes": 4 << 30} for n in range(5)}),
            StoreError,
            "walker@2 has 21,474,836,480 bytes; at most 17,179,869,184 are fetched",
        ),
    ],
)
def test_what_the_store_lies_about_is_not_kept(
    remote: RemoteStore, lie: Callable[[], None], kind: type[StoreError], message: str
) -> None:
    lie()
    with pytest.raises(kind, match=message):
        remote.resolve("walker")
    assert [name for name in kept(remote) if "2" in name or "staging" in name] == []
    assert remote.resolve("walker", 1).read_program("onnx") == PROGRAM


def test_no_more_is_read_than_the_manifest_says(remote: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actserve.store.remote.CHUNK_BYTES", 1000)
    change("policy.onnx", PROGRAM * 1000)()
    Network.answers_left = 100
    with pytest.raises(CorruptFile):
        remote.resolve("walker")


def damage(folder: Path) -> None:
    (folder / "policy.onnx").write_bytes(b"x")


def truncate(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"{")


def link(folder: Path) -> None:
    (folder / "policy.onnx").rename(folder.parent / "elsewhere")
    (folder / "policy.onnx").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("fault", [damage, truncate, link, shutil.rmtree])
def test_what_was_kept_and_is_damaged_is_fetched_again(remote: RemoteStore, fault: Callable[[Path], Any]) -> None:
    folder = remote.resolve("walker").folder
    fault(folder)
    with pytest.raises(NotFetched):
        remote.resolve("walker", fetch=False)
    assert remote.resolve("walker").read_program("onnx") == PROGRAM
    fault(folder)
    Network.answers_left = 0
    with pytest.raises(StoreUnreachable):
        remote.resolve("walker")


def test_a_cache_that_others_can_write_is_not_used(remote: RemoteStore) -> None:
    remote.resolve("walker")
    remote.root.chmod(0o777)
    with pytest.raises(
        StoreError, match="other users could have changed the fetched files: its folder, or one above, can be"
    ):
        remote.resolve("walker")


def test_several_fetch_at_once(remote: RemoteStore) -> None:
    found: list[bytes] = []
    stores = [RemoteStore(URL) for _ in range(6)]

    def fetch(store: RemoteStore) -> None:
        store.refresh()
        found.append(store.resolve("walker").read_program("onnx"))

    threads = [threading.Thread(target=fetch, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [PROGRAM] * 6
    assert kept(remote) == ["walker/2"]


def test_required_signatures_are_looked_at_before_anything_is_fetched(source: ModelStore, tmp_path: Path) -> None:
    key = PrivateKey.create(tmp_path / "key")
    ModelStore(source.root, key=key).publish(MANIFEST_DRAFT, {"policy.onnx": tmp_path / "built"})
    upload(source)
    store = open_store(URL, Trust((key.public,), required=True))
    store.refresh()
    assert store.resolve("walker").signer == key.public.fingerprint
    Network.asked.clear()
    with pytest.raises(Unsigned):
        store.resolve("walker", 2)
    assert Network.asked == [f"walker/2/{MANIFEST}", f"walker/2/{SIGNATURE}"]
    assert open_store(URL).resolve("walker", 3).signer is None, "the cache is no proof for who trusts nobody"


def test_native_code_from_afar_is_run_only_if_it_is_signed(cart: Artifact, tmp_path: Path) -> None:
    key = PrivateKey.create(tmp_path / "key")
    source = ModelStore(tmp_path / "source")
    republish(cart, source)
    republish(cart, ModelStore(source.root, key=key))
    upload(source)
    trusting = RemoteStore(URL, Trust((key.public,)))
    trusting.refresh()
    with pytest.raises(UntrustedProgram, match="no trusted key signed it, and it came from a remote store"):
        trusting.resolve("cart", 1).read_program("pt2")
    signed = trusting.resolve("cart", 2)
    assert signed.read_program("pt2") == cart.read_program("pt2")
    with pytest.raises(UntrustedProgram):
        RemoteStore(URL).resolve("cart", 2).read_program("pt2")
    policy = Policy.load(trusting.resolve("cart", 1), Settings(runtime="auto"))
    assert (policy.choice.runtime, "came from a remote store" in policy.choice.reason) == ("onnx", True)


OBSERVATION = {"observation": [0.3, -1, 0.2, 0.7]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def service(cart: Artifact, tmp_path: Path) -> Iterator[Caller]:
    """A service over a remote store with cart@1 and cart@2."""
    source = ModelStore(tmp_path / "source")
    for _ in range(2):
        republish(cart, source)
    upload(source)
    with Caller(create_app(Settings(store=URL, runtime="onnx"))) as call:
        call.wait(lambda: not call.app.state.registry.loading)
        yield call


def test_what_is_loaded_serves_on_when_the_network_is_gone(service: Caller) -> None:
    before = service("POST", "/act", OBSERVATION, JSON)
    assert before.status == 200
    Network.answers_left = 0
    after = service("POST", "/act", OBSERVATION, JSON)
    assert (after.status, after.document) == (200, before.document)
    described = service("GET", "/policies/cart").document
    assert (described["version"], described["versions"]) == (2, [1, 2])
    assert service("GET", "/readyz").status == 200
    with Caller(create_app(Settings(store=URL, runtime="onnx"))) as begun_without:
        begun_without.wait(lambda: not begun_without.app.state.registry.loading)
        assert begun_without("POST", "/act", OBSERVATION, JSON).document == before.document


def test_a_request_makes_the_service_fetch_nothing(service: Caller) -> None:
    Network.asked.clear()
    refused = service("POST", "/policies/cart/versions/1/act", OBSERVATION, JSON)
    assert (refused.status, refused.document["error"]["code"]) == (503, "not_fetched")
    for name in ("nobody", "network:%2F%2Fother%2Fstore", "..%2F..%2Fx"):
        assert service("POST", f"/policies/{name}/act", OBSERVATION, JSON).status == 404
    assert Network.asked == []
    store = RemoteStore(URL)
    store.refresh()
    store.resolve("cart", 1)
    assert service("POST", "/policies/cart/versions/1/act", OBSERVATION, JSON).status == 200


def test_it_is_read_only(remote: RemoteStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="read only"):
        remote.publish(MANIFEST_DRAFT, {"policy.onnx": tmp_path / "built"})


def test_what_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreUnreachable, match="there is no store where"):
        RemoteStore("network://elsewhere").refresh()
    with pytest.raises(UsageError, match="no store can be opened at carrier-pigeon://"):
        RemoteStore("carrier-pigeon://store")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(UsageError, match="no store can be opened at s3://: Install s3fs"):
            RemoteStore("s3://bucket/store")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda user: (_ for _ in ()).throw(KeyError))
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        RemoteStore(URL)


def test_a_signature_comes_along(source: ModelStore, tmp_path: Path) -> None:
    key = PrivateKey.create(tmp_path / "key")
    signed = ModelStore(source.root, key=key).publish(MANIFEST_DRAFT, {"policy.onnx": tmp_path / "built"})
    upload(source)
    store = RemoteStore(URL)
    store.refresh()
    assert (store.resolve("walker").folder / SIGNATURE).read_bytes() == (signed.folder / SIGNATURE).read_bytes()
