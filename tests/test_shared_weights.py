"""Large `.onnx` programs: their weights are in a file that all workers map."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from actserve.core.errors import CorruptFile
from actserve.engine import golden
from actserve.engine.runtimes import onnx_runtime
from actserve.engine.runtimes.made_once import MadeOnce
from actserve.engine.runtimes.onnx_weights import external_data
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export import PolicySource
from actserve_export.publish import export
from tests.contracts import RuntimeContract


def folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "LARGE_BYTES", 0)
    monkeypatch.setattr(onnx_runtime, "SMALLEST_MAPPED_BYTES", 16)


class TestMappedOnnxRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self, cart: Artifact, tmp_path: Path) -> onnx_runtime.OnnxRuntime:
        return onnx_runtime.OnnxRuntime.load(cart, 1, tmp_path)


def test_the_workers_map_one_file_and_the_last_one_deletes_it(cart: Artifact, tmp_path: Path) -> None:
    first = onnx_runtime.OnnxRuntime.load(cart, 1, tmp_path)
    (folder,) = folders(tmp_path)
    assert (folder / onnx_runtime.WEIGHTS).stat().st_size > 1000
    made = (folder / onnx_runtime.WEIGHTS).stat().st_ino
    second = first.with_threads(2)
    assert (folder / onnx_runtime.WEIGHTS).stat().st_ino == made
    assert str(folder / onnx_runtime.WEIGHTS) in Path("/proc/self/maps").read_text()
    inputs, reference = golden.read(cart)
    for runtime in (first, second):
        golden.prove(runtime, "onnx", cart)
    first.close()
    assert folder.is_dir()
    assert golden.compare(second.signature, second.run(inputs), reference, golden.Tolerance()).holds
    second.close()
    assert folders(tmp_path) == []


def test_the_answers_are_those_of_a_program_in_memory(cart: Artifact, tmp_path: Path) -> None:
    inputs, _ = golden.read(cart)
    mapped, own = (onnx_runtime.OnnxRuntime.load(cart, 1, shared) for shared in (tmp_path, None))
    for name, array in own.run(inputs).items():
        np.testing.assert_array_equal(mapped.run(inputs)[name], array)


def test_kernels_for_avx512_find_the_weights_at_multiples_of_64(published: ModelStore, tmp_path: Path) -> None:
    """Otherwise they crash. The policy's layers have 5, 3 and 7 outputs, so that sizes are odd."""
    artifact = published.resolve("odd")
    runtime = onnx_runtime.OnnxRuntime.load(artifact, 1, tmp_path)
    (folder,) = folders(tmp_path)
    model = onnx.load(str(folder / onnx_runtime.MODEL), load_external_data=False)
    places = [external_data(tensor.SerializeToString()) for tensor in model.graph.initializer]
    offsets = [int(entries["offset"]) for entries in places if entries]
    packed = [value.split("|")[1:] for entries in places for key, value in entries.items() if "prepacked" in key]
    offsets += [int(buffer.split(";")[0]) for buffers in packed for buffer in buffers]
    assert packed
    assert len(set(offsets)) > 4
    assert all(offset % 64 == 0 for offset in offsets)
    golden.prove(runtime, "onnx", artifact)
    runtime.close()


@pytest.fixture
def published(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    layers = nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 7))
    source = PolicySource(
        TensorDictModule(layers, ["observation"], ["action"]), TensorDict({"observation": torch.zeros(9)})
    )
    store = ModelStore(tmp_path_factory.mktemp("store"))
    export(source, "odd", store, origin="test", runtimes=("onnx",))
    return store


def test_small_programs_and_services_without_workers_have_no_files(
    cart: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime, "LARGE_BYTES", 1 << 40)
    onnx_runtime.OnnxRuntime.load(cart, 1, tmp_path).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["room", "folder", "file"])
def test_without_a_file_a_worker_has_the_weights_in_memory(
    cart: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    shared = tmp_path / "shared"
    if broken != "folder":
        shared.mkdir()
    if broken == "room":
        monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    if broken == "file":
        monkeypatch.setattr(onnx_runtime, "_write_optimized", lambda artifact, folder: None)
    runtime = onnx_runtime.OnnxRuntime.load(cart, 1, shared)
    golden.prove(runtime, "onnx", cart)
    assert "the workers do not share its weights" in caplog.text
    assert broken == "folder" or folders(shared) == []


def test_a_changed_program_makes_no_file(own_store: ModelStore, tmp_path: Path) -> None:
    artifact = own_store.resolve("cart")
    file = artifact.folder / "policy.onnx"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    (tmp_path / "shared").mkdir()
    with pytest.raises(CorruptFile, match="is not what was published"):
        onnx_runtime.OnnxRuntime.load(artifact, 1, tmp_path / "shared")
    assert folders(tmp_path / "shared") == []


def test_the_others_wait_for_the_one_that_makes_the_folder(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    made: list[Path] = []

    def make(folder: Path) -> None:
        begun.set()
        assert go_on.wait(30)
        (folder / "weights").write_bytes(b"w")
        made.append(folder)

    users: list[MadeOnce] = []
    threads = [threading.Thread(target=lambda: users.append(MadeOnce(tmp_path, "x", make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    assert users == []
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert (len(users), len(made)) == (4, 1)
    for user in users[:-1]:
        user.close()
        assert (user.folder / "weights").read_bytes() == b"w"
    users[-1].close()
    assert folders(tmp_path) == []
    again = MadeOnce(tmp_path, "x", make)
    assert len(made) == 2
    again.close()


def test_users_that_start_at_once_do_not_wait_for_each_other_to_close(tmp_path: Path) -> None:
    made: list[Path] = []
    for name in map(str, range(30)):
        users: list[MadeOnce] = []
        at_once = threading.Barrier(4)

        def use(name: str = name, users: list[MadeOnce] = users, at_once: threading.Barrier = at_once) -> None:
            at_once.wait(30)
            users.append(MadeOnce(tmp_path, name, made.append))

        threads = [threading.Thread(target=use, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(users) == 4
        for user in users:
            user.close()
    assert len(made) == 30
    assert folders(tmp_path) == []


def test_a_folder_is_whole_while_others_delete_it(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "weights").write_bytes(b"w")

    used: list[bytes] = []

    def use_often() -> None:
        for _ in range(100):
            user = MadeOnce(tmp_path, "x", make)
            used.append((user.folder / "weights").read_bytes())
            user.close()

    threads = [threading.Thread(target=use_often, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert used == [b"w"] * 300
    assert folders(tmp_path) == []


def test_a_failure_leaves_nothing_behind_and_the_next_one_tries(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"h")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        MadeOnce(tmp_path, "x", fail)
    assert folders(tmp_path) == []
    MadeOnce(tmp_path, "x", lambda folder: None).close()
