"""Observed: around all routes. It gives each request its id, counts its answer, and traces and logs it if that is on.

The fast lane's requests never come here; its doors count for themselves.
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
# What can be the first message of an answer, and the status where the message has none.
_STARTS = {
    "http.response.start": 500,
    "websocket.accept": 101,
    "websocket.close": 403,
    "websocket.http.response.start": 403,
}


class ObservabilityMiddleware:
    """An ASGI application around the app's others. What it is to do is in `app.state`: `registry`, `traces` and
    `settings.access_log`."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        call = Call.of(next((v.decode("latin-1") for k, v in scope["headers"] if k == _ID), None))
        current.set(call)  # for good: a request is a task of its own
        state = scope["app"].state
        state.traces.begin(call)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if not status and message["type"] in _STARTS:
                status = message.get("status", _STARTS[message["type"]])
                policy = _policy(scope, state.registry)
                state.registry.counts.tally(policy, "http", _route(scope)).add(str(status), call.reason)
                state.traces.end(call, policy)
                if message["type"] != "websocket.close":
                    message = {**message, "headers": [*message.get("headers", ()), (_ID, call.id.encode())]}
            await send(message)

        try:
            await self._inner(scope, receive, answer)
        finally:
            if state.settings.access_log:
                _log(scope, call, status)


def _route(scope: Scope) -> str:
    """The route's template; "" where there is none."""
    return getattr(scope.get("route"), "path", "")


def _policy(scope: Scope, registry: Registry) -> str:
    """The policy that the route is about, if there is such a one."""
    name = registry.default if _route(scope) in DEFAULT else scope.get("path_params", {}).get("name")
    return name if name in registry.names else ""


def _log(scope: Scope, call: Call, status: int) -> None:
    method = scope.get("method", "WEBSOCKET")
    duration_ms = round((perf_counter_ns() - call.begun_ns) / 1e6, 3)
    facts: dict[str, Any] = {"method": method, "path": scope["path"], "status": status, "duration_ms": duration_ms}
    if call.reason is not None:
        facts["reason"] = call.reason
    log.info("%s %r %s in %s ms", method, scope["path"], status, duration_ms, extra=facts)
