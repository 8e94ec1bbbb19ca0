"""The gate before the routes: tokens, where a WebSocket comes from, other sites' pages, and the headers of our own."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actserve.core.errors import ActserveError, ForbiddenOrigin
from actserve.core.settings import Settings
from actserve.server.access.tokens import Access, current
from actserve.server.http import error_responses as errors
from actserve.server.protocols.oip.error_responses import response as oip_response

PUBLIC = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/"})  # need no token
PAGE = "/page/"  # nor do its files
METRICS = "/metrics"
SUBPROTOCOL, TOKEN = "actserve", "bearer."

OWN = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_DOCS = (  # FastAPI's pages, which come from elsewhere
    "default-src 'self'; script-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; img-src 'self' data: https://fastapi.tiangolo.com; "
    "worker-src blob:; frame-ancestors 'none'"
)


def install(app: FastAPI, access: Access | None, settings: Settings) -> None:
    """Without `access` everybody may come."""
    origins = settings.origins
    public = PUBLIC | {METRICS} if settings.public_metrics else PUBLIC
    app.add_middleware(Gate, access=access, public=public, origins=origins)
    if origins:  # outermost: a preflight has no token, and a refusal is to be readable, too
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )


class Gate:
    def __init__(self, app: ASGIApp, access: Access | None, public: frozenset[str], origins: list[str]) -> None:
        self._app, self._access, self._public, self._origins = app, access, public, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        token = None
        try:
            if scope["type"] == "websocket":
                self._check_origin(headers)
            if self._access is not None and scope["path"] not in self._public and not scope["path"].startswith(PAGE):
                token = self._access.admit(_authorization(scope, headers))
        except ActserveError as error:
            await _refusal(scope["path"], error)(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                _protect(scope["path"], MutableHeaders(scope=message))
            elif message["type"] == "websocket.accept" and SUBPROTOCOL in scope.get("subprotocols", ()):
                message["subprotocol"] = SUBPROTOCOL
            await send(message)

        before = current.set(token)
        try:
            await self._app(scope, receive, send_safely)
        finally:
            current.reset(before)

    def _check_origin(self, headers: Headers) -> None:
        """A browser lets every page open a WebSocket to everywhere, and says whose page it is. Raises
        `ForbiddenOrigin`."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise ForbiddenOrigin("expected a WebSocket from a page of this service; the origin is another one")


def _authorization(scope: Scope, headers: Headers) -> bytes | None:
    """What one header says. A browser's WebSocket can have none: its page offers the subprotocols `actserve` and
    `bearer.TOKEN`."""
    given = headers.getlist("authorization")
    if scope["type"] == "websocket" and not given:
        given = [
            f"Bearer {name.removeprefix(TOKEN)}" for name in scope.get("subprotocols", ()) if name.startswith(TOKEN)
        ]
    return given[0].encode("latin-1") if len(given) == 1 else None


def _refusal(path: str, error: ActserveError) -> Response:
    return oip_response(error) if path.startswith("/v2") else errors.response(error)


def _protect(path: str, headers: MutableHeaders) -> None:
    """What a browser is to keep to when it shows one of our pages."""
    if headers.get("content-type", "").startswith("text/html"):
        headers.setdefault("Content-Security-Policy", _DOCS if path.startswith(("/docs", "/redoc")) else OWN)
        headers.setdefault("Referrer-Policy", "no-referrer")
