"""Every error that actserve raises on purpose. Only `actserve.server.http` knows which HTTP status each has.

ActserveError
├── InvalidRequest               the request is wrong; no program ran
│   ├── MalformedBody            the body does not match its content type
│   ├── UnsupportedContentType   no decoder for this content type
│   ├── UnsupportedContentEncoding  no decompressor for this coding, or several codings
│   ├── NotAcceptable            no encoder for any content type in `Accept`
│   ├── BodyTooLarge             the body exceeds the size limit
│   ├── TooManyItems             the batch exceeds the limit
│   ├── InvalidTensor            a tensor's name, dtype, shape or values violate the signature
│   ├── RefusedByProgram         the program fails on this request alone
│   ├── UnknownOutput            the policy has no output of this name
│   └── StepConflict             a session's step number is neither the next nor the last one
├── Unauthorized                 the token is missing or invalid
├── RateLimited                  the token has exceeded its rate limit
├── ForbiddenOrigin              a page of another origin tried to open a WebSocket
├── ForbiddenPeer                only a process of this host and of the service's own user may do this
├── NotFound                     the request names something that does not exist
│   ├── UnknownPolicy            the store has no policy of this name
│   ├── UnknownVersion           the policy has no such version or alias
│   ├── UnknownSession           this policy never had a session with this id
│   └── SessionExpired           the session was ended, idle for too long, or evicted
├── Unavailable                  the request is valid; retry later
│   ├── Overloaded               the queue is full
│   │   └── WaitTooLong          the expected wait exceeds the limit
│   ├── TooManyConnections       the connection limit is reached
│   ├── MemoryFull               all connections together hold as many bytes as they may
│   ├── NotServing               the service is loading or shutting down
│   ├── TooLate                  the request's deadline cannot be met
│   ├── TooManyGames             the limit of games played on the page is reached
│   ├── SessionsUnavailable      the session file cannot be used
│   │   └── SessionsLocked       another process writes to it
│   ├── MetricsUnavailable       the file of the workers' counts cannot be used
│   └── SessionElsewhere         another host holds the session and cannot be reached
├── SessionTooLarge              one session exceeds the limit for all sessions together
├── StoreError                   the artifact must not be served
│   ├── UnfinishedVersion        no manifest: publishing was interrupted
│   ├── InvalidManifest          the manifest cannot be read
│   ├── NewerManifest            a newer actserve wrote the manifest
│   ├── MisplacedVersion         the manifest names another policy or version than its folder
│   ├── MissingFile              a file of the manifest is missing, or a required file is not in the manifest
│   ├── UnexpectedFile           a file is in the folder and not in the manifest
│   ├── InvalidRouting           `routing.json` cannot be read, or asks for something impossible
│   ├── CorruptFile              size or SHA-256 differs from the manifest
│   ├── InvalidName              not a policy name
│   ├── Unsigned                 the service requires a signature, and no trusted key signed the manifest
│   ├── StoreUnreachable         the remote store cannot be reached, or holds no store
│   └── NotFetched               the version is only in the remote store, and requests never fetch
├── RuntimeRefused               this host cannot run this program
├── RuntimeFailure               the engine could not load or run the program
│   └── UntrustedProgram         another user could have changed this native code, and no trusted key signed it
├── ExportError                  nothing was published
│   ├── CaptureFailed            the module cannot be turned into a program
│   └── Disagreement             the programs' outputs differ from the policy's
└── ClientError                  raised by the client
    ├── ServiceUnreachable       no connection, or the connection broke
    ├── ServiceError             the service answered with an error
    │   └── ProxyFailed          a proxy answered, because the service behind it did not
    ├── CorruptRecording         a file of a recording cannot be read
    ├── EnvironmentMismatch      the local game differs from the one the policy was trained on
    └── UsageError               the caller asked for something impossible (unknown game, format without an encoder)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


def one_line(error: Exception) -> str:
    """A foreign error's message as one line of at most 500 characters; the type's name if it has no message."""
    return " ".join(str(error).split())[:500] or type(error).__name__


class ActserveError(Exception):
    """The base class. `code` is stable, for programs; the message says what was expected and what was received."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **detail: object) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail  # JSON-able: expected and received values


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
            f"expected Accept to allow one of {', '.join(supported)}; got {got}", expected=list(supported), got=got
        )


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"

    def __init__(self, limit_bytes: int, got_bytes: int | None = None) -> None:
        got = "more" if got_bytes is None else f"{got_bytes:,} bytes"
        super().__init__(
            f"a body may have at most {limit_bytes:,} bytes; got {got}", limit_bytes=limit_bytes, got_bytes=got_bytes
        )


class TooManyItems(InvalidRequest):
    code = "too_many_items"

    def __init__(self, limit: int, got: int) -> None:
        super().__init__(f"a request may have at most {limit:,} items; got {got:,}", limit=limit, got=got)


class InvalidTensor(InvalidRequest):
    code = "invalid_tensor"

    def __init__(self, name: str, expected: str, got: str) -> None:
        super().__init__(f"{name}: expected {expected}; got {got}", name=name, expected=expected, got=got)


class RefusedByProgram(InvalidRequest):
    """The program fails on this request alone: an index out of range, for example."""

    code = "refused_by_program"

    def __init__(self, policy: str, reason: str) -> None:
        super().__init__(
            f"{policy}: the program cannot act on these inputs: {reason}; expected values that the policy can take, "
            "such as indices within their range",
            policy=policy,
        )


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


class ForbiddenPeer(ActserveError):
    code = "forbidden_peer"


class NotFound(ActserveError):
    code = "not_found"


class UnknownPolicy(NotFound):
    code = "unknown_policy"

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(
            f"no policy named {name[:80]!r}; known: {', '.join(known) or 'none'}", got=name[:80], known=list(known)
        )


class UnknownVersion(NotFound):
    code = "unknown_version"

    def __init__(self, name: str, version: object, known: Sequence[int]) -> None:
        super().__init__(
            f"{name} has no version {str(version)[:20]!r}; known: {', '.join(map(str, known)) or 'none'}",
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
        super().__init__(f"{limit} items are waiting, which is the limit; try again shortly", limit=limit)


class WaitTooLong(Overloaded):
    """The expected wait exceeds the limit."""

    def __init__(self, max_wait_ms: float) -> None:
        Unavailable.__init__(
            self, f"requests would wait for over {max_wait_ms:g} ms; try again shortly", max_wait_ms=max_wait_ms
        )


class TooManyConnections(Unavailable):
    code = "too_many_connections"


class MemoryFull(Unavailable):
    code = "memory_full"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"all connections together may hold {limit_bytes:,} bytes, and they do; try again shortly",
            limit_bytes=limit_bytes,
        )


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
        super().__init__(f"{limit} games are being played here, which is the limit; try again later", limit=limit)


class SessionsUnavailable(Unavailable):
    code = "sessions_unavailable"


class SessionsLocked(SessionsUnavailable):
    """Another process writes to the session file. Nothing has changed: the same can be tried again."""


class MetricsUnavailable(Unavailable):
    code = "metrics_unavailable"


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
    """The service's own error. `status` is the HTTP status, `reason` the service's error code."""

    code = "service_error"

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"the service answered {status} {reason}: {message}", status=status, reason=reason)
        self.status = status
        self.reason = reason


class ProxyFailed(ServiceError):
    """A proxy answered, because the service behind it did not."""


class CorruptRecording(ClientError):
    code = "corrupt_recording"


class EnvironmentMismatch(ClientError):
    code = "environment_mismatch"


class UsageError(ClientError):
    code = "usage_error"
