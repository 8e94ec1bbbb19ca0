"""Ed25519 keys and signatures. The only import of cryptography.

Key files have OpenSSH's formats, so that `ssh-keygen` can create and show them: a private key that only its owner may
read, and public keys one a line. A signature is the raw 64 bytes of RFC 8032.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from actserve.core.errors import UsageError


@dataclass(frozen=True)
class PublicKey:
    key: Ed25519PublicKey

    @staticmethod
    def parse(line: str, where: str) -> PublicKey:
        """From ``ssh-ed25519 AAAA… remark``. `where` names the line in the error, a `UsageError`."""
        try:
            key = serialization.load_ssh_public_key(line.encode())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise UsageError(f"{where}: expected a public key, 'ssh-ed25519 AAAA…'; got {line[:40]!r}")
        return PublicKey(key)

    @property
    def line(self) -> str:
        openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        return self.key.public_bytes(*openssh).decode()

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it."""
        digest = hashlib.sha256(base64.b64decode(self.line.split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether this key made `signature` for `data`."""
        try:
            self.key.verify(signature, data)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    key: Ed25519PrivateKey

    @staticmethod
    def create(path: Path) -> PrivateKey:
        """Write a new key to the new file `path`, and its public key to `path`.pub. Raises `UsageError`."""
        created = PrivateKey(Ed25519PrivateKey.generate())
        text = created.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        try:
            with open(path, "xb", opener=_open_for_owner) as private_file:
                private_file.write(text)
            with open(f"{path}.pub", "x") as public_file:
                public_file.write(f"{created.public.line}\n")
        except OSError as error:
            raise UsageError(f"{error.filename}: the key cannot be written: {error.strerror}") from None
        return created

    @staticmethod
    def read(path: Path) -> PrivateKey:
        """Raises `UsageError` for another kind of file, a key with a passphrase, or a file that others can read."""
        try:
            text = path.read_bytes()
            mode = path.stat().st_mode
        except OSError as error:
            raise UsageError(f"{path}: the key cannot be read: {error.strerror}") from None
        if mode & 0o077:
            raise UsageError(f"{path}: others can read this private key (mode {mode & 0o777:o}); chmod 600 it")
        try:
            key = serialization.load_ssh_private_key(text, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a passphrase
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(f"{path}: expected an Ed25519 private key as OpenSSH writes it, without a passphrase")
        return PrivateKey(key)

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key())

    def sign(self, data: bytes) -> bytes:
        return self.key.sign(data)


def read_keys(path: Path) -> tuple[PublicKey, ...]:
    """The public keys of a file, which holds public keys or one private key. Raises `UsageError`."""
    try:
        private = path.read_bytes().startswith(b"-----BEGIN")
    except OSError as error:
        raise UsageError(f"{path}: the key cannot be read: {error.strerror}") from None
    return (PrivateKey.read(path).public,) if private else read_public_keys(path)


def read_public_keys(path: Path) -> tuple[PublicKey, ...]:
    """Every key in the file, one a line; lines that begin with # are comments. Raises `UsageError`, also for none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the public keys cannot be read: {getattr(error, 'strerror', 'not text')}") from None
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not found:
        raise UsageError(f"{path}: expected public keys, one a line; found none")
    return tuple(PublicKey.parse(line, f"{path}, line {number}") for number, line in found)


def _open_for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
