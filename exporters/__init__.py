"""actserve, offline: turns a policy into a verified artifact in a model store.

What a factory returns, and what makes it: `PolicySource`, `from_module`, `from_sb3`, `OnnxSource`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.lazy import resolve

if TYPE_CHECKING:
    from exporters.modules import from_module
    from exporters.onnx_file import OnnxSource
    from exporters.sb3 import from_sb3
    from exporters.source import PolicySource

__all__ = ["OnnxSource", "PolicySource", "from_module", "from_sb3"]
_HOMES = {
    "PolicySource": "exporters.source",
    "OnnxSource": "exporters.onnx_file",
    "from_module": "exporters.modules",
    "from_sb3": "exporters.sb3",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    return resolve(f"{_HOMES[name]}:{name}")
