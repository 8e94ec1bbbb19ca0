"""Errors in the format of the protocol: `{"error": "message"}`, for routers with `route_class=OipRoute`.

For gRPC, `actserve.server.protocols.grpc.status` has the status codes.
"""

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
from actserve.server.http.error_responses import INTERNAL, headers_of, log_if_internal, status_of
from actserve.telemetry import call

log = logging.getLogger("actserve")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def status(error: ActserveError) -> int:
    """The status of the other routes, except that the protocol answers invalid input with 400."""
    bad_input = isinstance(error, InvalidRequest) and not isinstance(error, BodyTooLarge | TooManyItems | StepConflict)
    return 400 if bad_input else status_of(error)


def client_message(error: Exception) -> str:
    """The message for the client. Counts the error, and logs it if it is internal."""
    if not isinstance(error, ActserveError):
        call.record_refusal("internal")
        log.error("a request failed", exc_info=error)
        return INTERNAL
    call.record_refusal(error.code)
    log_if_internal(error)
    return error.message


def message_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(pydantic_core.to_json({"error": message}), status, headers, media_type="application/json")


def response(error: ActserveError) -> Response:
    return message_response(status(error), client_message(error), headers_of(error))


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
                return message_response(500, client_message(error))

        return handle
