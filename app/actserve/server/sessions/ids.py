"""SessionIds: ids of sessions, and digests of their owners and sequence names.

An id is the number of the session and a keyed digest of the number, the policy and the name of the token, if any. It
cannot be guessed, and is not valid with another token. After its session is gone, it can still be verified, without a
record of old sessions.

If several hosts hold sessions, each in its own file, a number begins with the host, the session's home. The first four
characters of an id are the home, so that a proxy finds the host without decoding the id: docs/scale.md.
"""

from __future__ import annotations

import base64
import hmac

from actserve.core.errors import SessionElsewhere, UnknownSession
from actserve.server.access.tokens import Token

_DIGEST_BYTES = 16
_NUMBER_BYTES = 8
HOME_BITS = 23  # of the 63 bits of a number; each home has 2**40 numbers
_HOME_SHIFT = 63 - HOME_BITS


def first_number(home: int) -> int:
    """The number before the first session of a home."""
    return home << _HOME_SHIFT


def home_of(id_: str) -> int | None:
    """The home in an id; None if it is not an id."""
    try:
        return home_of_number(_number(id_))
    except ValueError:
        return None


def home_of_number(number: int) -> int:
    return number >> _HOME_SHIFT


def _number(id_: str) -> int:
    """The number in an id. Raises `ValueError`."""
    data = base64.urlsafe_b64decode(id_)
    if len(data) != _NUMBER_BYTES + _DIGEST_BYTES:
        raise ValueError
    return int.from_bytes(data[:_NUMBER_BYTES], "big")


class SessionIds:
    """Makes and checks ids with the secret `key`. `home` is the number of this host, if several hosts hold sessions."""

    def __init__(self, key: bytes, home: int | None = None) -> None:
        self._key = key
        self._home = home

    def id(self, policy: str, number: int, holder: Token | None) -> str:
        owner = () if holder is None else (holder.name,)
        data = number.to_bytes(_NUMBER_BYTES, "big") + self._digest("session", policy, number, *owner)
        return base64.urlsafe_b64encode(data).decode()

    def number(self, policy: str, id_: str, holder: Token | None) -> int:
        """The number in `id_`. Raises `SessionElsewhere` if the id is from another home, and `UnknownSession` if this
        host has not issued it for this policy and holder."""
        if self._home is not None and home_of(id_) not in (None, self._home):
            raise SessionElsewhere("another host holds the session, and cannot be reached now; try again shortly")
        try:
            number = _number(id_)
            genuine = hmac.compare_digest(self.id(policy, number, holder).encode(), id_.encode())
        except ValueError:
            genuine = False
        if not genuine:
            raise UnknownSession(f"no session of {policy[:80]} has this id")
        return number

    def owner(self, owner: str | None, holder: Token | None) -> bytes | None:
        """The digest of the holder's name or, without a holder, of the secret `owner`."""
        if holder is not None:
            return self._digest("holder", holder.name)
        return None if owner is None else self._digest("owner", owner)

    def sequence(self, policy: str, sequence: int | str, owner: str | None, holder: Token | None) -> bytes:
        if holder is not None:
            return self._digest("sequence of a holder", policy, holder.name, sequence)
        return self._digest("sequence", policy, owner, sequence)

    def key(self, policy: str, key: str, owner: str | None, holder: Token | None) -> bytes:
        """The digest of an idempotency key, within `policy` and the holder or the owner. No sequence has it."""
        if holder is not None:
            return self._digest("key of a holder", policy, holder.name, key)
        return self._digest("key", policy, owner, key)

    def _digest(self, *parts: str | int | None) -> bytes:
        """16 bytes. `repr` distinguishes 1 from "1", and separates the parts."""
        return hmac.digest(self._key, repr(parts).encode(), "sha256")[:_DIGEST_BYTES]
