"""`/metrics` for Prometheus, and `/policies/{name}/stats` for everybody else."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from actserve.core.errors import UnknownPolicy
from actserve.server.http.requests import registry_of
from actserve.server.metrics.publisher import Publisher
from actserve.server.metrics.summary import summary

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """What all workers counted, in Prometheus's text format, or in OpenMetrics'."""
    from actserve.server.metrics.exposition import expose

    content, content_type = expose(await _publisher(request).families(), request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})


@router.get("/policies/{name}/stats")
async def stats(request: Request, name: str) -> dict[str, Any]:
    """What all workers counted of one policy, of all its versions that are remembered.

    `rate`: actions a second, of the last ten seconds. `buckets`: inference calls by their number of items, each bound
    with those above the bound before. Percentiles are taken from the histograms of `/metrics`, and no finer than their
    buckets; null before the first call.
    """
    known = registry_of(request).names
    if name not in known:
        raise UnknownPolicy(name, known)
    return summary(await _publisher(request).families(), name)


def _publisher(request: Request) -> Publisher:
    found: Publisher = request.app.state.metrics
    return found
