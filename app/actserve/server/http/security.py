"""Security middleware of the routes: tokens, the origin of WebSockets, CORS, and the headers of our own pages."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actserve.core.errors import ActserveError, ForbiddenOrigin
from actserve.core.settings import Settings
from actserve.server.admission import Admission, Ticket, current_ticket
from actserve.server.http.error_responses import response
from actserve.server.http.root_path import route_path
from actserve.server.protocols.oip.error_responses import response as oip_response

PUBLIC = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/"})  # need no token
OPEN = ("/page/", "/bundles/")  # the page's files, and policies for browsers, need none either
METRICS = "/metrics"
SUBPROTOCOL, TOKEN = "actserve", "bearer."

IN_BROWSER = "; script-src 'self' 'wasm-unsafe-eval'"  # what a policy in the browser needs beside it
PAGE_POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_DOCS_POLICY = (  # FastAPI's pages load scripts from a CDN
    "default-src 'self'; script-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; img-src 'self' data: https://fastapi.tiangolo.com; "
    "worker-src blob:; frame-ancestors 'none'"
)


def install(app: FastAPI, admission: Admission, settings: Settings) -> None:
    """Add the middleware, and CORS if the settings list origins."""
    origins = settings.origins
    public = PUBLIC | {METRICS} if settings.public_metrics else PUBLIC
    app.add_middleware(SecurityMiddleware, admission=admission, public=public, origins=origins)
    if origins:  # outside the token check: a preflight carries no token, and the browser must be able to read a refusal
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )


class SecurityMiddleware:
    """Opens a ticket for each request, refuses WebSockets from other sites, and adds security headers."""

    def __init__(self, app: ASGIApp, admission: Admission, public: frozenset[str], origins: list[str]) -> None:
        self._app, self._admission, self._public, self._origins = app, admission, public, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), route_path(scope)
        ticket = Ticket(memory=self._admission.memory)
        try:
            if scope["type"] == "websocket":
                self._check_origin(headers)
            is_public = path in self._public or path.startswith(OPEN)
            if not is_public or scope["type"] == "websocket":  # `/` is the page, and openpi's WebSocket
                ticket = self._admission.open(_authorization(scope, headers))
        except ActserveError as error:
            await _refusal(path, error)(scope, receive, send)
            return

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                _protect(path, MutableHeaders(scope=message))
            elif message["type"] == "websocket.accept" and SUBPROTOCOL in scope.get("subprotocols", ()):
                message["subprotocol"] = SUBPROTOCOL
            await send(message)

        before = current_ticket.set(ticket)
        try:
            await self._app(scope, receive, send_secured)
        finally:
            current_ticket.reset(before)
            ticket.release()

    def _check_origin(self, headers: Headers) -> None:
        """Raises `ForbiddenOrigin` for a WebSocket from another site's page: browsers do not prevent it."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise ForbiddenOrigin("expected a WebSocket from a page of this service; got another origin")


def _authorization(scope: Scope, headers: Headers) -> bytes | None:
    """The Authorization header, if there is exactly one.

    A browser's WebSocket cannot send one: our page offers the subprotocols `actserve` and `bearer.TOKEN` instead.
    Robots' clients may send the password of a WebSocket's URL. Elsewhere it is not read: browsers send it unasked.
    """
    given = headers.getlist("authorization")
    if scope["type"] == "websocket" and len(given) == 1 and (password := _password(given[0])) is not None:
        return b"Bearer " + password
    if scope["type"] == "websocket" and not given:
        given = [
            f"Bearer {name.removeprefix(TOKEN)}" for name in scope.get("subprotocols", ()) if name.startswith(TOKEN)
        ]
    return given[0].encode("latin-1") if len(given) == 1 else None


def _password(authorization: str) -> bytes | None:
    """The password of `Authorization: Basic` (RFC 7617)."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(encoded.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None


def _refusal(path: str, error: ActserveError) -> Response:
    return oip_response(error) if path.startswith("/v2") else response(error)


def _protect(path: str, headers: MutableHeaders) -> None:
    """Add the security headers of an HTML page."""
    if headers.get("content-type", "").startswith("text/html"):
        headers.setdefault(
            "Content-Security-Policy", _DOCS_POLICY if path.startswith(("/docs", "/redoc")) else PAGE_POLICY
        )
        headers.setdefault("Referrer-Policy", "no-referrer")
