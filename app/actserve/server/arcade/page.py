"""The page at `/`: static files of the package. They load nothing from other hosts."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from actserve.server.http import security

router = APIRouter(include_in_schema=False)

INDEX = "index.html"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
HEADERS = {
    "Content-Security-Policy": security.PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers revalidate it with the entity tag
}


@cache
def assets() -> dict[str, tuple[bytes, str]]:
    """Name -> (content, entity tag) of every file of the page."""
    found = {file.name: file.read_bytes() for file in (files("actserve") / "web").iterdir() if file.is_file()}
    return {name: (content, f'"{hashlib.sha256(content).hexdigest()[:16]}"') for name, content in found.items()}


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    return _file(request, INDEX)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def asset(request: Request, name: str) -> Response:
    if name not in assets():
        raise HTTPException(404, "Not Found")
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    content, tag = assets()[name]
    headers = HEADERS | {"ETag": tag}
    if request.app.state.settings.bundles is not None:
        headers["Content-Security-Policy"] += security.IN_BROWSER
    if request.headers.get("if-none-match") == tag:
        return Response(None, 304, headers)
    return Response(content, headers=headers, media_type=TYPES[name.rpartition(".")[2]])
