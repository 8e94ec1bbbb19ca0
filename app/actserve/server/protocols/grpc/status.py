"""Errors -> status codes of gRPC. The messages are those of HTTP."""

from __future__ import annotations

from grpc import StatusCode

from actserve.core import errors
from actserve.server.protocols.oip.error_responses import told

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
MESSAGE_CHARACTERS = 1000  # a status travels in a header, which clients bound: to 8 KiB by default


def status(error: Exception) -> tuple[StatusCode, str]:
    """The code of the nearest ancestor that has one, and the message. What is the service's fault is logged."""
    return code(error), told(error)[:MESSAGE_CHARACTERS]


def code(error: Exception) -> StatusCode:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), StatusCode.INTERNAL)
