from __future__ import annotations

import _ctypes
import dataclasses
import importlib.machinery
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from actserve.cli.tools import local_service as local
from actserve.core.errors import RuntimeFailure, RuntimeRefused
from actserve.engine.runtimes import probe
from actserve.engine.runtimes.host import newest
from actserve.engine.runtimes.load import load
from actserve.engine.runtimes.preflight import Host, choose, refusal, this_host
from actserve.store.artifact import Artifact, Manifest, Program
from actserve.store.local import ModelStore
from tests.native import package_that
from tests.publishing import republish
from tests.test_package import MODEL, zipped

HOST = Host(
    "Linux",
    "x86_64",
    (2, 36),
    frozenset({"avx2"}),
    {"torch": "2.13.0", "onnxruntime": "1.31.1"},
    glibcxx=(3, 4, 28),
    cxxabi=(1, 3, 12),
    libraries=frozenset({"libc.so.6"}),
)
# Requirements of a manifest, and the refusal on HOST.
FORGED: dict[str, tuple[dict[str, object], str]] = {
    "platform": ({"platform": "Darwin-arm64"}, "built for Darwin-arm64, this host is Linux-x86_64"),
    "device": ({"device": "cuda"}, "built for cuda, this host has cpu"),
    "capability": (
        {"compute_capability": "9.0"},
        "built for compute capability 9.0, this host has no CUDA device",
    ),
    "torch": ({"torch": "9.9.9"}, "built for torch 9.9.9, this host has 2.13.0"),
    "march": ({"march": "x86-64-v9"}, "built for the CPU architecture x86-64-v9, which this actserve does not know"),
    "isa": ({"cpu_flags": ["avx2", "amx"]}, "needs the CPU features amx, which this host lacks"),
    "glibc": ({"glibc": "99.1"}, "needs glibc 99.1, this host has 2.36"),
    "glibcxx": ({"glibcxx": "3.4.99"}, "needs GLIBCXX 3.4.99, this host has 3.4.28"),  # on record
    "cxxabi": ({"cxxabi": "1.3.99"}, "needs CXXABI 1.3.99, this host has 1.3.12"),
    "library": (
        {"needed": ["libc.so.6", "libnone.so.1"]},
        "needs the libraries libnone.so.1, which this host does not have",
    ),
    "unknown": ({"moon": "full"}, "requires something this actserve does not know: moon 'full'"),
    "unreadable": ({"glibc": "new"}, "requires glibc 'new', which this actserve cannot read"),
    "untyped": ({"cpu_flags": "avx2"}, "requires cpu_flags 'avx2', which this actserve cannot read"),
}
CRASHES = {
    "abort": ("abort();", "crashed its process on load (signal SIGABRT)"),
    "fault": ("raise(SIGSEGV);", "crashed its process on load (signal SIGSEGV)"),
    "illegal": ("__builtin_trap();", "crashed its process on load (signal SIGILL)"),
    "leaves": ("_exit(0);", "ended its process on load (exit code 0)"),
}


def requiring(cart: Artifact, **requires: object) -> Manifest:
    programs = {"onnx": Program("policy.onnx"), "pt2": Program("policy.pt2", requires)}
    return dataclasses.replace(cart.manifest, programs=programs)


def test_this_host_runs_what_was_built_here(cart: Artifact) -> None:
    choice = choose("auto", cart.manifest, this_host(), {})
    assert choice.runtime == "pt2"
    assert "the first that this host can run" in choice.reason
    assert choose("onnx", cart.manifest, this_host(), {}).reason == ".onnx: asked for by --runtime onnx"


@pytest.mark.parametrize(("requires", "reason"), FORGED.values(), ids=FORGED)
def test_a_missing_requirement_is_named_and_auto_falls_back(
    cart: Artifact, requires: dict[str, object], reason: str
) -> None:
    manifest = requiring(cart, **requires)
    assert refusal("pt2", manifest, HOST) == reason
    with pytest.raises(RuntimeRefused):
        choose("pt2", manifest, HOST, {})
    choice = choose("auto", manifest, HOST, {})
    assert choice.runtime == "onnx"
    assert choice.reason.startswith(f"not .pt2: {reason}; .onnx: ")


@pytest.mark.parametrize(
    "requires",
    [
        {"glibc": "2.36", "glibcxx": "3.4.28", "cxxabi": "1.3.12", "torch": "2.13.0", "device": "cpu"},
        {"glibc": "2.4", "needed": ["libc.so.6"], "cpu_flags": ["avx2"], "march": "native"},
        {"glibc": None, "compute_capability": None, "needed": [], "march": "x86-64"},
    ],
)
def test_what_the_host_has_is_not_refused(cart: Artifact, requires: dict[str, object]) -> None:
    assert refusal("pt2", requiring(cart, **requires), HOST) is None


def test_an_architecture_is_the_features_it_promises(cart: Artifact) -> None:
    reason = refusal("pt2", requiring(cart, march="x86-64-v3"), HOST)
    assert reason is not None
    assert reason.startswith("built for x86-64-v3 CPUs, this host lacks abm, avx, bmi1,")


def test_another_compute_capability_is_refused(cart: Artifact) -> None:
    gpu = dataclasses.replace(HOST, devices=("cpu", "cuda"), compute_capability=(8, 6))
    manifest = requiring(cart, device="cuda", compute_capability="9.0")
    assert refusal("pt2", manifest, gpu) == "built for compute capability 9.0, this host has 8.6"
    same = dataclasses.replace(gpu, compute_capability=(9, 0))
    assert refusal("pt2", manifest, same) is None


def test_the_newest_symbol_version_is_found_by_number() -> None:
    library = b"\0GLIBCXX_3.4\0GLIBCXX_3.4.9\0GLIBCXX_3.4.30\0GLIBCXX_DEBUG\0CXXABI_1.3.9\0"
    assert newest(library, "GLIBCXX") == (3, 4, 30)
    assert newest(library, "CXXABI") == (1, 3, 9)
    assert newest(b"", "GLIBCXX") == ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the dynamic loader of Linux")
def test_this_host_knows_its_libstdcxx_and_libraries() -> None:
    host = this_host()
    assert host.glibcxx >= (3, 4, 22)  # what torch itself needs
    assert host.cxxabi >= (1, 3)
    assert host.libraries is not None
    assert {"libc.so.6", "libstdc++.so.6", "libtorch_cpu.so"} <= host.libraries
    assert Path(_ctypes.__file__).name in host.libraries, "this process has loaded it"
    assert json.loads(json.dumps(host.facts()))["glibcxx"].startswith("3.4.")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the dynamic loader of Linux")
def test_the_libraries_of_nvidias_packages_are_found_beside_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("torch/__init__.py", "torch/lib/libtorch_cuda.so", "nvidia/cu13/lib/libcudart.so.13"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    this_host.cache_clear()
    try:
        libraries = this_host().libraries
    finally:
        this_host.cache_clear()
    assert libraries is not None
    assert {"libtorch_cuda.so", "libcudart.so.13"} <= libraries


def test_without_torch_there_is_no_pt2(cart: Artifact) -> None:
    host = dataclasses.replace(this_host(), packages={"onnxruntime": "1.31.1"})
    assert refusal("pt2", cart.manifest, host) == "torch is not installed here"
    assert refusal("onnx", cart.manifest, host) is None


def test_an_absent_program_and_a_failed_one_are_reasons(cart: Artifact) -> None:
    only_onnx = dataclasses.replace(cart.manifest, programs={"onnx": Program("policy.onnx")})
    assert refusal("pt2", only_onnx, this_host()) == "cart@1 has no .pt2 program"
    choice = choose("auto", cart.manifest, this_host(), {"pt2": "it crashed"})
    assert (choice.runtime, choice.reason[:21]) == ("onnx", "not .pt2: it crashed;")


def test_when_nothing_runs_every_reason_is_given(cart: Artifact) -> None:
    with pytest.raises(RuntimeRefused, match=r"not \.pt2: .*; not \.onnx: onnxruntime is not installed"):
        choose("auto", cart.manifest, dataclasses.replace(this_host(), packages={}), {})


def forge(cart: Artifact, store: ModelStore, pt2: bytes, **changes: Any) -> Artifact:
    """The cart once more, with another `.pt2`; every hash is right."""
    file = store.root.parent / "forged.pt2"
    file.write_bytes(pt2)
    return republish(cart, store, {"policy.pt2": file}, **changes)


def test_the_package_is_looked_into_before_it_is_loaded(cart: Artifact, tmp_path: Path) -> None:
    artifact = forge(cart, ModelStore(tmp_path / "store"), zipped(MODEL + "m.cpp"))
    with pytest.raises(RuntimeFailure, match=r"refused the package: it is \.cpp-only"):
        load("pt2", artifact)


# The effect of loading it.


@pytest.fixture
def crashing(cart: Artifact, tmp_path: Path) -> Callable[[str], bytes]:
    """The cart's package with a `.so` that does what `code` says as it is loaded."""

    return lambda code: package_that(code, cart, tmp_path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_program_that_hangs_on_load_is_ended(
    cart: Artifact, crashing: Callable[[str], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LIMIT_S", 1.0)
    artifact = forge(cart, ModelStore(tmp_path / "store"), crashing("for (;;) sleep(1);"))
    with pytest.raises(RuntimeFailure, match="did not load and run within 1 seconds"):
        load("pt2", artifact)


def test_a_library_that_is_no_model_is_the_loaders_refusal_without_folders(
    cart: Artifact, crashing: Callable[[str], bytes], tmp_path: Path
) -> None:
    artifact = forge(cart, ModelStore(tmp_path / "store"), crashing(""))
    with pytest.raises(RuntimeFailure, match="the AOTI loader refused the package: ") as caught:
        load("pt2", artifact)
    assert "/tmp" not in caught.value.message


def test_native_code_does_not_stay_in_the_temporary_directory(
    cart: Artifact, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone once the program is loaded, so that a service which is killed leaves nothing, too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up anew
    runtime = load("pt2", cart)
    assert tempfile.gettempdir() == str(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".o") or "aotinductor" in path.name] == []
    assert len(runtime.run({"observation": np.zeros((2, 4), np.float32)})) > 0
    runtime.close()


def test_a_file_is_tried_once(cart: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(probe, "trial_run", lambda path, artifact: tried.append(path))
    for _ in range(3):
        with probe.probed_copy(cart) as path:
            assert path.read_bytes() == cart.read_program("pt2")
    assert len(tried) == 1
    assert len(list((cache / "actserve" / "proven").iterdir())) == 1
    assert not path.exists()


def test_a_cache_that_cannot_be_written_costs_time_only(
    cart: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("not a folder")
    tried: list[Path] = []
    monkeypatch.setattr(probe, "trial_run", lambda path, artifact: tried.append(path))
    for _ in range(2):
        with probe.probed_copy(cart):
            pass
    assert len(tried) == 2


def test_the_service_starts_on_onnx_whatever_the_pt2_is(
    cart: Artifact, crashing: Callable[[str], bytes], tmp_path: Path
) -> None:
    """One service over a store in which every `.pt2` is forged: newer requirements, refused packages, crashes."""
    store = ModelStore(tmp_path / "store")
    expected: dict[str, str | None] = {}
    for name, (requires, _) in FORGED.items():
        manifest = requiring(cart, **requires)
        republish(cart, store, name=name, programs=manifest.programs)
        expected[name] = refusal("pt2", manifest, this_host())
    for name, (code, reason) in CRASHES.items():
        forge(cart, store, crashing(code), name=name)
        expected[name] = reason
    forge(cart, store, zipped(MODEL + "m.cpp"), name="source")
    expected["source"] = "it is .cpp-only"
    republish(cart, store, name="good")
    with (
        local.serve(store.root, "--runtime", "auto") as service,
        urllib3.PoolManager() as http,
    ):
        for name, why in expected.items():
            found = http.request("GET", f"{service.url}/policies/{name}").json()
            assert (found["version"], found["runtime"]) == (1, "onnx"), found
            assert why is not None
            assert found["reason"].startswith("not .pt2: ")
            assert why in found["reason"]
            answer = http.request("POST", f"{service.url}/policies/{name}/act", json={"observation": [0, 0, 0, 0]})
            assert answer.status == 200, answer.data
        assert http.request("GET", f"{service.url}/policies/good").json()["runtime"] == "pt2"
    assert len(set(expected.values())) == len(expected), "each has its own message"
