"""Access: who may use the service, and how much of it. It reads a file of tokens, one a line:

    NAME SHA256 [rate=REQUESTS_PER_SECOND] [sessions=AT_MOST]

A token is 32 random bytes and cannot be guessed, so a fast hash is enough: slow hashes protect passwords that people
choose. Tokens are looked up by their SHA-256. The time of a lookup could reveal a part of a digest, but a digest does
not help to find its token. The digests are compared in constant time nevertheless.

The service identifies a client only by the name of its token. The name owns the sessions that are started with the
token. Two lines may have the same name: to replace a token, list both for a while.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from actserve.core.errors import RateLimited, Unauthorized, UsageError

log = logging.getLogger("actserve")

PREFIX = "actserve_"  # a fixed prefix, so that secret scanners recognise a token
CHECK_EVERY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE = re.compile(
    rf"(?P<name>{_NAME.pattern}) (?P<digest>[0-9a-f]{{64}})"
    r"(?: rate=(?P<rate>[0-9]{1,9}(?:\.[0-9]{1,9})?))?(?: sessions=(?P<sessions>[1-9][0-9]{0,8}))?"
)
# RFC 6750, 2.1; openpi's clients say Api-Key.
_BEARER = re.compile(rb"(?:bearer|api-key) +([\x21-\x7e]{1,200})", re.IGNORECASE)


class Token:
    """One line of the file.

    `rate` is in observations a second; 0 is no limit. It fills a token bucket that holds one second's worth, separate
    in each process. `sessions` bounds the sessions of this name; None is the default of the service.
    """

    def __init__(
        self,
        name: str,
        digest: bytes,
        rate: float = 0.0,
        sessions: int | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.name, self.digest, self.sessions = name, digest, sessions
        self.revoked = False
        self._clock = clock
        self.set_rate(rate)

    def set_rate(self, rate: float) -> None:
        """Set the rate, and fill the bucket."""
        self.rate = rate
        self._capacity = self._left = max(1.0, rate)
        self._refilled_s = self._clock()

    def charge(self, items: int = 1) -> None:
        """Take `items` from the bucket, for one request. A batch may overdraw it; the next requests wait.

        Raises `RateLimited`, or `Unauthorized` if the token was removed from the file.
        """
        if self.revoked:
            raise _unauthorized("another one")
        if not self.rate:
            return
        now_s = self._clock()
        left = min(self._capacity, self._left + (now_s - self._refilled_s) * self.rate)
        self._refilled_s = now_s
        if left < 1.0:
            self._left = left
            raise RateLimited(self.rate, math.ceil((1.0 - left) / self.rate))
        self._left = left - items

    def overdraw(self, items: int) -> None:
        """Charge for further items of a request that was charged before its size was known."""
        self._left -= items


class Access:
    """The tokens in `file`, which is checked for changes once a second. Each of `workers` grants its share of a rate.

    Raises `UsageError` for an invalid file.
    """

    def __init__(self, file: Path, workers: int = 1, clock: Callable[[], float] = monotonic) -> None:
        self.generation = 0  # increases with each change of the tokens
        self._file, self._workers, self._clock = file, workers, clock
        self._tokens: dict[bytes, Token] = {}  # by digest
        self._checked_s = clock()
        self._version = _file_version(file)
        self._replace(read_tokens(file, clock))

    def find(self, authorization: bytes | None) -> Token | None:
        """The token in an Authorization header, if it is valid."""
        self.reload_if_changed()
        match = None if authorization is None else _BEARER.fullmatch(authorization)
        if match is None:
            return None
        digest = hashlib.sha256(match[1]).digest()
        token = self._tokens.get(digest)
        return token if token is not None and hmac.compare_digest(token.digest, digest) else None

    def identify(self, authorization: bytes | None) -> Token:
        """The token in an Authorization header. Raises `Unauthorized`."""
        token = self.find(authorization)
        if token is None:
            raise _unauthorized("none" if authorization is None else "another one")
        return token

    def reload_if_changed(self) -> None:
        """Read the file again if it has changed. An invalid file is logged, and the tokens stay as they are."""
        now_s = self._clock()
        if now_s - self._checked_s < CHECK_EVERY_S:
            return
        self._checked_s = now_s
        version = _file_version(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._replace(read_tokens(self._file, self._clock))
        except UsageError as error:
            log.error("%s; the tokens that were read before are still valid", error.message)
        else:
            log.info("there are %d tokens now", len(self._tokens))

    def _replace(self, tokens: list[Token]) -> None:
        """Use `tokens` from now on. Tokens that were valid before keep their buckets."""
        before, self._tokens = self._tokens, {}
        for token in tokens:
            rate = token.rate / self._workers
            kept = before.get(token.digest, token)
            if kept.name != token.name:
                kept = token
            if kept is token or kept.rate != rate:
                kept.set_rate(rate)
            kept.sessions = token.sessions
            self._tokens[token.digest] = kept
        for token in before.values():
            token.revoked = self._tokens.get(token.digest) is not token
        self.generation += 1


def read_tokens(file: Path, clock: Callable[[], float] = monotonic) -> list[Token]:
    """The tokens in a file. Raises `UsageError`, which names the line."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the tokens in {file} cannot be read: {error}") from error
    tokens: dict[bytes, Token] = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            expected = "NAME SHA256 [rate=REQUESTS_PER_SECOND] [sessions=AT_MOST]"
            raise UsageError(f"{file}, line {number}: expected {expected}; got something else")
        sessions = int(match["sessions"]) if match["sessions"] else None
        token = Token(match["name"], bytes.fromhex(match["digest"]), float(match["rate"] or 0), sessions, clock)
        if tokens.setdefault(token.digest, token) is not token:
            raise UsageError(f"{file}, line {number}: expected each token once; got one again")
    return list(tokens.values())


def add_token(file: Path, name: str, rate: float = 0.0, sessions: int | None = None) -> str:
    """Make a new token and append its hash to `file`, which is created if missing. Raises `UsageError`.

    The token is returned once; the file does not contain it.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"expected a name of up to 64 letters, digits and '.', '_', '-'; got {name!r}")
    token = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} {hashlib.sha256(token.encode()).hexdigest()}"
    line += f" rate={rate:.9f}".rstrip("0").rstrip(".") if rate else ""
    line += f" sessions={sessions}" if sessions else ""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        with open(descriptor, "r+b", buffering=0) as opened:
            content = opened.read()
            opened.write((b"" if content.endswith(b"\n") or not content else b"\n") + line.encode() + b"\n")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error
    return token


def _unauthorized(got: str) -> Unauthorized:
    return Unauthorized(f"expected a valid token, as 'Authorization: Bearer TOKEN'; got {got}")


def _file_version(file: Path) -> tuple[int, ...]:
    """Differs when the file has changed; empty if there is no file."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
