"""Errors as the protocol tells them: over HTTP as `{"error": "message"}`, for routers whose `route_class` is
`OipRoute`; over gRPC `actserve.server.protocols.grpc.status` has the status codes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from actserve.core.errors import ActserveError, BodyTooLarge, InvalidRequest, StepConflict, TooManyItems
from actserve.server.http.error_responses import headers_of, report, status_of
from actserve.telemetry import call

log = logging.getLogger("actserve")

FAILED = "the service failed on this request; its log says why"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def status(error: ActserveError) -> int:
    """As elsewhere, but for bad input, which the protocol answers with 400."""
    bad_input = isinstance(error, InvalidRequest) and not isinstance(error, BodyTooLarge | TooManyItems | StepConflict)
    return 400 if bad_input else status_of(error)


def told(error: Exception) -> str:
    """What the client is told. What is not the client's fault goes into the log, too."""
    if not isinstance(error, ActserveError):
        call.record_refusal("internal")
        log.error("a request failed", exc_info=error)
        return FAILED
    call.record_refusal(error.code)
    report(error)
    return error.message


def answer(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(pydantic_core.to_json({"error": message}), status, headers, media_type="application/json")


def response(error: ActserveError) -> Response:
    return answer(status(error), told(error), headers_of(error))


class OipRoute(APIRoute):
    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except ClientDisconnect:
                raise
            except ActserveError as error:
                return response(error)
            except Exception as error:
                return answer(500, told(error))

        return handle
