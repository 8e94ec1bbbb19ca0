"""actserve, offline: turns a policy into a verified artifact in a model store.

A factory returns a `PolicySource` or an `OnnxSource`. `from_module` makes a `PolicySource` of any module, `from_sb3`,
`from_rsl_rl`, `from_skrl`, `from_rl_games` and `from_lerobot` of what these libraries train. `export` publishes one, as
`actserve export` does.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actserve.core.signature import Chunk
    from actserve_export.publish import export
    from actserve_export.sources.lerobot import from_lerobot
    from actserve_export.sources.modules import from_module
    from actserve_export.sources.onnx_source import OnnxSource
    from actserve_export.sources.policy_source import PolicySource
    from actserve_export.sources.rl_games import from_rl_games
    from actserve_export.sources.robot_files import read_robot
    from actserve_export.sources.rsl_rl import from_rsl_rl
    from actserve_export.sources.sb3 import from_sb3
    from actserve_export.sources.skrl import from_skrl

__all__ = [
    "Chunk",
    "OnnxSource",
    "PolicySource",
    "export",
    "from_lerobot",
    "from_module",
    "from_rl_games",
    "from_rsl_rl",
    "from_sb3",
    "from_skrl",
    "read_robot",
]
_HOMES = {
    "Chunk": "actserve.core.signature",
    "export": "actserve_export.publish",
    "PolicySource": "actserve_export.sources.policy_source",
    "OnnxSource": "actserve_export.sources.onnx_source",
    "from_module": "actserve_export.sources.modules",
    "from_lerobot": "actserve_export.sources.lerobot",
    "from_rl_games": "actserve_export.sources.rl_games",
    "from_rsl_rl": "actserve_export.sources.rsl_rl",
    "from_sb3": "actserve_export.sources.sb3",
    "from_skrl": "actserve_export.sources.skrl",
    "read_robot": "actserve_export.sources.robot_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'actserve_export' has no attribute {name!r}")
    return resolve_name(f"{_HOMES[name]}:{name}")
