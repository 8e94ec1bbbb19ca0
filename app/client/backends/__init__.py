"""How the load generator speaks to a service: one file a way."""

from __future__ import annotations

from app.client.backends.base import Backend
from app.client.operations import Description
from app.lazy import resolve

BACKENDS = {
    "http": "app.client.backends.http:Http",
    "session": "app.client.backends.session:Sessions",
    "stream": "app.client.backends.stream:Streams",
    "oip": "app.client.backends.oip:Oip",
}

__all__ = ["BACKENDS", "Backend", "backend"]


def backend(via: str, url: str, description: Description, seed: int, token: str | None = None) -> Backend:
    """`via` is one of `BACKENDS`."""
    made: Backend = resolve(BACKENDS[via])(url, description, seed, token)
    return made
