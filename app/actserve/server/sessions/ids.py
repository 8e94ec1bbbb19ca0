"""SessionIds: what sessions are called by: ids, and digests of what their clients call them and of who owns them.

An id is the session's number and a keyed digest of it, of its policy and of the token's name, if it was begun with a
token: it cannot be guessed, it is no id at all with another token, and one that was issued here is known for genuine
after its session has gone, without a record of the gone.

Where several hosts each have a file of their own, a number begins with the host, the session's home.
"""

from __future__ import annotations

import base64
import hmac

from actserve.core.errors import SessionElsewhere, UnknownSession
from actserve.server.access.tokens import Token

_DIGEST_BYTES = 16
_NUMBER_BYTES = 8
HOME_BITS = 23  # of the 63 that a number has; half a million million sessions remain for each home
_HOME_SHIFT = 63 - HOME_BITS


def first_number(home: int) -> int:
    """The number that the first session of a home follows."""
    return home << _HOME_SHIFT


def home_of(id_: str) -> int | None:
    """The home that an id names; None if it is no id."""
    try:
        return _number(id_) >> _HOME_SHIFT
    except ValueError:
        return None


def _number(id_: str) -> int:
    """Raises ValueError."""
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
        whose = () if holder is None else (holder.name,)
        data = number.to_bytes(_NUMBER_BYTES, "big") + self._digest("session", policy, number, *whose)
        return base64.urlsafe_b64encode(data).decode()

    def number(self, policy: str, id_: str, holder: Token | None) -> int:
        """Raises `UnknownSession` unless `id_` was issued here for this policy and this holder, `SessionElsewhere` if
        it says that it was issued at another home."""
        if self._home is not None and home_of(id_) not in (None, self._home):
            raise SessionElsewhere("another host holds the session, and no request reaches that now; try again shortly")
        try:
            number = _number(id_)
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
