"""`actserve keys`, `sign` and `--trust`, as a user types them; and that exporting signs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actserve.cli.tools.local_service import serve
from actserve.client.remote_policy import RemotePolicy
from actserve.store.local import ModelStore
from actserve.store.trust.signing import PrivateKey
from actserve_export.compile import _existing
from actserve_export.publish import export
from tests.command_line import actserve
from tests.policies import cart


def test_keys_are_made_and_shown(tmp_path: Path) -> None:
    key = str(tmp_path / "key")
    made = actserve("keys", "new", key)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("ssh-ed25519 AAAA")
    assert "SHA256:" in made.stdout
    for path in (key, f"{key}.pub"):
        assert actserve("keys", "show", path).stdout == made.stdout
    again = actserve("keys", "new", key)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "File exists" in again.stderr


def test_what_is_signed_is_trusted(own_store: ModelStore, tmp_path: Path) -> None:
    key = PrivateKey.create(tmp_path / "key")
    store, public = ("--store", str(own_store.root)), ("--trust", str(tmp_path / "key.pub"))
    signed = actserve("sign", "cart@1", "--key", str(tmp_path / "key"), *store)
    assert signed.stdout == f"cart@2 is cart@1, signed by {key.public.fingerprint}\n", signed.stderr
    assert own_store.resolve("cart", 2).manifest.files == own_store.resolve("cart", 1).manifest.files
    assert json.loads(actserve("verify", "cart", "--json", *store, *public).stdout)["signer"] == key.public.fingerprint
    with (
        serve(own_store.root, "--runtime", "onnx", "--require-signature", *public) as service,
        RemotePolicy(service.url) as policy,
    ):
        assert policy.version == 2


def test_native_code_of_others_is_not_verified_by_running_it(own_store: ModelStore) -> None:
    own_store.root.chmod(0o777)
    result = actserve("verify", "cart", "--store", str(own_store.root))
    assert result.returncode == 0, result.stderr
    assert "not run here: cart@1: .pt2 is native code, no trusted key signed it" in result.stdout
    diagnosis = json.loads(actserve("doctor", "cart", "--json", "--store", str(own_store.root)).stdout)
    assert {row["runtime"]: row["runs"] for row in diagnosis["programs"]} == {"onnx": True, "pt2": False}


def test_a_store_behind_a_url(own_store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"file://{own_store.root}"
    verified = json.loads(actserve("verify", "cart", "--json", "--store", url).stdout)
    assert (verified["programs"]["onnx"]["holds"], verified["programs"]["pt2"]["ran"]) == (True, False)
    with serve(url, "--runtime", "onnx") as service, RemotePolicy(service.url) as policy:
        assert policy.version == 1
    own_store.root.rename(tmp_path / "away")
    kept = actserve("inspect", "cart", "--store", url)
    assert (kept.returncode, "cart@1" in kept.stdout) == (0, True)
    assert "there is no store where the remote store should be; using the artifacts fetched before" in kept.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--store", "models_store", "--require-signature"), "no key is trusted"),
        (("serve", "--store", "models_store", "--trust", "README.md"), "README.md, line 3: expected a public key"),
        (("serve", "--store", "carrier-pigeon://x"), "no store can be opened at carrier-pigeon://"),
        (("export", "pong", "--store", "s3://bucket/x"), "a store behind a URL is read only"),
        (("export", "pong", "--sign", "nowhere"), "nowhere: the key cannot be read"),
        (("keys", "show", "nowhere"), "nowhere: the key cannot be read"),
        (("sign", "pong", "--key", "README.md"), "README.md: "),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    result = actserve(*arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_exporting_signs(own_store: ModelStore, tmp_path: Path) -> None:
    key = PrivateKey.create(tmp_path / "key")
    signing = ModelStore(own_store.root, key=key)
    unsigned = signing.resolve("cart")
    for published in (True, False):
        done = export(cart(), "cart", signing, origin="tests.policies:cart", runtimes=["onnx"])
        assert (done.published, done.artifact.label) == (published, "cart@2")
        assert done.artifact.signer == key.public.fingerprint
    assert _existing(unsigned, own_store, native=False) is not None
    assert _existing(unsigned, signing, native=False) is None, "none with a .pt2 is signed: it is built anew"
