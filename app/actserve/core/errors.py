"""Every error that actserve raises on purpose. Only `actserve.server.http` knows which HTTP status each has.

ActserveError
├── InvalidRequest               what the client sent cannot be used; nothing was run
│   ├── MalformedBody            the bytes are not what their content type says
│   ├── UnsupportedContentType   no decoder for this content type
│   ├── UnsupportedContentEncoding  no decompressor for this coding, or several of them
│   ├── NotAcceptable            no encoder for what `Accept` asks
│   ├── BodyTooLarge             more bytes than the service takes
│   ├── TooManyItems             a larger batch than the service takes
│   ├── InvalidTensor            a tensor's name, dtype, shape or values are not what the signature says
│   ├── UnknownOutput            an output was asked for that the policy does not give
│   └── StepConflict             the number of a session's step is neither the next one nor the last
├── Unauthorized                 a token is needed, and none that is valid came
├── RateLimited                  the token's requests for now are used up
├── ForbiddenOrigin              a page of another site would open a WebSocket
├── NotFound                     what the request names is not here
│   ├── UnknownPolicy            the store has no policy of this name
│   ├── UnknownVersion           the policy has neither this version nor this alias
│   ├── UnknownSession           no session of this policy was ever given this id
│   └── SessionExpired           it was begun here and is gone: ended, idle for too long, or it made room
├── Unavailable                  the request was good; try again
│   ├── Overloaded               the queue is full
│   │   └── Behind               what comes would wait for too long
│   ├── TooManyConnections       as many connections are open as may be
│   ├── NotServing               still loading, or closing
│   ├── TooLate                  the answer would come after the time that the request gave
│   ├── TooManyGames             as many games are being played on the page as may be
│   ├── SessionsUnavailable      the sessions' file cannot be used
│   └── SessionElsewhere         another host holds the session, and no request reaches it now
├── SessionTooLarge              one session alone has more state than all may have together
├── StoreError                   an artifact that must not be served
│   ├── UnfinishedVersion        no manifest: publishing was cut short
│   ├── InvalidManifest          the manifest cannot be read
│   ├── NewerManifest            written by a newer actserve
│   ├── MisplacedVersion         the manifest names another policy or version than its folder
│   ├── MissingFile              listed in the manifest, not in the folder; or needed, and not listed
│   ├── UnexpectedFile           in the folder, not in the manifest
│   ├── InvalidRouting           `routing.json` cannot be read, or wishes for what cannot be
│   ├── CorruptFile              size or SHA-256 differs from the manifest
│   ├── InvalidName              not a policy name
│   ├── Unsigned                 no trusted key signed the manifest, and the service requires one
│   ├── StoreUnreachable         a remote store does not answer, or not with what it should
│   └── NotFetched               in the remote store and not here, and a request makes the service fetch nothing
├── RuntimeRefused               this host cannot run this program, and why
├── RuntimeFailure               the program was refused or broken by its engine
│   └── UntrustedProgram         native code that is neither this user's own nor signed by a trusted key
├── ExportError                  nothing was published
│   ├── CaptureFailed            the module cannot be turned into a program
│   └── Disagreement             the programs do not do what the policy does
└── ClientError                  raised on the client's side
    ├── ServiceUnreachable       no connection, or it broke
    ├── ServiceError             the service answered with an error
    │   └── ProxyFailed          a proxy did, as no answer came from the service
    ├── EnvironmentMismatch      the game here is not the game the policy was trained for
    └── UsageError               a wish that cannot be met (an unknown game, a format without an encoder)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


def one_line(error: Exception, limit: int = 500) -> str:
    """The message of a foreign error as one line of at most `limit` characters; the type's name if it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


class ActserveError(Exception):
    """The root. `code` is stable and for programs; the message says what was expected and what came."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **detail: object) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail  # JSON-able facts: what was expected, what came


class InvalidRequest(ActserveError):
    code = "invalid_request"


class MalformedBody(InvalidRequest):
    code = "malformed_body"


class UnsupportedContentType(InvalidRequest):
    code = "unsupported_content_type"

    def __init__(self, got: str, supported: Sequence[str]) -> None:
        super().__init__(
            f"expected a Content-Type of {', '.join(supported)}; got {got or 'none'}",
            expected=list(supported),
            got=got,
        )


class UnsupportedContentEncoding(InvalidRequest):
    code = "unsupported_content_encoding"

    def __init__(self, got: str, supported: Sequence[str]) -> None:
        super().__init__(
            f"expected one Content-Encoding, of {', '.join(supported)}; got {got[:80]}",
            expected=list(supported),
            got=got[:80],
        )


class NotAcceptable(InvalidRequest):
    code = "not_acceptable"

    def __init__(self, got: str, supported: Sequence[str]) -> None:
        super().__init__(
            f"answers can be had as {', '.join(supported)}; Accept asks for {got}", expected=list(supported), got=got
        )


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"

    def __init__(self, limit_bytes: int, got_bytes: int | None = None) -> None:
        came = "more" if got_bytes is None else f"{got_bytes:,} bytes"
        super().__init__(
            f"a body may have at most {limit_bytes:,} bytes; got {came}", limit_bytes=limit_bytes, got_bytes=got_bytes
        )


class TooManyItems(InvalidRequest):
    code = "too_many_items"

    def __init__(self, limit: int, got: int) -> None:
        super().__init__(f"a request may have at most {limit:,} items; got {got:,}", limit=limit, got=got)


class InvalidTensor(InvalidRequest):
    code = "invalid_tensor"

    def __init__(self, name: str, expected: str, got: str) -> None:
        super().__init__(f"{name}: expected {expected}; got {got}", name=name, expected=expected, got=got)


class UnknownOutput(InvalidRequest):
    code = "unknown_output"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"no output named {name!r}; this policy gives {', '.join(known)}", got=name, known=list(known))


class StepConflict(InvalidRequest):
    code = "step_conflict"

    def __init__(self, expected: int, got: int) -> None:
        again = f" (or {expected - 1} again, for its stored answer)" if expected > 1 else ""
        super().__init__(f"expected step {expected}{again}; got {got}", expected=expected, got=got)


class Unauthorized(ActserveError):
    code = "unauthorized"


class RateLimited(ActserveError):
    code = "rate_limited"

    def __init__(self, rate: float, retry_after_s: int) -> None:
        super().__init__(
            f"expected at most {rate:g} requests a second with this token; got more", retry_after_s=retry_after_s
        )
        self.retry_after_s = retry_after_s


class ForbiddenOrigin(ActserveError):
    code = "forbidden_origin"


class NotFound(ActserveError):
    code = "not_found"


class UnknownPolicy(NotFound):
    code = "unknown_policy"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(
            f"no policy named {name[:80]!r}; there is {', '.join(known) or 'none'}", got=name[:80], known=list(known)
        )


class UnknownVersion(NotFound):
    code = "unknown_version"

    def __init__(self, name: str, version: object, known: Sequence[int]) -> None:
        super().__init__(
            f"{name} has no version {str(version)[:20]!r}; there is {', '.join(map(str, known)) or 'none'}",
            got=str(version)[:20],
            known=list(known),
        )


class UnknownSession(NotFound):
    code = "unknown_session"


class SessionExpired(NotFound):
    code = "session_expired"

    def __init__(self, why: str = "it was ended, was idle for too long, or made room for others") -> None:
        super().__init__(f"this session is gone: {why}; begin a new one")


class Unavailable(ActserveError):
    code = "unavailable"


class Overloaded(Unavailable):
    code = "overloaded"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} items are waiting, the most that may; try again shortly", limit=limit)


class Behind(Overloaded):
    """So much comes that requests would wait for too long."""

    def __init__(self, max_wait_ms: float) -> None:
        Unavailable.__init__(
            self, f"requests would wait for over {max_wait_ms:g} ms; try again shortly", max_wait_ms=max_wait_ms
        )


class TooManyConnections(Unavailable):
    code = "too_many_connections"


class NotServing(Unavailable):
    code = "not_serving"


class TooLate(Unavailable):
    code = "too_late"

    def __init__(self, timeout_us: int) -> None:
        super().__init__(
            f"expected an answer within the timeout of {timeout_us:,} µs; it takes longer", timeout_us=timeout_us
        )


class TooManyGames(Unavailable):
    code = "too_many_games"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} games are being played here, the most that may; try again later", limit=limit)


class SessionsUnavailable(Unavailable):
    code = "sessions_unavailable"


class SessionElsewhere(Unavailable):
    code = "session_elsewhere"


class SessionTooLarge(ActserveError):
    code = "session_too_large"

    def __init__(self, limit_bytes: int, got_bytes: int) -> None:
        super().__init__(
            f"all sessions together may have {limit_bytes:,} bytes of state and answers; this one has {got_bytes:,}",
            limit_bytes=limit_bytes,
            got_bytes=got_bytes,
        )


class StoreError(ActserveError):
    code = "store_error"


class UnfinishedVersion(StoreError):
    code = "unfinished_version"


class InvalidManifest(StoreError):
    code = "invalid_manifest"


class NewerManifest(StoreError):
    code = "newer_manifest"


class MisplacedVersion(StoreError):
    code = "misplaced_version"


class MissingFile(StoreError):
    code = "missing_file"


class UnexpectedFile(StoreError):
    code = "unexpected_file"


class InvalidRouting(StoreError):
    code = "invalid_routing"


class CorruptFile(StoreError):
    code = "corrupt_file"


class InvalidName(StoreError):
    code = "invalid_name"

    def __init__(self, got: str) -> None:
        super().__init__(f"a policy name is lower-case letters, digits and '-'; got {got[:80]!r}", got=got[:80])


class Unsigned(StoreError):
    code = "unsigned"


class StoreUnreachable(StoreError):
    code = "store_unreachable"


class NotFetched(StoreError):
    code = "not_fetched"


class RuntimeRefused(ActserveError):
    code = "runtime_refused"


class RuntimeFailure(ActserveError):
    code = "runtime_failure"


class UntrustedProgram(RuntimeFailure):
    code = "untrusted_program"


class ExportError(ActserveError):
    code = "export_error"


class CaptureFailed(ExportError):
    code = "capture_failed"


class Disagreement(ExportError):
    code = "disagreement"


class ClientError(ActserveError):
    code = "client_error"


class ServiceUnreachable(ClientError):
    code = "service_unreachable"


class ServiceError(ClientError):
    """The service's own error, as it came. `status` is the HTTP status, `reason` the service's error code."""

    code = "service_error"

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"the service answered {status} {reason}: {message}", status=status, reason=reason)
        self.status = status
        self.reason = reason


class ProxyFailed(ServiceError):
    """A proxy answered, as it got no answer from the service behind it."""


class EnvironmentMismatch(ClientError):
    code = "environment_mismatch"


class UsageError(ClientError):
    code = "usage_error"
