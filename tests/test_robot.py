"""The contract of a robot: read from other tools' files, kept in the manifest, shown, and checked by a client."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from actserve.cli.commands.artifacts import inspect
from actserve.client.operations import PolicyDescription
from actserve.core.environment import game_of
from actserve.core.errors import EnvironmentMismatch, UsageError
from actserve.core.robot import ObservationTerm, Robot
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export import OnnxSource, read_robot
from actserve_export.publish import export

METADATA = {  # as mjlab's exporter_utils writes it
    "run_path": "none",
    "joint_names": "hip,knee",
    "joint_stiffness": "40.000,20.500",
    "joint_damping": "1.000,0.500",
    "default_joint_pos": "0.100,-0.200",
    "command_names": "twist",
    "observation_names": "joint_pos,joint_vel,command",
    "observation_terms_scale": "1.000,0.050;0.100,2.000",
    "observation_terms_history_length": "0,3,1",
    "observation_terms_clip": "-inf;inf,-inf;inf,-inf;inf",
    "action_scale": "0.500,0.250",
}
WALKER = Robot(
    joints=("hip", "knee"),
    action_scale=(0.5, 0.25),
    observations=(
        ObservationTerm("joint_pos", scale=(1.0,)),
        ObservationTerm("joint_vel", scale=(0.05, 0.1), history=3),
        ObservationTerm("command", scale=(2.0,)),
    ),
    default_positions=(0.1, -0.2),
    stiffness=(40.0, 20.5),
    damping=(1.0, 0.5),
)
DESCRIPTORS = """
actions:
- name: joint_position_action
  joint_names: [knee, hip]
  scale: 0.5
  offset: [-0.2, 0.1]
  shape: [2]
  extras: {description: positions, units: rad}
articulations:
  robot:
    joint_names: [hip, ankle, knee]
    default_joint_pos: [0.1, 0.0, -0.2]
    default_joint_stiffness: [40.0, 0.0, 20.0]
observations:
  policy:
  - {name: joint_pos_rel, joint_names: [knee, hip], shape: [2], extras: {units: rad}}
  - {name: base_lin_vel, shape: [9], overloads: {history_length: 3, scale: 2.0}}
scene: {decimation: 4, dt: 0.02, physics_dt: 0.005, policy_dt: 0.02}
"""
LEAPP = """
frequency: 50
models:
  policy:
    inputs:
    - {name: joint_positions, shape: [1, 2], element_names: [[hip, knee]]}
    - {name: command, shape: [1, 3]}
    outputs:
    - {name: joint_targets, shape: [1, 2], element_names: [[hip, knee]]}
"""


def model(folder: Path, metadata: dict[str, str]) -> Path:
    """An `.onnx` file: actions = obs · weights."""
    weights = helper.make_tensor("weights", TensorProto.FLOAT, [6, 2], np.arange(12.0))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["obs", "weights"], ["actions"])],
        "policy",
        [helper.make_tensor_value_info("obs", TensorProto.FLOAT, ["B", 6])],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT, ["B", 2])],
        [weights],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(made, metadata)
    onnx.save(made, folder / "walker.onnx")
    return folder / "walker.onnx"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    store = ModelStore(tmp_path / "store")
    return export(OnnxSource(model(tmp_path, METADATA)), "walker", store, origin="x", runtimes=["onnx"]).artifact


def test_metadata_of_an_onnx_file_becomes_the_contract(artifact: Artifact) -> None:
    read = ModelStore(artifact.folder.parent.parent).resolve("walker").manifest
    assert read.environment == WALKER
    assert game_of(read.environment) is None


def test_inspect_shows_it(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    inspect("walker", store=str(artifact.folder.parent.parent), graph=False, json=False)
    shown = capsys.readouterr().out
    for line in (
        "joints  hip, knee",
        "command  action × [0.5, 0.25] + 0",
        "stiffness  [40, 20.5]",
        "observes  joint_vel, × [0.05, 0.1], 3 steps",
    ):
        assert f"  {line}\n" in shown
    inspect("walker", store=str(artifact.folder.parent.parent), graph=False, json=True)
    assert json.loads(capsys.readouterr().out)["environment"]["joints"] == ["hip", "knee"]


def test_descriptors_of_isaac_lab(tmp_path: Path) -> None:
    (tmp_path / "io.yaml").write_text(DESCRIPTORS)
    assert read_robot(tmp_path / "io.yaml") == Robot(
        joints=("knee", "hip"),
        action_units="rad",
        action_scale=(0.5,),
        action_offset=(-0.2, 0.1),
        control_period_s=0.02,
        observations=(
            ObservationTerm("joint_pos_rel", ("knee", "hip"), "rad"),
            ObservationTerm("base_lin_vel", scale=(2.0,), history=3),
        ),
        default_positions=(-0.2, 0.1),
        stiffness=(20.0, 40.0),
    )


def test_leapp(tmp_path: Path) -> None:
    (tmp_path / "leapp.yaml").write_text(LEAPP)
    assert read_robot(tmp_path / "leapp.yaml") == Robot(
        joints=("hip", "knee"),
        control_period_s=0.02,
        observations=(ObservationTerm("joint_positions", ("hip", "knee")), ObservationTerm("command")),
    )


def test_a_file_that_describes_no_robot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"walker\.onnx describes no robot: expected joint_names in the metadata"):
        read_robot(model(tmp_path, {}))
    for text in ("a: [", "actions: 1\nobservations: 2", "- 1"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=r"bad\.yaml"):
            read_robot(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read"):
        read_robot(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (Robot(("knee", "hip")), "expected the joints .* hip, knee; the client names knee, hip, in another order"),
        (Robot(("hip",)), "the client names hip$"),
        (replace(WALKER, observations=WALKER.observations[::-1]), "the observation terms .* in another order"),
        (replace(WALKER, action_scale=(0.5,)), "the action_scale"),
        (replace(WALKER, action_units="rad"), "the action_units that the policy was trained with are not known"),
    ],
)
def test_a_client_with_another_robot_is_refused(client: Robot, reason: str) -> None:
    with pytest.raises(EnvironmentMismatch, match=reason):
        WALKER.check(client)
    WALKER.check(Robot(("hip", "knee")))
    WALKER.check(WALKER)


def test_a_client_with_another_period_is_refused() -> None:
    robot = replace(WALKER, control_period_s=0.02)
    robot.check(replace(WALKER, control_period_s=0.0201))
    with pytest.raises(EnvironmentMismatch, match=r"control period of 0\.02 s; the client's is 0\.01 s"):
        robot.check(replace(WALKER, control_period_s=0.01))


def test_without_a_description_nothing_can_be_checked(artifact: Artifact) -> None:
    signature: Any = artifact.manifest.signature
    described = PolicyDescription("walker", 1, "onnx", "", signature, None)
    described.check_robot(None)
    with pytest.raises(EnvironmentMismatch, match="walker was not exported with the description of a robot"):
        described.check_robot(WALKER)
