"""RoboArena's configuration: which cameras a policy wants, and which actions it gives."""

from __future__ import annotations

import re
from typing import Any

from actserve.core.environment import Contract
from actserve.core.robot import Robot
from actserve.core.signature import Signature, TensorSpec
from actserve.wire import as_png

ENDPOINT = "endpoint"
RESET = "reset successful"
_CAMERA = re.compile(r"(?:.*[/._])?(wrist|exterior)_image(?:_([0-9]+))?_(left|right)")


def configuration(signature: Signature, contract: Contract | None) -> dict[str, Any] | None:
    """The configuration for a policy with RoboArena's cameras as inputs; None for any other policy."""
    cameras: list[tuple[TensorSpec, re.Match[str]]] = []
    for spec in signature.observations:
        match = _CAMERA.fullmatch(spec.name)
        if match is not None and as_png.is_image(spec):
            cameras.append((spec, match))
    if not cameras:
        return None
    sizes = {spec.shape[:2] for spec, _ in cameras}
    units = contract.action_units if isinstance(contract, Robot) else ""
    return {
        "image_resolution": sizes.pop() if len(sizes) == 1 else None,
        "needs_wrist_camera": any(match[1] == "wrist" for _, match in cameras),
        "n_external_cameras": len({match[2] for _, match in cameras if match[1] == "exterior"}),
        "needs_stereo_camera": any(match[3] == "right" for _, match in cameras),
        "needs_session_id": any(spec.name.endswith("session_id") for spec in signature.observations),
        "action_space": "joint_velocity" if units.endswith("/s") else "joint_position",
    }
