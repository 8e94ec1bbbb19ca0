"""actserve: serves the policies of a model store, and is their client.

From Python: `RemotePolicy`, `AsyncRemotePolicy` and `Stream` call a service, and `Realtime` holds a rate with it; they
need neither torch nor FastAPI.
"""

from __future__ import annotations

import os
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actserve.client.async_remote_policy import AsyncRemotePolicy
    from actserve.client.realtime import Realtime
    from actserve.client.remote_policy import RemotePolicy
    from actserve.client.stream import Stream

__version__ = "0.1.0"
__all__ = ["AsyncRemotePolicy", "Realtime", "RemotePolicy", "Stream"]
_EXPORTS = {
    "AsyncRemotePolicy": "actserve.client.async_remote_policy",
    "Realtime": "actserve.client.realtime",
    "RemotePolicy": "actserve.client.remote_policy",
    "Stream": "actserve.client.stream",
}

# ONNX Runtime reads this when it is imported; without it, it keeps a telemetry database in the user's home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Import a public class when it is first used: serving imports no client."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_name(f"{_EXPORTS[name]}:{name}")
