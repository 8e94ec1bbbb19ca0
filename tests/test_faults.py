"""Faults of a store: while its policies are served, and while something is published."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actserve.core.settings import Settings
from actserve.server.app import create_app
from actserve.store.artifact import MANIFEST
from actserve.store.local import ModelStore
from tests.asgi import Caller
from tests.publishing import republish

ROOT = Path(__file__).parent.parent
OTHER = 1  # the version that is not loaded yet


def overwritten(version: Path) -> None:
    for file in version.iterdir():
        file.write_bytes(bytes(file.stat().st_size))


def flipped(version: Path) -> None:
    for file in version.glob("policy.*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def truncated(version: Path) -> None:
    for file in version.iterdir():
        with open(file, "r+b") as opened:
            opened.truncate(file.stat().st_size // 2)


def emptied(version: Path) -> None:
    for file in version.iterdir():
        file.unlink()


def linked_files(version: Path) -> None:
    for file in list(version.iterdir()):
        away = file.rename(version.parent / f"{version.name}-{file.name}")
        file.symlink_to(away)


def deleted(version: Path) -> None:
    shutil.rmtree(version)


def linked(version: Path) -> None:
    version.rename(version.parent / f"away-{version.name}")
    version.symlink_to(f"away-{version.name}")


def looping(version: Path) -> None:
    shutil.rmtree(version)
    version.symlink_to(version)


def without_manifest(version: Path) -> None:
    (version / MANIFEST).unlink()


def gone(version: Path) -> None:
    shutil.rmtree(version.parents[1], ignore_errors=True)


def another(version: Path) -> None:
    """The whole store is a link to another user's store."""
    root = version.parents[1]
    if not root.is_symlink():
        root.rename(root.with_name("aside"))
        (root.with_name("other") / "cart" / "1").mkdir(parents=True)
        root.symlink_to(root.with_name("other"))


FAULTS = [
    (overwritten, 503, "invalid_manifest"),
    (flipped, 503, "corrupt_file"),
    (truncated, 503, "invalid_manifest"),
    (emptied, 503, "unfinished_version"),
    (linked_files, 503, "invalid_manifest"),
    (deleted, 404, "unknown_policy"),
    (linked, 404, "unknown_policy"),
    (looping, 404, "unknown_policy"),
    (without_manifest, 503, "unfinished_version"),
    (gone, 404, "unknown_policy"),
    (another, 503, "unfinished_version"),
]


@pytest.mark.parametrize("runtime", ["onnx", "pt2"])
def test_what_is_loaded_serves_on_whatever_happens_to_the_store(
    own_store: ModelStore, tmp_path: Path, runtime: str
) -> None:
    """One service, one fault after the other, the store mended in between."""
    republish(own_store.resolve("cart"), own_store)
    good = shutil.copytree(own_store.root, tmp_path / "good")
    observation = {"observation": [0.3, -1, 0.2, 0.7]}
    json = {"Content-Type": "application/json"}

    def act(call: Caller, path: str) -> tuple[int, Any]:
        answer = call("POST", f"/policies/cart{path}/act", observation, json)
        return answer.status, answer.document

    with Caller(create_app(Settings(store=str(own_store.root), runtime=runtime))) as call:
        call.wait(lambda: not call.app.state.registry.loading)
        before = act(call, "")
        assert before[0] == 200
        for fault, status, code in FAULTS:
            for version in ("1", "2"):
                fault(own_store.root / "cart" / version)
            assert act(call, "") == before, fault.__name__
            assert act(call, "/versions/2") == before, fault.__name__
            refused = act(call, f"/versions/{OTHER}")
            assert (refused[0], refused[1]["error"]["code"]) == (status, code), fault.__name__
            described = call("GET", "/policies/cart")
            assert (described.status, described.document["version"]) == (200, 2), fault.__name__
            assert call("GET", "/readyz").status == 200, fault.__name__
            _mend(own_store.root, good)
        assert act(call, f"/versions/{OTHER}") == before, "a version that was mended is loaded"


def _mend(root: Path, good: Path) -> None:
    for path in (root, root.with_name("aside"), root.with_name("other")):
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, root)


# A disk that is full, in a process and a file system of its own. It prints each finding on a line.
PUBLISH = """
import sys
from pathlib import Path
from actserve.core.errors import StoreError
from actserve.store.local import ModelStore
from tests.test_store import MANIFEST_DRAFT
folder = Path(sys.argv[1])
large, small = Path(sys.argv[2], "large"), Path(sys.argv[2], "small")
store = ModelStore(folder / "store")
store.publish(MANIFEST_DRAFT, {"policy.onnx": small})
try:
    store.publish(MANIFEST_DRAFT, {"policy.onnx": small, "golden.safetensors": large})
except StoreError as error:
    print(error.message)
print(sorted(path.name for path in (folder / "store" / "walker").iterdir()))
print(store.publish(MANIFEST_DRAFT, {"policy.onnx": small}).label)
"""
FETCH = """
import os, sys
from pathlib import Path
from actserve.core.errors import StoreError
from actserve.store.remote import RemoteStore
from actserve.store.local import ModelStore
from tests.test_store import MANIFEST_DRAFT
folder = Path(sys.argv[1])
large, small = Path(sys.argv[2], "large"), Path(sys.argv[2], "small")
source = ModelStore(Path(sys.argv[2]) / "source")
source.publish(MANIFEST_DRAFT, {"policy.onnx": small})
source.publish(MANIFEST_DRAFT, {"policy.onnx": small, "golden.safetensors": large})
os.environ["XDG_CACHE_HOME"] = str(folder)
store = RemoteStore(f"file://{source.root}")
store.refresh()
try:
    store.resolve("walker", 2)
except StoreError as error:
    print(error.message)
print(sorted(path.name for path in (store.root / "walker").iterdir()))
print(store.resolve("walker", 1).label)
"""


@pytest.fixture
def own_mounts() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python, its first argument a folder that is a disk of 256 KB."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this host lets nobody have mounts of their own")

    def run(code: str, disk: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        python = [sys.executable, "-c", code, str(disk), *arguments]
        return subprocess.run(
            [*unshare, "sh", "-c", 'disk=$0; mount -t tmpfs -o size=256k,mode=700 tmpfs "$disk" && exec "$@"',
             str(disk), *python],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("code", "message", "left", "then"),
    [
        (PUBLISH, "walker was not published: No space left on device", "['1']", "walker@2"),
        (FETCH, "walker@2 cannot be written to the cache: No space left on device", "[]", "walker@1"),
    ],
)
def test_a_full_disk_leaves_what_was_there_and_no_more(
    own_mounts: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    code: str,
    message: str,
    left: str,
    then: str,
) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    (tmp_path / "small").write_bytes(b"program")
    (tmp_path / "disk").mkdir()
    result = own_mounts(code, tmp_path / "disk", str(tmp_path))
    assert (result.returncode, result.stdout.splitlines()) == (0, [message, left, then]), result.stderr


def test_a_file_that_grows_too_large_leaves_nothing(tmp_path: Path) -> None:
    """The same by a limit of the process's, for hosts on which no disk can be made."""
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    (tmp_path / "small").write_bytes(b"program")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n" + PUBLISH
    command = [sys.executable, "-c", limited, str(tmp_path), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines() == ["walker was not published: File too large", "['1']", "walker@2"], (
        result.stderr
    )
