"""How the load generator speaks to a service: one file a way."""

from __future__ import annotations

from pkgutil import resolve_name

from actserve.client.operations import PolicyDescription
from actserve.loadtest.backends.base import Backend

BACKENDS = {
    "http": "actserve.loadtest.backends.http:HttpBackend",
    "session": "actserve.loadtest.backends.session:SessionBackend",
    "stream": "actserve.loadtest.backends.stream:StreamBackend",
    "oip": "actserve.loadtest.backends.oip:OipBackend",
}

__all__ = ["BACKENDS", "Backend", "backend"]


def backend(via: str, url: str, description: PolicyDescription, seed: int, token: str | None = None) -> Backend:
    """`via` is one of `BACKENDS`."""
    made: Backend = resolve_name(BACKENDS[via])(url, description, seed, token)
    return made
