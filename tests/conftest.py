from __future__ import annotations

import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from tests.clock import Clock
from tests.exported import exported

# One thread: the networks are small, and threads that wait for a core that is busy elsewhere take forever.
os.environ["OMP_NUM_THREADS"] = "1"
# The cache has the results of first trials of programs: each run of the tests begins without any.
CACHE = tempfile.TemporaryDirectory(prefix="actserve-tests-")  # until this process ends
os.environ["XDG_CACHE_HOME"] = CACHE.name
settings.register_profile("shared-machine", deadline=None)  # a slow moment of the machine is no failure
settings.load_profile("shared-machine")

# The tests that `make test-fast` leaves out, named by a fixture, a folder, a file or a function.
LEFT_OUT = {
    "browser": {"test_page_browser.py"},
    "cluster": {"test_scale.py"},
    "compiler": {
        *("cart_store", "pong_store", "gru_store", "recurrent", "published", "cartpole"),
        *("test_what_a_document_says_works", "test_compile_takes_the_weights_from_the_onnx"),
        "test_the_tutorials_recurrent_policy_from_a_users_own_file_answers_like_eager",
        "test_native_code_that_ends_its_process_takes_no_other_request_with_it",
    },
    "container": {"test_compose_lays_an_override_over_the_rest"},
    "exporter": {
        *("test_behaviour.py", "test_capture.py", "test_commands.py", "test_compile.py", "test_every_game.py"),
        *("test_modules.py", "test_onnx_file.py", "test_onnx_kinds.py", "test_remote_episodes.py"),
        *("test_optimize.py", "test_publish.py", "test_quantize.py", "test_sb3.py", "test_swaps.py"),
        *("test_bounds.py", "test_refusals.py"),
        *("test_robots.py", "test_transforms.py", "test_export_of_a_users_module"),
        "test_a_program_that_must_be_built_and_cannot_is_an_error",
    },
    "process": {"e2e", "test_cli.py", "test_chaos.py"},
    "slow": {
        *("test_api.py", "test_benchmarks.py", "test_games.py", "test_load_ways.py", "test_oip_codec.py"),
        *("test_request_heads.py", "test_sessions_model.py", "test_stream_connections.py"),
        "test_users_import_from_the_top",
    },
    "training": {"test_train.py", "test_any_game_can_be_trained_exported_and_played"},
}

LONGEST = ("test_first_steps.py", "test_kinds.py", "test_docs.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m fast` does not import the files that it leaves out, which takes as long as many tests."""
    fast = config.option.markexpr == "fast"
    return True if fast and any(collection_path.name in names for names in LEFT_OUT.values()) else None


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = {*getattr(item, "fixturenames", ()), item.path.parent.name, item.path.name}
        names.add(getattr(item, "originalname", item.name))
        markers = [marker for marker, named in LEFT_OUT.items() if names & named]
        for marker in markers or ["fast"]:
            item.add_marker(marker)
    # A worker takes a file at a time, in this order: at the end, none has a long one left.
    items.sort(key=lambda item: item.path.name not in LONGEST and 1 + (item.get_closest_marker("fast") is not None))


def pytest_collection_finish() -> None:
    """torch.onnx.export reads the sources of its 500 operators at each call (0.7 s): here, once a process."""
    if "torch" in sys.modules:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))


@pytest.fixture(scope="session")
def cart_store() -> ModelStore:
    """A store with `cart`@1, both programs. Tests that change it use `own_store`."""
    return exported("tests.policies:cart")


@pytest.fixture
def own_store(cart_store: ModelStore, tmp_path: Path) -> ModelStore:
    """A copy of `cart_store` that a test may break."""
    shutil.copytree(cart_store.root, tmp_path / "store")
    return ModelStore(tmp_path / "store")


@pytest.fixture
def cart(cart_store: ModelStore) -> Artifact:
    return cart_store.resolve("cart")


@pytest.fixture
def sessions_file(tmp_path: Path) -> Path:
    return tmp_path / "sessions.sqlite"


@pytest.fixture
def clock() -> Clock:
    return Clock()
