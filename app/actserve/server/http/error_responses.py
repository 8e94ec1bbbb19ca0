"""Errors -> responses. Only this module knows status codes. All errors have one JSON shape."""

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
    errors.ForbiddenPeer: 403,
    errors.RateLimited: 429,
    errors.SessionTooLarge: 507,
    errors.Unavailable: 503,
    errors.StoreError: 503,
    errors.RuntimeRefused: 503,
    errors.UntrustedProgram: 503,
    errors.ActserveError: 500,
}
RETRY_AFTER_S = 1
INTERNAL = "the service failed on this request; its log says why"


def status_of(error: errors.ActserveError) -> int:
    """The status of the nearest ancestor that has one."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def headers_of(error: errors.ActserveError) -> dict[str, str] | None:
    """The headers of the response to `error`."""
    if isinstance(error, errors.Unavailable):
        return {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(error, errors.RateLimited):
        return {"Retry-After": str(error.retry_after_s)}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, errors.Unauthorized) else None


def error_json(code: str, message: str, detail: Any = None, **fields: Any) -> bytes:
    """The JSON document of an error, with `fields` at its top level."""
    return pydantic_core.to_json(
        {"error": {"code": code, "message": message, "detail": detail}, **fields}, fallback=str
    )


def install(app: FastAPI) -> None:
    """Register the handlers that give every error the same JSON shape."""
    app.add_exception_handler(errors.ActserveError, _handle_actserve_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)
    app.add_exception_handler(Exception, _handle_unexpected)


def response(error: errors.ActserveError) -> Response:
    """The response to a request that raised `error`."""
    call.record_refusal(error.code)
    log_if_internal(error)
    return _json_response(status_of(error), error_json(error.code, error.message, error.detail), headers_of(error))


def log_if_internal(error: errors.ActserveError) -> None:
    """Log an error that only the operator can fix."""
    if status_of(error) >= 500 and not isinstance(error, errors.Unavailable):
        log.error("%s", error.message, exc_info=error.__cause__)


async def _handle_actserve_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ActserveError)
    return response(error)


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    call.record_refusal(code)
    allowed = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow")
    message = f"{request.method} {request.url.path}: {error.detail}"
    if allowed:
        message += f"; expected {allowed}"
    return _json_response(error.status_code, error_json(code, message), dict(error.headers or {}))


async def _handle_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    call.record_refusal("invalid_request")
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _json_response(422, error_json("invalid_request", f"{where}: {first['msg']}"))


async def _handle_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # the client has disconnected


async def _handle_unexpected(_request: Request, error: Exception) -> Response:
    call.record_refusal("internal")
    return _json_response(500, error_json("internal", INTERNAL))


def _json_response(status: int, content: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, media_type="application/json")
