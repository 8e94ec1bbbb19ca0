"""Errors -> answers: the only place that knows status codes. One JSON shape for all of them."""

from __future__ import annotations

import logging
from typing import Any

import pydantic_core
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from actserve.core import errors
from actserve.telemetry import call

log = logging.getLogger("actserve")

STATUS: dict[type[errors.ActserveError], int] = {
    errors.MalformedBody: 400,
    errors.UnsupportedContentType: 415,
    errors.UnsupportedContentEncoding: 415,
    errors.NotAcceptable: 406,
    errors.BodyTooLarge: 413,
    errors.TooManyItems: 413,
    errors.StepConflict: 409,
    errors.InvalidRequest: 422,
    errors.SessionExpired: 410,
    errors.NotFound: 404,
    errors.Unauthorized: 401,
    errors.ForbiddenOrigin: 403,
    errors.RateLimited: 429,
    errors.SessionTooLarge: 507,
    errors.Unavailable: 503,
    errors.StoreError: 503,
    errors.RuntimeRefused: 503,
    errors.UntrustedProgram: 503,
    errors.ActserveError: 500,
}
RETRY_AFTER_S = 1


def status_of(error: errors.ActserveError) -> int:
    """The status of the nearest ancestor that has one."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def headers_of(error: errors.ActserveError) -> dict[str, str] | None:
    """What the answer says beside its body."""
    if isinstance(error, errors.Unavailable):
        return {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(error, errors.RateLimited):
        return {"Retry-After": str(error.retry_after_s)}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, errors.Unauthorized) else None


def answer(status: int, code: str, message: str, detail: Any = None, headers: dict[str, str] | None = None) -> Response:
    return Response(document(code, message, detail), status, headers, media_type="application/json")


def document(code: str, message: str, detail: Any, **beside: Any) -> bytes:
    """The JSON that tells of an error."""
    return pydantic_core.to_json(
        {"error": {"code": code, "message": message, "detail": detail}, **beside}, fallback=str
    )


def install(app: FastAPI) -> None:
    """Give every error that can leave a route the agreed shape."""
    app.add_exception_handler(errors.ActserveError, _ours)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


def response(error: errors.ActserveError) -> Response:
    """The answer to a request that ended in `error`."""
    call.record_refusal(error.code)
    report(error)
    return answer(status_of(error), error.code, error.message, error.detail, headers_of(error))


def report(error: errors.ActserveError) -> None:
    """To the log, if only the operator can mend it."""
    if status_of(error) >= 500 and not isinstance(error, errors.Unavailable):
        log.error("%s", error.message, exc_info=error.__cause__)


async def _ours(_request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ActserveError)
    return response(error)


async def _routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    call.record_refusal(code)
    allowed = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow")
    message = f"{request.method} {request.url.path}: {error.detail}"
    if allowed:
        message += f"; expected {allowed}"
    return answer(error.status_code, code, message, headers=dict(error.headers or {}))


async def _validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    call.record_refusal("invalid_request")
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return answer(422, "invalid_request", f"{where}: {first['msg']}")


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it


async def _unexpected(_request: Request, error: Exception) -> Response:
    call.record_refusal("internal")
    return answer(500, "internal", "the service failed on this request; its log says why")
