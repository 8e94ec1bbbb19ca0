"""Whose native code may run, and which versions are served if signatures are required."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from actserve.core.errors import InvalidManifest, RuntimeFailure, Unsigned, UntrustedProgram
from actserve.core.settings import Settings
from actserve.engine.policy import Policy
from actserve.engine.runtimes.load import load
from actserve.server.app import create_app
from actserve.store.artifact import MANIFEST, SIGNATURE, Artifact
from actserve.store.local import ModelStore
from actserve.store.trust import Trust
from actserve.store.trust.signing import PrivateKey
from tests.asgi import Caller
from tests.native import package_that
from tests.publishing import republish


@pytest.fixture
def key(tmp_path: Path) -> PrivateKey:
    return PrivateKey.create(tmp_path / "key")


def open_to_all(root: Path) -> ModelStore:
    """The store in `root`, that every user of this host may write to."""
    root.chmod(0o777)
    return ModelStore(root)


def test_a_signed_version_names_its_signer(cart: Artifact, key: PrivateKey, tmp_path: Path) -> None:
    signing = ModelStore(tmp_path / "store", key=key)
    artifact = republish(cart, signing)
    assert artifact.signer == key.public.fingerprint
    manifest, signature = ((artifact.folder / name).read_bytes() for name in (MANIFEST, SIGNATURE))
    assert key.public.verifies(signature, manifest)
    assert ModelStore(tmp_path / "store", Trust((key.public,))).resolve("cart").signer == key.public.fingerprint
    assert ModelStore(tmp_path / "store").resolve("cart").signer is None, "nobody is trusted there"
    assert signing.is_signed(artifact)
    assert not signing.is_signed(cart)
    assert ModelStore(tmp_path / "store").is_signed(cart), "it signs nothing"


@pytest.mark.parametrize("change", ["manifest", "signature", "no signature", "link"])
def test_required_signatures_are_over_these_very_bytes(
    cart: Artifact, key: PrivateKey, tmp_path: Path, change: str
) -> None:
    folder = republish(cart, ModelStore(tmp_path / "store", key=key)).folder
    strict = ModelStore(tmp_path / "store", Trust((key.public,), required=True))
    assert strict.resolve("cart").signer == key.public.fingerprint
    if change == "manifest":
        (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b" ")  # the same JSON
    elif change == "signature":
        (folder / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes() + b"\0")
    else:
        (folder / SIGNATURE).rename(folder.parent / "elsewhere")
        if change == "link":
            (folder / SIGNATURE).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(Unsigned, match=r"cart@1: (it is not signed|no trusted key made its signature)"):
        strict.resolve("cart")
    assert ModelStore(tmp_path / "store", Trust((key.public,))).resolve("cart").signer is None


def test_a_signature_covers_every_file(cart: Artifact, key: PrivateKey, tmp_path: Path) -> None:
    folder = republish(cart, ModelStore(tmp_path / "store", key=key)).folder
    data = bytearray((folder / "policy.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "policy.onnx").write_bytes(data)
    strict = ModelStore(tmp_path / "store", Trust((key.public,), required=True))
    with pytest.raises(Exception, match=r"policy\.onnx is not what was published"):
        strict.resolve("cart").read_program("onnx")


def test_native_code_of_somebody_elses_is_not_run(cart: Artifact, key: PrivateKey, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "pt2").write_bytes(package_that(f'close(creat("{ran}", 0600));', cart, tmp_path))
    root = tmp_path / "store"
    republish(cart, ModelStore(root, key=key), {"policy.pt2": tmp_path / "pt2"})
    with pytest.raises(
        UntrustedProgram,
        match=r"cart@1: \.pt2 is native code, no trusted key signed it, and its folder, or one above, can be",
    ):
        load("pt2", open_to_all(root).resolve("cart"))
    assert not ran.exists()
    with pytest.raises(RuntimeFailure, match="the AOTI loader refused the package"):  # it is no model, but it is tried
        load("pt2", ModelStore(root, Trust((key.public,))).resolve("cart"))
    assert ran.exists()


@pytest.mark.parametrize("writable", ["policy.pt2", MANIFEST, ".", ".."])
def test_every_place_that_matters_is_looked_at(own_store: ModelStore, writable: str) -> None:
    artifact = own_store.resolve("cart")
    assert artifact.read_program("pt2")
    (artifact.folder / writable).chmod(0o777)
    with pytest.raises(UntrustedProgram, match="can be written by every user"):
        artifact.read_program("pt2")
    assert artifact.read_program("onnx"), "which is no code"
    own_store.verify(artifact)


def test_a_link_to_the_store_is_followed_once(own_store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(own_store.root)
    artifact = ModelStore(tmp_path / "current").resolve("cart")
    assert artifact.folder == own_store.root.resolve() / "cart" / "1"


def test_auto_serves_the_onnx_instead_and_says_why(own_store: ModelStore) -> None:
    artifact = open_to_all(own_store.root).resolve("cart")
    policy = Policy.load(artifact, Settings(runtime="auto"))
    assert policy.choice.runtime == "onnx"
    assert "not .pt2: cart@1: .pt2 is native code, no trusted key signed it" in policy.choice.reason
    with pytest.raises(UntrustedProgram):
        Policy.load(artifact, Settings(runtime="pt2"))


def test_only_what_is_signed_is_served_if_that_is_required(
    cart: Artifact, own_store: ModelStore, key: PrivateKey, tmp_path: Path
) -> None:
    republish(cart, ModelStore(own_store.root, key=key))
    republish(cart, own_store)  # 3, the highest
    settings = Settings(store=str(own_store.root), runtime="onnx", trust=tmp_path / "key.pub", require_signature=True)
    with Caller(create_app(settings)) as call:
        call.wait(lambda: not call.app.state.registry.loading)
        described = call("GET", "/policies/cart").document
        assert (described["version"], described["refused"]["3"]["code"]) == (2, "unsigned")
        json = {"Content-Type": "application/json"}
        assert call("POST", "/policies/cart/act", {"observation": [0, 0, 0, 0]}, json).status == 200
        pinned = call("POST", "/policies/cart/versions/1/act", {"observation": [0, 0, 0, 0]}, json)
        assert (pinned.status, pinned.document["error"]["code"]) == (503, "unsigned")


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, "../x", "a/b", ".hidden", "", "a" * 101, "x\n", "/etc/passwd"])
def test_a_file_is_published_under_a_plain_name(store_of_one: ModelStore, cart: Artifact, name: str) -> None:
    with pytest.raises(InvalidManifest, match="cannot be published"):
        store_of_one.publish(cart.manifest, {name: cart.folder / "graph.txt"})
    assert store_of_one.versions("cart") == [1]


@pytest.fixture
def store_of_one(cart: Artifact, tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "one")
    manifest = dataclasses.replace(cart.manifest, programs={})
    store.publish(manifest, {"graph.txt": cart.folder / "graph.txt"})
    return store
