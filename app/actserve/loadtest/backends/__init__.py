"""The protocols that the load generator speaks, one per module."""

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

__all__ = ["BACKENDS", "Backend", "create_backend"]


def create_backend(via: str, url: str, description: PolicyDescription, seed: int, token: str | None = None) -> Backend:
    """`via` is one of `BACKENDS`."""
    backend: Backend = resolve_name(BACKENDS[via])(url, description, seed, token)
    return backend
