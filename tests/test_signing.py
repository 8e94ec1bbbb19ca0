from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from actserve.core.errors import Unsigned, UsageError
from actserve.store.trust import Trust
from actserve.store.trust.signing import PrivateKey, PublicKey, read_keys, read_public_keys

OPENSSH = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH


@pytest.fixture
def key(tmp_path: Path) -> PrivateKey:
    return PrivateKey.create(tmp_path / "key")


def test_a_signature_is_one_keys_for_one_text(key: PrivateKey, tmp_path: Path) -> None:
    signature = key.sign(b"manifest")
    assert len(signature) == 64
    assert key.public.verifies(signature, b"manifest")
    assert not key.public.verifies(signature, b"Manifest")
    assert not key.public.verifies(signature[:-1], b"manifest")
    assert not key.public.verifies(b"", b"manifest")
    assert not PrivateKey.create(tmp_path / "other").public.verifies(signature, b"manifest")


def test_keys_are_files(key: PrivateKey, tmp_path: Path) -> None:
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert PrivateKey.read(tmp_path / "key").public == key.public
    assert read_public_keys(tmp_path / "key.pub") == (key.public,)
    assert read_keys(tmp_path / "key") == read_keys(tmp_path / "key.pub") == (key.public,)
    with pytest.raises(UsageError, match="key: the key cannot be written: File exists"):
        PrivateKey.create(tmp_path / "key")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")
def test_ssh_keygen_makes_and_shows_them(key: PrivateKey, tmp_path: Path) -> None:
    make = ["ssh-keygen", "-q", "-t", "ed25519", "-C", "a remark"]
    subprocess.run([*make, "-N", "", "-f", str(tmp_path / "theirs")], check=True)
    theirs = PrivateKey.read(tmp_path / "theirs")
    assert read_public_keys(tmp_path / "theirs.pub") == (theirs.public,)
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(tmp_path / "key.pub")], check=True, capture_output=True, text=True
    ).stdout
    assert key.public.fingerprint in shown.split()
    subprocess.run([*make, "-N", "a passphrase", "-f", str(tmp_path / "locked")], check=True)
    with pytest.raises(UsageError, match="without a passphrase"):
        PrivateKey.read(tmp_path / "locked")


def test_a_file_of_public_keys(key: PrivateKey, tmp_path: Path) -> None:
    other = PrivateKey.create(tmp_path / "other").public
    (tmp_path / "keys").write_text(f"# who releases\n{key.public.line} ci@example.org\n\n{other.line}\n")
    assert read_public_keys(tmp_path / "keys") == (key.public, other)


def test_what_is_no_key_is_named(key: PrivateKey, tmp_path: Path) -> None:
    (tmp_path / "junk").write_text("junk\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("# nobody\n")
    curve = generate_private_key(SECP256R1())
    (tmp_path / "curve.pub").write_bytes(curve.public_key().public_bytes(*OPENSSH))
    for name, message in (
        ("junk", "junk, line 1: expected a public key, 'ssh-ed25519 AAAA…'; got 'junk'"),
        ("binary", "cannot be read: not text"),
        ("empty", "found none"),
        ("curve.pub", "expected a public key, 'ssh-ed25519"),
        ("nowhere", "cannot be read: No such file"),
    ):
        with pytest.raises(UsageError, match=message):
            read_public_keys(tmp_path / name)
    (tmp_path / "public").write_text(key.public.line)
    (tmp_path / "public").chmod(0o600)
    with pytest.raises(UsageError, match="expected an Ed25519 private key as OpenSSH writes it"):
        PrivateKey.read(tmp_path / "public")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        PrivateKey.read(tmp_path / "nowhere")


def test_a_private_key_that_others_can_read_is_refused(key: PrivateKey, tmp_path: Path) -> None:
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(UsageError, match=r"others can read this private key \(mode 640\)"):
        PrivateKey.read(tmp_path / "key")


def test_trust_is_in_keys(key: PrivateKey, tmp_path: Path) -> None:
    signature = key.sign(b"manifest")
    stranger = PrivateKey.create(tmp_path / "stranger").public
    for required in (False, True):
        trust = Trust((stranger, key.public), required)
        assert trust.signer("a@1", b"manifest", signature) == key.public.fingerprint
    indifferent = Trust((stranger,))
    assert indifferent.signer("a@1", b"manifest", signature) is None
    assert indifferent.signer("a@1", b"manifest", None) is None
    assert Trust().signer("a@1", b"manifest", signature) is None
    strict = Trust((stranger,), required=True)
    with pytest.raises(
        Unsigned, match=r"a@1: no trusted key made its signature for this manifest; expected .* of one of 1 trusted"
    ):
        strict.signer("a@1", b"manifest", signature)
    with pytest.raises(Unsigned, match="a@1: it is not signed"):
        strict.signer("a@1", b"manifest", None)


def test_trust_is_read_from_a_file(key: PrivateKey, tmp_path: Path) -> None:
    assert Trust.load(tmp_path / "key.pub", required=True) == Trust((key.public,), required=True)
    assert Trust.load(None) == Trust()
    with pytest.raises(UsageError, match="no key is trusted"):
        Trust.load(None, required=True)


def test_a_key_is_parsed_with_its_remark(key: PrivateKey) -> None:
    assert PublicKey.parse(f"{key.public.line} a remark", "here") == key.public
