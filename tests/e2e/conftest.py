from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actserve.cli.tools import local_service as local
from actserve.core.signature import Array
from actserve.store.local import ModelStore
from tests.exported import exported


@pytest.fixture(scope="session", autouse=True)
def _patient() -> Iterator[None]:
    """That this host is slow is no overload."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTSERVE_MAX_WAIT_MS", "60000")
        yield


@pytest.fixture(scope="session")
def pong_store() -> Path:
    """A store with `pong`@1, both programs, exported from the checkpoint that ships."""
    return exported("pong").root


@pytest.fixture(scope="session")
def gru_store() -> ModelStore:
    """A store with `gru`@1, both programs: recurrent, with `observation` (4,) float32."""
    return exported("tests.policies:gru")


@pytest.fixture(scope="session")
def both(pong_store: Path) -> Iterator[dict[str, local.LocalService]]:
    """The real service as a process of its own, once with each runtime."""
    with (
        local.serve(pong_store, "--runtime", "onnx") as onnx,
        local.serve(pong_store, "--runtime", "pt2") as pt2,
    ):
        yield {"onnx": onnx, "pt2": pt2}


@pytest.fixture(scope="session", params=["onnx", "pt2"])
def service(request: pytest.FixtureRequest, both: dict[str, local.LocalService]) -> local.LocalService:
    """The service with each runtime in turn."""
    return both[request.param]


@pytest.fixture(scope="session")
def screens() -> Array:
    """512 real Pong screens, (512, 210, 160, 3) uint8, other screens than the certificate's."""
    from actserve.atari.emulator import AtariGame
    from actserve_export.training.atari import environment

    rng = np.random.default_rng(7)
    taken: list[Array] = []
    for seed in (1001, 1002):
        game = AtariGame(environment("pong"), seed)
        while len(taken) < 256 * (seed - 1000):
            if game.steps % 2 == 0:
                taken.append(game.screen().copy())
            game.act(int(rng.integers(6)))
    return np.stack(taken)
