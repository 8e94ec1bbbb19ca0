"""RootPathMiddleware: the service below a prefix of a proxy's paths, such as `/robots`."""

from __future__ import annotations

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class RootPathMiddleware:
    """The outermost ASGI middleware. `root_path` begins with a slash and does not end with one; "" for none.

    The proxy may remove the prefix, or leave it. By ASGI, `path` has it in both cases.
    """

    def __init__(self, inner: ASGIApp, root_path: str) -> None:
        self._inner, self._root_path = inner, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and self._root_path:
            scope["root_path"] = self._root_path
            if scope["path"] == self._root_path:  # the addresses in the page are relative to the slash
                await RedirectResponse(self._root_path + "/", 308)(scope, receive, send)
                return
            if not scope["path"].startswith(self._root_path + "/"):
                scope["path"] = self._root_path + scope["path"]
                scope["raw_path"] = self._root_path.encode() + scope["raw_path"]
        await self._inner(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path below the prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
