"""Trust: the public keys that may sign manifests.

A manifest contains the SHA-256 of every other file of its version, so one signature over the manifest covers them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actserve.core.errors import Unsigned, UsageError
from actserve.core.imports import import_extra

if TYPE_CHECKING:
    from actserve.store.trust.signing import PublicKey


@dataclass(frozen=True)
class Trust:
    """The trusted keys. With `required`, only versions that one of them signed can be opened."""

    keys: tuple[PublicKey, ...] = ()
    required: bool = False

    @staticmethod
    def load(file: Path | None, required: bool = False) -> Trust:
        """The public keys in `file`, one a line. Raises `UsageError`."""
        if file is None:
            if required:
                raise UsageError("signatures are required, but no key is trusted: pass a file of public keys, --trust")
            return Trust()
        return Trust(import_extra("sign", "actserve.store.trust.signing:read_public_keys")(file), required)

    def signer(self, label: str, manifest: bytes, signature: bytes | None) -> str | None:
        """The fingerprint of the trusted key that signed `manifest`, or None. Raises `Unsigned` if one is required."""
        for key in self.keys:
            if signature is not None and key.verifies(signature, manifest):
                return key.fingerprint
        if self.required:
            reason = "it is not signed" if signature is None else "no trusted key made its signature for this manifest"
            raise Unsigned(f"{label}: {reason}; expected the signature of one of {len(self.keys)} trusted keys")
        return None
