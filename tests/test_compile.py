from __future__ import annotations

import json
import pickle
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from actserve.core.errors import CaptureFailed, CorruptFile, Disagreement, MissingFile
from actserve.engine import golden
from actserve.engine.runtimes.load import load
from actserve.engine.runtimes.preflight import refusal, this_host
from actserve.store.artifact import Artifact, Program
from actserve.store.local import ModelStore
from actserve_export import compile as compiling
from actserve_export.capture import TracedPolicy, capture
from actserve_export.programs import aoti
from actserve_export.programs.elf import read_requirements
from actserve_export.programs.exported import PROGRAM, load_program, save_program
from actserve_export.programs.references import SMALLEST_BYTES
from actserve_export.publish import export
from actserve_export.sources.modules import from_module
from tests.policies import cart as cart_source
from tests.publishing import republish

ROOT = Path(__file__).parent.parent
ONNX = "policy.onnx"


@pytest.fixture(scope="module")
def captured() -> TracedPolicy:
    return capture(cart_source())


@pytest.fixture(scope="module")
def stored(captured: TracedPolicy, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("program") / PROGRAM
    save_program(captured.program, path)
    return path.read_bytes()


@pytest.fixture
def holding(own_store: ModelStore, stored: bytes, tmp_path: Path) -> Artifact:
    """The cart, published with the exported program and with a `.pt2` for a host that is not this one."""
    artifact = own_store.resolve("cart")
    (tmp_path / PROGRAM).write_bytes(stored)
    programs = {**artifact.manifest.programs, "pt2": Program("policy.pt2", {"platform": "Plan9-mips"})}
    provenance = {**artifact.manifest.provenance, "fingerprint": "of this test"}
    return republish(artifact, own_store, {PROGRAM: tmp_path / PROGRAM}, programs=programs, provenance=provenance)


# The stored program.


def forbid(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("something was unpickled")


def test_the_program_is_stored_and_loaded_without_pickle(
    captured: TracedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (pickle, "Unpickler"), (pickle, "Pickler"), (pickle, "loads"), (pickle, "load"), (pickle, "dumps"),
        (torch, "load"), (torch, "save"), (torch._C, "_pickle_load_obj"), (torch._C, "_pickle_save"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, forbid)
    save_program(captured.program, tmp_path / PROGRAM)
    program = load_program((tmp_path / PROGRAM).read_bytes())
    assert not zipfile.is_zipfile(tmp_path / PROGRAM)
    inputs = torch.randn(5, 4)
    for ours, theirs in zip(program.module()(inputs), captured.program.module()(inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_every_byte_of_the_file_is_header_or_tensor(stored: bytes) -> None:
    size = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert sum(end - start for start, end in (entry["data_offsets"] for entry in header.values())) == (
        len(stored) - 8 - size
    )
    assert set(metadata) == {"format", "torch", "graph", "layouts", "examples"}
    json.loads(metadata["graph"])


def test_no_folder_of_the_exporting_machine_is_in_it(stored: bytes) -> None:
    assert str(ROOT).encode() not in stored
    assert b"site-packages" not in stored
    assert b"stack_trace" not in stored


def test_the_batch_stays_symbolic(captured: TracedPolicy, stored: bytes) -> None:
    program = load_program(stored)
    assert [str(v) for v in program.range_constraints.values()] == [
        str(v) for v in captured.program.range_constraints.values()
    ]
    assert len(program.module()(torch.zeros(1, 4))[0]) == 1


class Odd(torch.nn.Module):
    """Weights in another memory order, two that share memory, a constant, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(4), persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.convolution(image).mean((-1, -2)) * self.scale
        return self.second(self.first(features)) + torch.tensor([1.0, 2.0, 3.0, 4.0]), features.argmax(-1)


def test_layouts_constants_and_shared_weights_survive(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(Odd().eval(), (image,), dynamic_shapes=({0: batch},), strict=False)
    save_program(program, tmp_path / PROGRAM)
    again = load_program((tmp_path / PROGRAM).read_bytes())
    for ours, theirs in zip(again.module()(image), program.module()(image), strict=True):
        assert torch.equal(ours, theirs)
    assert again.state_dict["convolution.weight"].is_contiguous(memory_format=torch.channels_last)


def forged(stored: bytes, old: str, new: str) -> bytes:
    size = int.from_bytes(stored[:8], "little")
    metadata = json.loads(stored[8 : 8 + size])["__metadata__"]
    assert old in metadata["graph"]
    metadata["graph"] = metadata["graph"].replace(old, new)
    return save_tensors({}, metadata)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("torch.ops.aten.tanh.default", "torch.hub.load", "'torch.hub.load', which is no operator"),
        ("torch.ops.aten.tanh.default", "torch.ops.mine.tanh", "which is no operator of torch's own"),
        ("torch.ops.aten.tanh.default", "_operator.__class__", "which is no operator of torch's own"),
        ("Symbol(", "__import__(", "a size that is no arithmetic"),
        ("Symbol(", "eval(", "a size that is no arithmetic"),
        ("positive=True", "a=Symbol.mro", "a size that is no arithmetic"),
        ('"guards_code": []', '"guards_code": ["exit()"]', "holds Python source"),
    ],
)
def test_a_stored_program_that_would_do_more_than_compute_is_refused(
    stored: bytes, old: str, new: str, reason: str
) -> None:
    with pytest.raises(CaptureFailed, match=reason):
        load_program(forged(stored, old, new))


@pytest.mark.parametrize("data", [b"", b"not safetensors at all", save_tensors({}, {"format": "1"})])
def test_what_is_no_program_is_refused(data: bytes) -> None:
    with pytest.raises(CaptureFailed, match="the stored program cannot be read"):
        load_program(data)


def test_a_program_of_another_torch_is_refused_with_both_versions(stored: bytes) -> None:
    with pytest.raises(CaptureFailed, match=r"stored by torch \S+, cannot be read by torch "):
        load_program(forged(stored, '"major":', '"major": 99, "was":'))


# References into the .onnx.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A policy with weights that are worth a reference, exported to `.onnx`. To be looked at, not changed."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 128), torch.nn.Tanh(), torch.nn.Linear(128, 3))
    store = ModelStore(tmp_path_factory.mktemp("wide"))
    return export(from_module(network, torch.zeros(4), "argmax"), "wide", store, origin="x", runtimes=["onnx"]).artifact


def metadata_of(stored: bytes) -> dict[str, str]:
    header: dict[str, Any] = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def with_references(stored: bytes, references: object) -> bytes:
    return save_tensors(load_tensors(stored), metadata_of(stored) | {"references": json.dumps(references)})


def test_weights_that_the_onnx_holds_are_stored_as_references(wide: Artifact) -> None:
    stored, onnx = wide.read(PROGRAM), wide.read(ONNX)
    references = json.loads(metadata_of(stored)["references"])
    assert sorted(entry["shape"] for entry in references.values()) == [[3, 128], [128, 4]]
    assert all(tensor.nbytes < SMALLEST_BYTES for tensor in load_tensors(stored).values())
    read: list[str] = []

    def reading(name: str) -> bytes:
        read.append(name)
        return wide.read(name)

    program = load_program(stored, reading)
    assert read == [ONNX]
    for name, entry in references.items():
        assert entry.keys() == {"file", "offset", "length", "dtype", "shape"}
        weights = program.state_dict[name.removeprefix("state.")].detach().numpy()
        assert onnx[entry["offset"] : entry["offset"] + entry["length"]] == weights.tobytes()
    inputs, outputs = golden.read(wide)
    _, values = program.module()(torch.from_numpy(inputs["observation"]))
    torch.testing.assert_close(values.detach(), torch.from_numpy(outputs["action_value"]))


def test_compile_takes_the_weights_from_the_onnx(wide: Artifact, tmp_path: Path) -> None:
    shutil.copytree(wide.folder.parent.parent, tmp_path / "store")
    store = ModelStore(tmp_path / "store")
    artifact = compiling.compile(store.resolve("wide"), store)
    assert artifact.manifest.files[PROGRAM] == wide.manifest.files[PROGRAM]
    assert load_program(artifact.read(PROGRAM), artifact.read)
    (artifact.folder / ONNX).write_bytes(b"\0" * artifact.manifest.files[ONNX].bytes)
    with pytest.raises(CorruptFile, match=r"policy\.onnx is not what was published"):
        load_program(artifact.read(PROGRAM), artifact.read)


def test_weights_with_batch_norms_are_stored_once(tmp_path: Path) -> None:
    """Both programs have them folded, and in the same bytes."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(32)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, bias=False), norm, torch.nn.Flatten(), torch.nn.Linear(512, 3)
    )
    store = ModelStore(tmp_path)
    source = from_module(network, torch.zeros(3, 6, 6), "argmax")
    artifact = export(source, "normed", store, origin="x", runtimes=["onnx"]).artifact
    stored = artifact.read(PROGRAM)
    references = json.loads(metadata_of(stored)["references"])
    assert sorted(entry["shape"] for entry in references.values()) == [[3, 512], [32, 3, 3, 3]]
    assert all(tensor.nbytes < SMALLEST_BYTES for tensor in load_tensors(stored).values())
    assert artifact.manifest.programs["onnx"].rewrites[0].startswith("fold batch norms")
    program = load_program(stored, artifact.read)
    inputs, outputs = golden.read(artifact)
    _, values = program.module()(torch.from_numpy(inputs["observation"]))
    torch.testing.assert_close(values.detach(), torch.from_numpy(outputs["action_value"]), rtol=1e-4, atol=1e-4)


def test_a_program_with_all_its_weights_is_stored_as_ever(
    captured: TracedPolicy, stored: bytes, tmp_path: Path
) -> None:
    save_program(captured.program, tmp_path / PROGRAM, {ONNX: b"another program"})
    assert metadata_of((tmp_path / PROGRAM).read_bytes()) == metadata_of(stored)
    assert metadata_of(stored)["format"] == "1"


WRONG = [
    ({"offset": 10**9}, r"refers to bytes 1,000,000,000 to \S+ of policy\.onnx, which has"),
    ({"length": 10**9}, r"refers to bytes \S+ to \S+ of policy\.onnx, which has"),
    ({"length": 1028}, r"refers to 1,028 bytes of policy\.onnx, which are no float32"),
    ({"shape": [1, 1]}, "which are no float32"),
    ({"dtype": "float64"}, "which are no float64"),
    ({"offset": -1}, "cannot be read"),
    ({"offset": 0.5}, "cannot be read"),
    ({"shape": [-1, -256]}, "cannot be read"),
    ({"dtype": "load"}, "cannot be read"),
    ({"file": 1}, "cannot be read"),
    ({"more": 1}, "cannot be read"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_a_wrong_reference_is_refused(wide: Artifact, change: dict[str, Any], reason: str) -> None:
    stored = wide.read(PROGRAM)
    references = json.loads(metadata_of(stored)["references"])
    next(iter(references.values())).update(change)
    with pytest.raises(CaptureFailed, match=reason):
        load_program(with_references(stored, references), wide.read)


@pytest.mark.parametrize("references", [[], "everything", {"x": None}])
def test_references_of_another_form_are_refused(wide: Artifact, references: object) -> None:
    with pytest.raises(CaptureFailed, match="cannot be read"):
        load_program(with_references(wide.read(PROGRAM), references), wide.read)


@pytest.mark.parametrize("file", ["policy.pt2", "../1/policy.onnx", "/etc/hostname", "manifest.json"])
def test_a_reference_reads_no_file_that_the_manifest_does_not_list(wide: Artifact, file: str) -> None:
    stored = wide.read(PROGRAM)
    references = json.loads(metadata_of(stored)["references"])
    next(iter(references.values()))["file"] = file
    with pytest.raises(MissingFile, match="in its manifest"):
        load_program(with_references(stored, references), wide.read)


def test_without_the_other_file_the_error_names_it(wide: Artifact) -> None:
    with pytest.raises(CaptureFailed, match=r"refers to policy\.onnx, which was not given"):
        load_program(wide.read(PROGRAM))


@pytest.mark.parametrize("name", ["pong", "pong-lstm"])
def test_a_program_that_ships_repeats_no_weights(name: str) -> None:
    artifact = ModelStore(ROOT / "models_store").resolve(name, 1)
    assert artifact.manifest.files[PROGRAM].bytes < 100_000
    load_program(artifact.read(PROGRAM), artifact.read)


# The requirements of the .pt2 on its host.


def test_the_requirements_are_what_the_library_says(cart: Artifact) -> None:
    requires = cart.manifest.programs["pt2"].requires
    with zipfile.ZipFile(cart.folder / "policy.pt2") as package:
        (name,) = [name for name in package.namelist() if name.endswith(".so")]
        needs = read_requirements(package.read(name))
    assert requires["glibc"] == needs.versions["GLIBC"]
    assert requires["glibcxx"] == needs.versions["GLIBCXX"]
    assert requires["glibcxx"].startswith("3.4.")
    assert requires["needed"] == list(needs.libraries)
    assert {"libtorch_cpu.so", "libstdc++.so.6"} <= set(requires["needed"])
    assert (requires["device"], requires["compute_capability"]) == ("cpu", None)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64's features")
def test_portable_means_no_avx512_and_native_means_this_cpu() -> None:
    portable = aoti.cpu_flags(aoti.march_for(False), {"cpp.simdlen": 256})
    assert "avx2" in portable
    assert not [flag for flag in portable if flag.startswith("avx512")]
    native = aoti.cpu_flags(aoti.march_for(True), {})
    assert set(portable) <= set(native) <= this_host().cpu_flags
    if "avx512f" in this_host().cpu_flags:
        assert "avx512f" in native


# compile


def test_compile_publishes_the_next_version_for_this_host(holding: Artifact, own_store: ModelStore) -> None:
    assert refusal("pt2", holding.manifest, this_host()) is not None
    steps: list[str] = []
    artifact = compiling.compile(holding, own_store, steps.append)
    manifest = artifact.manifest
    assert (manifest.version, manifest.parent) == (holding.manifest.version + 1, holding.manifest.version)
    assert refusal("pt2", manifest, this_host()) is None
    assert manifest.provenance["compiled_from"]["version"] == holding.manifest.version
    assert manifest.certificate["programs"]["pt2"]["compared"] == 32
    assert manifest.certificate["programs"]["pt2"]["against"] == "golden samples"
    assert manifest.files.keys() == holding.manifest.files.keys()
    unchanged = [name for name, record in manifest.files.items() if record == holding.manifest.files[name]]
    assert sorted(unchanged) == sorted(manifest.files.keys() - {"policy.pt2"})
    runtime = load("pt2", artifact)
    assert golden.check(artifact, runtime.run).holds
    assert [step.split()[0] for step in steps] == ["reading", "building", "certifying"]
    # Again: there is one for this host now.
    assert compiling.compile(holding, own_store).manifest.version == manifest.version
    assert compiling.compile(artifact, own_store).manifest.version == manifest.version
    with pytest.raises(CaptureFailed, match="could not compile"):  # this torch has no CUDA, and the .pt2 is for the CPU
        compiling.compile(artifact, own_store, device="cuda")
    assert own_store.versions("cart")[-1] == manifest.version


def test_a_program_that_is_not_the_policy_is_not_published(
    holding: Artifact, own_store: ModelStore, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    other = cart_source()
    with torch.no_grad():
        for parameter in other.policy.parameters():
            parameter.normal_()
    save_program(capture(other).program, tmp_path / PROGRAM)
    wrong = republish(holding, own_store, {PROGRAM: tmp_path / PROGRAM})
    with pytest.raises(Disagreement, match="does not repeat the golden samples"):
        compiling.compile(wrong, own_store)
    assert own_store.versions("cart")[-1] == wrong.manifest.version


def test_an_artifact_without_its_program_says_so(own_store: ModelStore) -> None:
    artifact = own_store.resolve("cart")
    files = {name: artifact.folder / name for name in artifact.manifest.files if name != PROGRAM}
    without = own_store.publish(artifact.manifest, files)
    with pytest.raises(CaptureFailed, match="export the policy again"):
        compiling.compile(without, own_store)


def test_neither_torchrl_nor_the_users_code_is_loaded() -> None:
    code = (
        "import sys, actserve_export.compile;"
        "unwanted = {'torchrl', 'tensordict', 'onnx', 'gymnasium', 'tests', 'actserve_export.capture'};"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
