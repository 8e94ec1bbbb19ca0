"""actserve, offline: turns a policy into a verified artifact in a model store.

A factory returns a `PolicySource` or an `OnnxSource`; `from_module` and `from_sb3` make a `PolicySource`.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actserve_export.sources.modules import from_module
    from actserve_export.sources.onnx_source import OnnxSource
    from actserve_export.sources.policy_source import PolicySource
    from actserve_export.sources.sb3 import from_sb3

__all__ = ["OnnxSource", "PolicySource", "from_module", "from_sb3"]
_HOMES = {
    "PolicySource": "actserve_export.sources.policy_source",
    "OnnxSource": "actserve_export.sources.onnx_source",
    "from_module": "actserve_export.sources.modules",
    "from_sb3": "actserve_export.sources.sb3",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'actserve_export' has no attribute {name!r}")
    return resolve_name(f"{_HOMES[name]}:{name}")
