"""Errors -> status codes of gRPC. The messages are the same as over HTTP."""

from __future__ import annotations

from grpc import StatusCode

from actserve.core import errors
from actserve.server.protocols.oip.error_responses import client_message

STATUS: dict[type[errors.ActserveError], StatusCode] = {
    errors.BodyTooLarge: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyItems: StatusCode.RESOURCE_EXHAUSTED,
    errors.StepConflict: StatusCode.FAILED_PRECONDITION,
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.Unauthorized: StatusCode.UNAUTHENTICATED,
    errors.RateLimited: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooLate: StatusCode.DEADLINE_EXCEEDED,
    errors.Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    errors.SessionTooLarge: StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: StatusCode.UNAVAILABLE,
    errors.StoreError: StatusCode.UNAVAILABLE,
    errors.RuntimeRefused: StatusCode.UNAVAILABLE,
    errors.ActserveError: StatusCode.INTERNAL,
}
MESSAGE_CHARACTERS = 1000  # a status is sent in a header, and clients limit headers to 8 KiB by default


def status(error: Exception) -> tuple[StatusCode, str]:
    """The code and message of an error. Counts it, and logs it if it is internal."""
    return code(error), client_message(error)[:MESSAGE_CHARACTERS]


def code(error: Exception) -> StatusCode:
    """The code of the nearest ancestor that has one."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), StatusCode.INTERNAL)
