"""ObservabilityMiddleware: gives each request its id, counts the response, and traces and logs it if configured.

Requests on the fast path do not pass this middleware; the fast path counts them itself.
"""

from __future__ import annotations

import logging
from time import perf_counter_ns
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actserve.engine.registry import Registry
from actserve.telemetry.call import HEADER, Call, current
from actserve.telemetry.counts import DEFAULT

log = logging.getLogger("actserve.access")

_ID = HEADER.lower().encode()
# The messages that can begin a response, and their status if the message has none.
_FIRST_MESSAGES = {
    "http.response.start": 500,
    "websocket.accept": 101,
    "websocket.close": 403,
    "websocket.http.response.start": 403,
}


class ObservabilityMiddleware:
    """The outermost ASGI middleware. It is configured in `app.state`: `registry`, `traces`, `settings.access_log`."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        call = Call.of(next((v.decode("latin-1") for k, v in scope["headers"] if k == _ID), None))
        current.set(call)  # never reset: each request has its own task
        state = scope["app"].state
        state.traces.begin(call)
        status = 0
        is_head = scope.get("method") == "HEAD"
        if is_head:  # HEAD is answered wherever GET is (RFC 9110, 9.3.2); the server sends no body
            scope = {**scope, "method": "GET"}

        async def send_observed(message: Message) -> None:
            nonlocal status
            if not status and message["type"] in _FIRST_MESSAGES:
                status = message.get("status", _FIRST_MESSAGES[message["type"]])
                policy = _policy(scope, state.registry)
                state.registry.counts.tally(policy, "http", _route(scope)).add(str(status), call.reason)
                state.traces.end(call, policy)
                if message["type"] != "websocket.close":
                    message = {**message, "headers": [*message.get("headers", ()), (_ID, call.id.encode())]}
            if is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._inner(scope, receive, send_observed)
        finally:
            if state.settings.access_log:
                _log({**scope, "method": "HEAD"} if is_head else scope, call, status)


def _route(scope: Scope) -> str:
    """The route's template, or ""."""
    return getattr(scope.get("route"), "path", "")


def _policy(scope: Scope, registry: Registry) -> str:
    """The name of the policy that the route is about, or ""."""
    name = registry.default if _route(scope) in DEFAULT else scope.get("path_params", {}).get("name")
    return name if name in registry.names else ""


def _log(scope: Scope, call: Call, status: int) -> None:
    method = scope.get("method", "WEBSOCKET")
    duration_ms = round((perf_counter_ns() - call.begun_ns) / 1e6, 3)
    facts: dict[str, Any] = {"method": method, "path": scope["path"], "status": status, "duration_ms": duration_ms}
    if call.reason is not None:
        facts["reason"] = call.reason
    log.info("%s %r %s in %s ms", method, scope["path"], status, duration_ms, extra=facts)
