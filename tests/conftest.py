from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
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
    "browser": {"test_page_browser.py", "test_bundles_browser.py"},
    "cluster": {"test_scale.py"},
    "compiler": {
        *("test_bundles_cpp.py", "test_bundles_cpp_aarch64.py", "test_bundles_cpp_library.py"),
        *("cart_store", "pong_store", "gru_store", "recurrent", "published", "cartpole"),
        *("test_what_a_document_says_works", "test_compile_takes_the_weights_from_the_onnx"),
        "test_the_tutorials_recurrent_policy_from_a_users_own_file_answers_like_eager",
        "test_both_programs_keep_to_the_limits_and_so_does_one_that_is_compiled_later",
        "test_native_code_that_ends_its_process_takes_no_other_request_with_it",
    },
    "container": {"test_compose_lays_an_override_over_the_rest"},
    "exporter": {
        *(
            "test_behaviour.py",
            "test_bundles.py",
            "test_capture.py",
            "test_commands.py",
            "test_compile.py",
            "test_every_game.py",
        ),
        *("test_modules.py", "test_onnx_file.py", "test_onnx_kinds.py", "test_remote_episodes.py"),
        *("test_optimize.py", "test_publish.py", "test_quantize.py", "test_sb3.py", "test_swaps.py"),
        *("test_bounds.py", "test_refusals.py", "test_captured_transforms.py", "test_effort.py", "test_exploration.py"),
        *("test_kinds_of_torchrl.py", "test_sequences.py", "test_widen.py", "test_no_pickle.py"),
        *("test_decompositions.py", "test_record_export.py", "test_robot.py", "test_robot_wires.py"),
        *("test_action_limits.py", "test_limits_file.py", "test_limits_published.py", "test_replay_limits.py"),
        "test_record_lerobot.py",
        *("test_robots.py", "test_transforms.py", "test_export_of_a_users_module"),
        "test_a_program_that_must_be_built_and_cannot_is_an_error",
    },
    "process": {"e2e", "test_cli.py", "test_chaos.py"},
    "slow": {
        *("test_api.py", "test_benchmarks.py", "test_games.py", "test_load_ways.py", "test_oip_codec.py"),
        *("test_request_heads.py", "test_sessions_model.py", "test_stream_connections.py"),
        "test_users_import_from_the_top",
    },
    "training": {
        *("test_train.py", "test_distill.py", "test_training_games.py"),
        "test_any_game_can_be_trained_exported_and_played",
    },
}

# The tests that export a policy for each of their cases: so many cases run in `make test`, all in `make test-wide`.
CASES = {
    "test_a_policy_behind_transforms_acts_as_in_torchrls_environment": 7,
    "test_any_name_that_a_dictionary_can_have": 3,
    "test_a_policy_that_mixes_items_takes_one_a_call": 3,
    "test_a_policy_that_always_draws_acts_at_random_only": 3,
    "test_generated_policies_are_served_as_they_act_or_refused_by_name": 4,
    "test_weights_that_are_computed_are_exported_as_they_are": 3,
    "test_networks_that_share_a_call_are_exported_and_stay_usable": 3,
    "test_a_log_probability_is_that_of_the_action_that_is_served": 3,
    "test_cells_of_any_depth_and_kind": 3,
    "test_rounding_is_the_policys": 3,
    "test_any_nearest_resize_of_bytes": 10,
    "test_random_actions_behind_transforms_are_compared_with_the_policys_own": 3,
}

LONGEST = (
    *("test_first_steps.py", "test_kinds.py", "test_docs.py"),
    *("test_doors.py", "test_fastpath.py", "test_supervisor.py", "test_http_clients.py"),
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that `-m` leaves out are not imported, which takes as long as many tests."""
    left_out = {"not wide": {"robots"}, "fast": {"robots"}.union(*LEFT_OUT.values())}
    return True if collection_path.name in left_out.get(config.option.markexpr, set()) else None


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: Counter[str] = Counter()
    for item in items:
        function = getattr(item, "originalname", item.name)
        cases[function] += 1
        if cases[function] > CASES.get(function, cases[function]):
            item.add_marker("wide")
        names = {*getattr(item, "fixturenames", ()), item.path.parent.name, item.path.name}
        names.add(function)
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
