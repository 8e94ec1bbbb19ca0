"""Names: what sessions are called by: ids, and digests of what their clients call them and of who owns them.

An id is the session's number and a keyed digest of it, of its policy and of the token's name, if it was begun with a
token: it cannot be guessed, it is no id at all with another token, and one that was issued here is known for genuine
after its session has gone, without a record of the gone.
"""

from __future__ import annotations

import base64
import hmac

from app.access import Token
from app.errors import UnknownSession

_DIGEST_BYTES = 16
_NUMBER_BYTES = 8


class Names:
    """Names that nobody can make without `key`."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def id(self, policy: str, number: int, holder: Token | None) -> str:
        whose = () if holder is None else (holder.name,)
        data = number.to_bytes(_NUMBER_BYTES, "big") + self._digest("session", policy, number, *whose)
        return base64.urlsafe_b64encode(data).decode()

    def number(self, policy: str, id_: str, holder: Token | None) -> int:
        """Raises `UnknownSession` unless `id_` was issued here for this policy and this holder."""
        try:
            number = int.from_bytes(base64.urlsafe_b64decode(id_)[:_NUMBER_BYTES], "big")
            genuine = hmac.compare_digest(self.id(policy, number, holder).encode(), id_.encode())
        except ValueError:
            genuine = False
        if not genuine:
            raise UnknownSession(f"no session of {policy[:80]} has this id")
        return number

    def owner(self, owner: str | None, holder: Token | None) -> bytes | None:
        """Of all sessions of the holder or, without one, of those begun with the secret `owner`."""
        if holder is not None:
            return self._digest("holder", holder.name)
        return None if owner is None else self._digest("owner", owner)

    def sequence(self, policy: str, sequence: int | str, owner: str | None, holder: Token | None) -> bytes:
        if holder is not None:
            return self._digest("sequence of a holder", policy, holder.name, sequence)
        return self._digest("sequence", policy, owner, sequence)

    def _digest(self, *parts: str | int | None) -> bytes:
        """16 bytes; `repr` keeps 1 and "1" apart, and where parts end."""
        return hmac.digest(self._key, repr(parts).encode(), "sha256")[:_DIGEST_BYTES]
