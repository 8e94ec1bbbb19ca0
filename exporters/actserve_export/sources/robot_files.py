"""Descriptions of robots that other tools write -> `Robot`.

ONNX metadata      of mjlab's, Isaac Lab's and rsl_rl's exporters: comma-separated lists by name
IO descriptors     YAML of Isaac Lab
LEAPP              YAML of NVIDIA's exporter
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from actserve.core.errors import UsageError
from actserve.core.imports import import_extra
from actserve.core.robot import ObservationTerm, Robot

_JOINTS = "joint_names"


def read_robot(path: Path | str) -> Robot:
    """The robot that an `.onnx`, `.yaml` or `.json` file describes. Raises `UsageError` if it describes none."""
    path = Path(path)
    try:
        if path.suffix == ".onnx":
            found = robot_of_onnx(path)
        else:
            document = _document(path.read_text())
            found = robot_of_document(document) if isinstance(document, Mapping) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path.name} cannot be read as the description of a robot: {error}") from error
    if found is None:
        raise UsageError(
            f"{path.name} describes no robot: expected {_JOINTS} in the metadata of an .onnx file, or a YAML file of "
            "Isaac Lab's IO descriptors or of LEAPP"
        )
    return found


def _document(text: str) -> Any:
    """Parse YAML, which JSON is, too. Raises `ValueError`."""
    yaml = import_extra("robots", "yaml")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def robot_in(path: Path) -> Robot | None:
    """The robot in an `.onnx` file's metadata; None also for a file that cannot be read, which the export explains."""
    try:
        return robot_of_onnx(path)
    except (OSError, ValueError):
        return None


def robot_of_onnx(path: Path) -> Robot | None:
    """The robot in an `.onnx` file's metadata; None if it has none. Raises `ValueError` for a file that is no model."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is of no common type
        raise ValueError(f"it is no .onnx file: {error}") from error
    return robot_of_metadata({entry.key: entry.value for entry in model.metadata_props})


def robot_of_metadata(metadata: Mapping[str, str]) -> Robot | None:
    """As mjlab and Isaac Lab write it. Numbers have three decimals there."""
    if not metadata.get(_JOINTS):
        return None
    names = _texts(metadata.get("observation_names", ""))
    scales = [_numbers(part) for part in metadata.get("observation_terms_scale", "").split(",") if part]
    histories = [int(float(part)) for part in _texts(metadata.get("observation_terms_history_length", ""))]
    terms = tuple(
        ObservationTerm(
            name,
            scale=scales[index] if index < len(scales) else (),
            history=max(1, histories[index]) if index < len(histories) else 1,
        )
        for index, name in enumerate(names)
    )
    periods = [float(metadata[name]) for name in ("control_dt", "policy_dt", "step_dt") if name in metadata]
    return Robot(
        joints=tuple(_texts(metadata[_JOINTS])),
        action_scale=_numbers(metadata.get("action_scale", "")),
        action_offset=_numbers(metadata.get("action_offset", "")),
        control_period_s=periods[0] if periods else None,
        observations=terms,
        default_positions=_numbers(metadata.get("default_joint_pos", "")),
        stiffness=_numbers(metadata.get("joint_stiffness", "")),
        damping=_numbers(metadata.get("joint_damping", "")),
    )


def robot_of_document(document: Mapping[str, Any]) -> Robot | None:
    """As Isaac Lab's IO descriptors or LEAPP have it; None for another document."""
    if "actions" in document and "observations" in document:
        return _of_descriptors(document)
    return _of_leapp(document) if "models" in document else None


def _of_descriptors(document: Mapping[str, Any]) -> Robot:
    actions = document["actions"]
    joints = [joint for action in actions for joint in action.get(_JOINTS) or ()]
    groups = document["observations"]
    policy = groups.get("policy", next(iter(groups.values()), [])) if isinstance(groups, Mapping) else groups
    robot: Any = next(iter((document.get("articulations") or {}).values()), {})
    where = [(robot.get(_JOINTS) or []).index(joint) for joint in joints if joint in (robot.get(_JOINTS) or [])]

    def of_joints(name: str) -> tuple[float, ...]:
        values = robot.get(name) or []
        return tuple(float(values[index]) for index in where) if len(where) == len(joints) and values else ()

    scene = document.get("scene") or {}
    step = scene.get("policy_dt") or scene.get("dt", 0) * scene.get("decimation", 1)
    return Robot(
        joints=tuple(joints),
        action_units=_units(actions[0]) if len(actions) == 1 else "",
        action_scale=tuple(value for action in actions for value in _each(action, "scale", len(actions))),
        action_offset=tuple(value for action in actions for value in _each(action, "offset", len(actions))),
        control_period_s=float(step) if step else None,
        observations=tuple(map(_described_term, policy)),
        default_positions=of_joints("default_joint_pos"),
        stiffness=of_joints("default_joint_stiffness"),
        damping=of_joints("default_joint_damping"),
    )


def _each(action: Mapping[str, Any], name: str, actions: int) -> tuple[float, ...]:
    """The scale or offset of an action: one number, or with several actions one for each element."""
    value = action.get(name)
    if value is None:
        value = 1.0 if name == "scale" else 0.0
    values = [float(part) for part in value] if isinstance(value, list) else [float(value)]
    count = len(action.get(_JOINTS) or ()) or int(action["shape"][0])
    return tuple(values * count if actions > 1 and len(values) == 1 else values)


def _described_term(term: Mapping[str, Any]) -> ObservationTerm:
    overloads = {**term, **(term.get("overloads") or {})}
    scale = overloads.get("scale")
    values = scale if isinstance(scale, list) else [] if scale is None else [scale]
    return ObservationTerm(
        str(term["name"]),
        tuple(term.get(_JOINTS) or term.get("body_names") or ()),
        _units(term),
        tuple(float(value) for value in values),
        max(1, int(overloads.get("history_length") or 1)),
    )


def _units(entry: Mapping[str, Any]) -> str:
    return str((entry.get("extras") or {}).get("units") or entry.get("units") or "")


def _of_leapp(document: Mapping[str, Any]) -> Robot | None:
    """The names of the elements of the first output that has some are the joints; each input is a term."""
    models = list(document["models"].values())
    outputs = [output for model in models for output in model.get("outputs") or ()]
    joints = next((names for output in outputs if (names := _elements(output))), ())
    frequency = document.get("frequency") or (document.get("configs") or {}).get("frequency")
    inputs = [given for model in models[:1] for given in model.get("inputs") or ()]
    terms = tuple(ObservationTerm(str(given["name"]), _elements(given), _units(given)) for given in inputs)
    period = 1 / float(frequency) if frequency else None
    return Robot(joints, control_period_s=period, observations=terms) if joints else None


def _elements(tensor: Mapping[str, Any]) -> tuple[str, ...]:
    """The names along the last axis."""
    names = tensor.get("element_names") or []
    names = names[-1] if names and isinstance(names[-1], list) else names
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _texts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.replace(";", ",").split(",") if part.strip())
