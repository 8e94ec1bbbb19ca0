"""`actserve bundle`, and the bundle for Python."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actserve.bundles import bundle as bundles
from actserve.core.completion import draw_noise
from actserve.core.errors import RuntimeFailure, UsageError
from actserve.store.artifact import Artifact
from tests.bundled import POLICIES, artifact_of, flip_a_weight, observations, session
from tests.command_line import actserve
from tests.exported import exported

STEPS = 60


def opened(artifact: Artifact, folder: Path) -> Any:
    """The module of a bundle for Python, imported from the bundle."""
    bundles.write(artifact, "python", "onnx", folder)
    spec = importlib.util.spec_from_file_location(f"bundled_{folder.name}", folder / "policy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["pong", "pong-lstm", *POLICIES])
def test_an_episode_is_a_session_of_the_service(name: str, tmp_path: Path) -> None:
    artifact = artifact_of(name)
    policy = opened(artifact, tmp_path / "bundle").Policy()
    seen = observations(artifact, STEPS)
    for exploration in artifact.manifest.signature.exploration:
        expected = session(artifact, seen, exploration, seed=7)
        episode = policy.episode(exploration, seed=7)
        for tensors, outputs in zip(seen, expected, strict=True):
            found = episode.step(*tensors.values())
            assert found.keys() == outputs.keys()
            for output, array in outputs.items():
                np.testing.assert_array_equal(found[output], array)


def test_batches_have_the_noise_of_the_service(tmp_path: Path) -> None:
    artifact = artifact_of("gaussian_noise")
    policy = opened(artifact, tmp_path / "bundle").Policy()
    drawn = policy.draw(2**62, 5)
    for name, array in draw_noise(artifact.manifest.signature.noise, 2**62, 5).items():
        np.testing.assert_array_equal(drawn[name], array)


def test_it_runs_without_actserve_and_verifies_itself(tmp_path: Path) -> None:
    artifact = artifact_of("pong-lstm")
    bundles.write(artifact, "python", "onnx", tmp_path / "bundle")
    code = (
        "import runpy, sys; sys.argv = ['policy.py', '--calls', '3']; runpy.run_path('policy.py', run_name='__main__')"
    )
    blocked = f"import sys; sys.modules['actserve'] = None; {code}"
    found = subprocess.run(
        [sys.executable, "-c", blocked], cwd=tmp_path / "bundle", capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "pong-lstm@1: 32 golden samples are repeated" in found.stdout
    manifest, verified = bundles.verify(tmp_path / "bundle")
    assert manifest == artifact.manifest
    assert verified.tools["numpy"] == np.__version__


def test_a_flipped_weight_is_found_by_the_golden_samples(tmp_path: Path) -> None:
    bundles.write(artifact_of("pong"), "python", "onnx", tmp_path / "bundle")
    flip_a_weight(tmp_path / "bundle")
    with pytest.raises(RuntimeFailure, match=r"not verified: action.* differs from the golden samples in batches of 1"):
        bundles.verify(tmp_path / "bundle")


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    bundles.write(artifact_of("pong"), "python", "onnx", tmp_path / "bundle")
    program = tmp_path / "bundle" / "policy.onnx"
    data = bytearray(program.read_bytes())
    data[len(data) // 2] ^= 1
    program.write_bytes(data)
    with pytest.raises(RuntimeFailure, match=r"policy.onnx has changed"):
        bundles.verify(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pixels": np.zeros((1, 210, 160, 3), np.float32)}, r"pixels: expected uint8\[B, 210, 160, 3\]; got float32"),
        ({"pixels": np.zeros((210, 160, 3), np.uint8)}, r"expected uint8\[B, 210, 160, 3\]"),
        ({"screen": np.zeros((1, 210, 160, 3), np.uint8)}, "expected inputs of pixels; got screen"),
        ({}, r"expected pixels, uint8\[210, 160, 3\]; got nothing"),
        ({"pixels": np.zeros((300, 210, 160, 3), np.uint8)}, "expected at most 256 items; got 300"),
    ],
)
def test_bad_input_is_refused(given: Any, message: str, tmp_path: Path) -> None:
    module = opened(artifact_of("pong"), tmp_path / "bundle")
    policy = module.Policy()
    with pytest.raises(module.BadInput, match=message):
        policy.act(given)
    with pytest.raises(module.BadInput, match="expected pixels"):
        policy.episode().act()
    with pytest.raises(module.BadInput, match="expected an exploration of deterministic; got 'random'"):
        policy.episode("random").act(np.zeros((210, 160, 3), np.uint8))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    artifact = artifact_of("pong")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="expected a new or an empty folder"):
        bundles.write(artifact, "python", "onnx", tmp_path)
    with pytest.raises(UsageError, match="expected --runtime onnx for the target python; got pt2"):
        bundles.write(artifact, "python", "pt2", tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"has no bundle\.json"):
        bundles.verify(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_bundle_without_its_manifest_is_none(tmp_path: Path) -> None:
    bundles.write(artifact_of("pong"), "python", "onnx", tmp_path / "bundle")
    (tmp_path / "bundle" / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"or no manifest\.json"):
        bundles.verify(tmp_path / "bundle")


def test_the_store_remembers_where_a_bundle_was_verified(tmp_path: Path) -> None:
    store = exported("tests.policies:cart", ("onnx",)).root
    folder, copy = tmp_path / "bundle", tmp_path / "store"
    shutil.copytree(store, copy)
    at = ("--store", str(copy))
    said = actserve("bundle", "cart", "--target", "python", "--out", str(folder), *at)
    assert "policy.py" in said.stdout
    for _ in range(2):
        assert actserve("verify", "--bundle", str(folder), *at).returncode == 0
    shown = actserve("inspect", "cart", *at).stdout
    assert shown.count("verified in a bundle: python (.onnx) on ") == 1
    assert "expected NAME[@VERSION] or --bundle DIR" in actserve("verify", *at).stderr


def test_a_bundle_holds_if_the_store_cannot_remember_it(tmp_path: Path) -> None:
    folder, copy = tmp_path / "bundle", tmp_path / "store"
    artifact = artifact_of("pong")
    bundles.write(artifact, "python", "onnx", folder)
    shutil.copytree(artifact.folder, copy / "pong" / artifact.folder.name)
    (copy / "pong" / f"{artifact.manifest.version}.bundles.json").mkdir()  # where the file should be
    said = actserve("verify", "--bundle", str(folder), "--store", str(copy))
    assert said.returncode == 0
    assert "the golden samples are repeated by python" in said.stdout
    assert "cannot be written beside pong@" in said.stderr
    assert [file.name for file in (copy / "pong").glob("*.bundles.*")] == [f"{artifact.manifest.version}.bundles.json"]
