"""The bundle for C++, built with this host's compiler."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from actserve.bundles import Runtime
from actserve.bundles import bundle as bundles
from actserve.bundles.cpp import target
from actserve.bundles.cpp.target import tool
from actserve.core.completion import complete
from actserve.core.errors import RuntimeFailure, UsageError
from actserve.core.signature import Arrays, Exploration
from actserve.engine import golden
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from tests.bundled import artifact_of, flip_a_weight, observations, screens, session
from tests.bundled_cpp import FILES, RANDOM, RESET, SHARED, Refused, artifact, build, built, driven, needs_compiler, run
from tests.exported import ROOT
from tests.publishing import republish

pytestmark = needs_compiler

STEPS = 40
SEED = 7


def check_episode(name: str, runtime: Runtime, exploration: Exploration) -> None:
    found = artifact(name, runtime)
    seen = observations(found, STEPS)
    expected = session(found, seen, exploration, SEED)
    signature = found.manifest.signature
    flags = RANDOM * (exploration == "random")
    with driven(built(name, runtime) / "build" / "policy", signature, "--seed", str(SEED)) as policy:
        for tensors, outputs in zip(seen, expected, strict=True):
            answer = policy.step(tensors, flags)
            for output, array in outputs.items():
                if runtime == "onnx" or array.dtype.kind != "f":
                    np.testing.assert_array_equal(answer[output], array)
                else:
                    np.testing.assert_allclose(answer[output], array, 1e-5, 1e-5)


@pytest.mark.parametrize("name", ["pong-lstm", "tanh_normal", "several_observations"])
def test_an_episode_is_a_session_of_the_service(name: str) -> None:
    for exploration in artifact_of(name).manifest.signature.exploration:
        check_episode(name, "onnx", exploration)


def test_an_episode_of_a_compiled_program_is_a_session_too() -> None:
    check_episode("epsilon_greedy", "pt2", "deterministic")
    check_episode("epsilon_greedy", "pt2", "random")


@pytest.mark.wide
@pytest.mark.parametrize("name", ["pong", "tutorial_lstm", "gaussian_noise", "masked_categorical", "nested"])
def test_an_episode_of_other_policies(name: str) -> None:
    for exploration in artifact_of(name).manifest.signature.exploration:
        check_episode(name, "onnx", exploration)


@pytest.mark.wide
def test_an_episode_of_a_compiled_recurrent_program() -> None:
    check_episode("gru", "pt2", "deterministic")


def test_a_game_takes_the_actions_of_the_service() -> None:
    found = artifact_of("pong-lstm")
    seen, actions = screens(found, 150, seed=3)
    with driven(built("pong-lstm") / "build" / "policy", found.manifest.signature) as policy:
        assert [int(policy.step(tensors)["action"]) for tensors in seen] == actions
        begun_anew = [int(policy.step(tensors, RESET * (i == 0))["action"]) for i, tensors in enumerate(seen[:20])]
        assert begun_anew == actions[:20]


def test_items_of_a_batch_have_the_noise_of_a_request() -> None:
    found = artifact_of("tanh_normal")
    signature = found.manifest.signature
    stacked = {"observation": np.stack([each["observation"] for each in observations(found, 5)])}
    expected = answered(found, stacked, 5, "random", seed=2**62 + 1)
    with driven(built("tanh_normal") / "build" / "policy", signature) as policy:
        answer = policy.step(stacked, RANDOM, seed=2**62 + 1, count=5)
        for name, array in expected.items():
            np.testing.assert_array_equal(answer[name], array)
        first, second = (policy.step({"observation": np.zeros(4)}, RANDOM)["action"] for _ in range(2))
        assert not np.array_equal(first, second), "without a seed, each step has its own noise"


def answered(found: Artifact, tensors: Arrays, size: int, exploration: Exploration, seed: int) -> Arrays:
    """The outputs of a request of the service."""
    runtime = golden.load("onnx", found, 1)
    results = runtime.run(complete(found.manifest.signature, tensors, size, exploration, seed).inputs)
    runtime.close()
    return {name: results[name] for name in found.manifest.signature.output_names}


def test_parameters_are_those_of_the_frame_or_of_the_training() -> None:
    found = artifact("epsilon_greedy", "pt2")
    tensors = {"observation": np.ones(4, np.float32)}
    with driven(built("epsilon_greedy", "pt2") / "build" / "policy", found.manifest.signature) as policy:

        def actions(*epsilon: float) -> set[int]:
            return {int(policy.step(tensors, RANDOM, seed, None, epsilon)["action"]) for seed in range(50)}

        assert len(actions(0.0)) == 1
        assert actions(1.0) == {0, 1, 2}
        assert len(actions(0.25)) > 1
        assert [int(policy.step(tensors, RANDOM, seed)["action"]) for seed in range(50)] == [
            int(policy.step(tensors, RANDOM, seed, None, [0.25])["action"]) for seed in range(50)
        ]
        with pytest.raises(Refused, match=r"epsilon: expected values of at most 1; got 1\.5"):
            actions(1.5)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "expected 1 more bytes in the frame; got 0"),
        (b"\0" * 5, r"expected 1 x 16 bytes of observations; got 4"),
        (b"\0" * 40, r"expected 1 x 16 bytes of observations; got 39"),
        (b"\x80" + b"\0" * 16, "expected flags of 0 to 63; got 128"),
        (b"\x04\0\0", "expected 8 more bytes in the frame; got 2"),
        (b"\x04" + b"\xff" * 8 + b"\0" * 16, r"expected a seed of 0 to 2\*\*63 - 1; got 18446744073709551615"),
        (b"\x08\0\0\0\0", "expected 1 to 256 items; got 0"),
        (b"\x08\x01\x01\0\0" + b"\0" * 16 * 257, "expected 1 to 256 items; got 257"),
        (b"\x08\xff\xff\xff\xff", "expected 4294967295 x 16 bytes of observations; got 0"),
        (b"\x20", r"expected shared memory of 64 bytes \(--shared FILE\); got 0"),
        (b"\0" + np.array([0, np.nan, 0, 0], "<f4").tobytes(), "observation: expected numbers; got NaN"),
    ],
)
def test_a_bad_frame_gets_an_error_and_changes_nothing(frame: bytes, message: str) -> None:
    found = artifact_of("tanh_normal")
    first, second = observations(found, 2)
    expected = session(found, [first, second], "random", SEED)
    with driven(built("tanh_normal") / "build" / "policy", found.manifest.signature, "--seed", str(SEED)) as policy:
        np.testing.assert_array_equal(policy.step(first, RANDOM)["action"], expected[0]["action"])
        with pytest.raises(Refused, match=message):
            policy.exchange(frame)
        np.testing.assert_array_equal(policy.step(second, RANDOM)["action"], expected[1]["action"])


def test_a_policy_with_state_takes_one_item() -> None:
    found = artifact_of("pong-lstm")
    with (
        driven(built("pong-lstm") / "build" / "policy", found.manifest.signature) as policy,
        pytest.raises(Refused, match="expected one item, because the policy has state; got 2"),
    ):
        policy.step({"pixels": np.zeros((2, 210, 160, 3))}, count=2)
    with (
        driven(built("pong-lstm") / "build" / "policy", found.manifest.signature) as policy,
        pytest.raises(Refused, match="exploration: expected deterministic; got random"),
    ):
        policy.step({"pixels": np.zeros((210, 160, 3))}, RANDOM)


def test_random_bytes_end_the_program_in_good_order() -> None:
    program = built("tanh_normal") / "build" / "policy"
    rng = np.random.default_rng(0)
    for _ in range(20):
        parts = [rng.integers(0, 256, rng.integers(0, 40), np.uint8).tobytes() for _ in range(50)]
        frames = b"".join(struct.pack("<I", len(part)) + part for part in parts)
        done = subprocess.run([program], input=frames, capture_output=True, check=False)
        assert done.returncode == 0
        answers, at = 0, 0
        while at < len(done.stdout):
            at += 4 + struct.unpack_from("<I", done.stdout, at)[0]
            answers += 1
        assert (answers, at) == (50, len(done.stdout))
        garbage = subprocess.run([program], input=rng.bytes(3000), capture_output=True, check=False)
        assert garbage.returncode in (0, 1)


@pytest.mark.parametrize("sent", [b"\x11", struct.pack("<IB", 17, 0), struct.pack("<IB", 17, 0) + b"\0" * 15])
def test_an_input_that_ends_within_a_frame_is_an_error(sent: bytes) -> None:
    done = subprocess.run([built("tanh_normal") / "build" / "policy"], input=sent, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"policy: the input ended in the middle of a frame\n"


def test_an_output_that_is_closed_ends_the_program() -> None:
    command = [built("tanh_normal") / "build" / "policy"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as policy:
        assert policy.stdout is not None
        policy.stdout.close()
        assert policy.stdin is not None
        policy.stdin.write(struct.pack("<IB", 17, 0) + bytes(16))
        policy.stdin.close()
        assert policy.stderr is not None
        assert policy.stderr.read() == b"policy: cannot write the output: Broken pipe\n"
        assert policy.wait(60) == 1


def test_observations_in_shared_memory(tmp_path: Path) -> None:
    found = artifact_of("several_observations")
    signature = found.manifest.signature
    seen = observations(found, 10)
    file = tmp_path / "shared"
    file.write_bytes(bytes(64 * len(signature.observations)))
    memory = np.memmap(file, np.uint8, "r+")
    program = built("several_observations") / "build" / "policy"
    with driven(program, signature, "--shared", str(file)) as policy:
        for tensors, outputs in zip(seen, session(found, seen), strict=True):
            for i, spec in enumerate(signature.observations):
                data = np.frombuffer(tensors[spec.name].tobytes(), np.uint8)
                memory[64 * i : 64 * i + len(data)] = data
            for answer in (policy.step({}, SHARED), policy.step(tensors)):
                np.testing.assert_array_equal(answer["action"], outputs["action"])


def test_ctest_runs_the_golden_samples_and_finds_a_flipped_weight(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    bundles.write(artifact_of("tanh_normal"), "cpp", "onnx", folder)
    build(folder, "onnx")
    said = run(tool("ctest"), "--test-dir", str(folder / "build"))
    assert "100% tests passed, 0 tests failed out of 4" in said
    for check in ("single", "batched", "noise", "episode"):
        assert check in said
    _, verified = bundles.verify(folder)
    assert verified.tools.keys() == {"onnxruntime"}

    before = (folder / "policy.onnx").read_bytes()
    flip_a_weight(folder)
    with pytest.raises(RuntimeFailure, match=r"policy.onnx: expected the SHA-256 \w+; got"):
        bundles.verify(folder)
    after = (folder / "policy.onnx").read_bytes()
    header = folder / "include" / "actserve" / "signature.h"
    for old, new in ((sha256(before), sha256(after)), (f"{len(before)}}}", f"{len(after)}}}")):
        assert old in header.read_text()
        header.write_text(header.read_text().replace(old, new))
    with pytest.raises(RuntimeFailure, match="beyond the tolerance"):
        bundles.verify(folder)


def test_a_flipped_weight_of_a_compiled_program_is_found(tmp_path: Path) -> None:
    """The package is published with it, so that every hash is right."""
    found = artifact("epsilon_greedy", "pt2")
    package = tmp_path / "policy.pt2"
    flip_a_compiled_weight(found, package)
    changed = republish(found, ModelStore(tmp_path / "store"), {"policy.pt2": package})
    bundles.write(changed, "cpp", "pt2", tmp_path / "bundle")
    build(tmp_path / "bundle", "pt2")
    with pytest.raises(RuntimeFailure, match=r"action_value: .*beyond the tolerance"):
        bundles.verify(tmp_path / "bundle")


def flip_a_compiled_weight(found: Artifact, package: Path) -> None:
    """Write the artifact's .pt2 to `package`, with its largest weight -30 times what it was."""
    model = onnx.load_model_from_string(found.read("policy.onnx"))
    floats = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    weights = numpy_helper.to_array(max(floats, key=lambda each: np.prod(each.dims)))
    replaced = 0
    with ZipFile(found.folder / "policy.pt2") as source, ZipFile(package, "w") as changed:
        for member in source.infolist():
            data = source.read(member)
            for laid_out in (weights, weights.T):  # as the compiler chose
                other = laid_out.copy()
                other.flat[np.argmax(np.abs(other))] *= -30
                replaced += data.count(laid_out.tobytes())
                data = data.replace(laid_out.tobytes(), other.tobytes())
            changed.writestr(member, data)
    assert replaced == 1


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_onnx_runtime_keeps_no_telemetry(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([built("tanh_normal") / "build" / "policy", "--check"], env=home, check=True, capture_output=True)
    assert list(tmp_path.rglob("*")) == []


def test_the_image_has_the_version_that_is_tested() -> None:
    image = re.search(r"ARG ONNXRUNTIME=(\S+)", (FILES / "files" / "Dockerfile").read_text())
    assert image is not None
    assert f"onnxruntime=={image[1]}\n" in (ROOT / ".ci" / "constraints.txt").read_text()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(UsageError, match="expected cmake, to build the bundle; it is not installed"):
        target.verify(tmp_path, "onnx")


def test_the_program_explains_itself(tmp_path: Path) -> None:
    program = built("tanh_normal") / "build" / "policy"
    assert "--shared FILE" in run(str(program), "--help")
    said = run(str(program), "--bench", "20")
    assert [line.split("  ")[1] for line in said.splitlines()[1:]] == [
        "the program alone",
        "the library",
        "`policy`, shared memory",
        "`policy`, pipes",
    ]
    for options, code, message in (
        (["--seed", "x"], 2, "policy: --seed: expected a whole number"),
        (["--check", "all"], 2, "policy: --check: expected single, batched, noise or episode"),
        (["--folder", str(tmp_path)], 1, f"policy: {tmp_path}/policy.onnx: cannot be read"),
        (["--seed", str(2**63)], 1, "policy: expected a seed of 0 to 2**63 - 1; got 9223372036854775808"),
    ):
        done = subprocess.run([program, *options], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.splitlines()[0]) == (code, message)
