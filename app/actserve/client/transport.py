"""HTTP connections and addresses of a service. The client's only module that uses urllib3."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.util import Url

from actserve import wire
from actserve.client.operations import HttpRequest, HttpResponse, policy_path
from actserve.core.errors import ServiceUnreachable, UsageError

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0


class HttpConnection:
    """One keep-alive connection to the service at `url`, or at the Unix socket `uds`. Opened on first use.

    Every request carries `token`, for services that require one.
    """

    def __init__(self, url: str, uds: str | None, token: str | None = None) -> None:
        self._headers = authorization_header(token)
        self._address = url if uds is None else f"{url} through {uds}"
        self._path_prefix = path_prefix(parse_service_url(url))
        self._pool = _pool(url, uds)
        self._used = False

    def exchange(self, request: HttpRequest) -> HttpResponse:
        """Raises `ServiceUnreachable`."""
        try:
            try:
                response = self._send(request)
            except urllib3.exceptions.ProtocolError as error:
                # The service closed the idle connection while we reused it: retry once on a new connection.
                if not request.idempotent or not self._used or not isinstance(error.args[-1], ConnectionError):
                    raise
                response = self._send(request)
        except urllib3.exceptions.HTTPError as error:
            raise ServiceUnreachable(f"no answer from {self._address}: {error}", url=self._address) from error
        self._used = True
        headers = response.headers
        version = headers.get(wire.VERSION_HEADER, "")
        return HttpResponse(response.status, headers.get("Content-Type", ""), response.data, version)

    def close(self) -> None:
        self._pool.close()

    def _send(self, request: HttpRequest) -> urllib3.BaseHTTPResponse:
        path, headers = self._path_prefix + request.path, {**request.headers, **self._headers}
        return self._pool.urlopen(request.method, path, request.body, headers, retries=False, redirect=False)


def authorization_header(token: str | None) -> dict[str, str]:
    """The `Authorization` header, or no header without a token."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def parse_service_url(url: str) -> Url:
    """Raises `UsageError` if `url` is not the address of a service."""
    expected = f"expected a URL such as http://127.0.0.1:8000; got {url!r}"
    try:
        parsed = urllib3.util.parse_url(url)
    except urllib3.exceptions.HTTPError as error:
        raise UsageError(f"{expected}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(expected)
    return parsed


def path_prefix(url: Url) -> str:
    """The prefix of every path, for a service that is not at the root of its host. "" for none."""
    return (url.path or "").rstrip("/")


def stream_url(service: Url, policy: str | None, version: int | None, query: Mapping[str, Any]) -> str:
    """The address of a stream of `service`. Query values of None are left out. Raises `UsageError`."""
    if version is not None and policy is None:
        raise UsageError(f"`version` requires `policy`; got version {version} and no policy")
    path = path_prefix(service)
    path += policy_path(policy) if policy is not None else ""
    path += f"/versions/{version}" if version is not None else ""
    scheme = "wss" if service.scheme == "https" else "ws"
    address = f"{scheme}://{service.netloc}{path}/stream"
    asked = {name: value for name, value in query.items() if value is not None}
    return f"{address}?{urlencode(asked)}" if asked else address


def _pool(url: str, uds: str | None) -> urllib3.HTTPConnectionPool:
    timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=ANSWER_TIMEOUT_S)
    if uds is not None:
        return _UnixPool("localhost", timeout=timeout, maxsize=1, block=True, uds=uds)
    return urllib3.connection_from_url(url, timeout=timeout, maxsize=1, block=True)


class _UnixConnection(HTTPConnection):
    def __init__(self, *args: Any, uds: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._uds = uds

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_TIMEOUT_S)
        try:
            self.sock.connect(self._uds)
        except OSError as error:
            self.close()
            raise urllib3.exceptions.NewConnectionError(self, f"{error}") from error


class _UnixPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _UnixConnection
