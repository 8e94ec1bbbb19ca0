from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from tests.clock import Clock
from tests.exported import exported

# One thread: the networks are small, and threads that wait for a core that is busy elsewhere take forever.
os.environ["OMP_NUM_THREADS"] = "1"
# What the tests prove about their programs is no news to later runs.
CACHE = tempfile.TemporaryDirectory(prefix="actserve-tests-")  # until this process ends
os.environ["XDG_CACHE_HOME"] = CACHE.name
settings.register_profile("shared-machine", deadline=None)  # a slow moment of the machine is no failure
settings.load_profile("shared-machine")

# What tests need beside Python packages, by a fixture, a file or a function: `make test-fast` leaves these tests out.
NEEDS = {
    "browser": {"test_page_browser.py"},
    "cluster": {"test_scale.py"},
    "compiler": {
        *("cart_store", "pong_store", "lstm_store", "gru_store", "recurrent_store", "published", "cartpole"),
        *("test_int8.py", "test_what_a_document_says_works"),
        "test_native_code_that_ends_its_process_takes_no_other_request_with_it",
    },
    "container": {"test_compose_lays_an_override_over_the_rest"},
    "training": {"test_train.py", "test_any_game_can_be_trained_exported_and_played"},
}


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            names = {*item.fixturenames, item.path.name, item.originalname}
            for marker, needing in NEEDS.items():
                if names & needing:
                    item.add_marker(marker)


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
