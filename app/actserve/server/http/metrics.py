"""`/metrics` for Prometheus, and `/policies/{name}/stats` as JSON."""

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
    """The metrics of all workers, in the text format of Prometheus or OpenMetrics."""
    from actserve.server.metrics.exposition import expose  # prometheus_client is not needed to start

    content, content_type = expose(await _publisher(request).families(), request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})


@router.get("/policies/{name}/stats")
async def stats(request: Request, name: str) -> dict[str, Any]:
    """The metrics of one policy, over all workers and all versions that have counts.

    `rate`: actions a second, over the last ten seconds. `buckets`: inference calls by their number of items; each key
    is the upper bound of its bucket, and the counts are not cumulative. Percentiles come from the histograms of
    `/metrics` and are as coarse as their buckets; null before the first call.
    """
    known = registry_of(request).names
    if name not in known:
        raise UnknownPolicy(name, known)
    return summary(await _publisher(request).families(), name)


def _publisher(request: Request) -> Publisher:
    publisher: Publisher = request.app.state.metrics
    return publisher
