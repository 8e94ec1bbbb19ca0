"""The program of a bundle for C++, and a session of a running service: the same actions for the same seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from actserve.atari.emulator import AtariGame
from actserve.cli.tools import local_service as local
from actserve.client.remote_policy import RemotePolicy
from actserve.store.local import ModelStore
from tests.bundled import artifact_of, atari, observations
from tests.bundled_cpp import RANDOM, built, driven, needs_compiler
from tests.exported import exported, merged
from tests.shipped import SHIPPED

pytestmark = needs_compiler

STEPS = 60
SEED = 11


def test_the_program_acts_as_a_session(tmp_path: Path) -> None:
    store = merged([exported("tests.policies:tanh_normal", ("onnx",)), ModelStore(SHIPPED)], tmp_path / "store")
    with local.serve(store.root) as service:
        _draws(service.url)
        _plays(service.url)


def _draws(url: str) -> None:
    found = artifact_of("tanh_normal")
    program = built("tanh_normal") / "build" / "policy"
    with (
        RemotePolicy(url, "tanh-normal") as policy,
        policy.session(seed=SEED, exploration="random") as session,
        driven(program, found.manifest.signature, "--seed", str(SEED)) as bundled,
    ):
        for tensors in observations(found, STEPS):
            np.testing.assert_array_equal(bundled.step(tensors, RANDOM)["action"], session.act(tensors))


def _plays(url: str) -> None:
    """A game of Pong: each screen goes to both, and the game takes the session's action."""
    found = artifact_of("pong-lstm")
    game = AtariGame(atari(found), SEED)
    with (
        RemotePolicy(url, "pong-lstm") as policy,
        policy.session() as session,
        driven(built("pong-lstm") / "build" / "policy", found.manifest.signature) as bundled,
    ):
        for _ in range(STEPS):
            tensors = {"pixels": game.screen()}
            action = int(session.act(tensors))
            assert int(bundled.step(tensors)["action"]) == action
            game.act(action)
