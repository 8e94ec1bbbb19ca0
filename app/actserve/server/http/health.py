"""`/healthz` and `/readyz`, for probes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from actserve.core.errors import NotServing
from actserve.server.http.requests import registry_of

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"description": "The service is not ready; the message says why."}})
async def readyz(request: Request) -> Response:
    """Policies are loaded, verified against their golden samples and warm."""
    if reason := registry_of(request).not_ready():
        raise NotServing(reason)
    return Response(b'{"status":"ready"}', media_type="application/json")
