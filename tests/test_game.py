"""`server.arcade.game`, in one event loop, with the emulator and a recurrent policy of a few lines of numpy."""

from __future__ import annotations

import asyncio
import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actserve.atari.emulator import AtariGame
from actserve.core.completion import step_seed
from actserve.core.environment import Environment
from actserve.core.errors import InvalidRequest, InvalidTensor, TooManyGames
from actserve.core.settings import Settings
from actserve.core.signature import Array, Exploration, Noise, Signature, State, TensorSpec
from actserve.engine.policy import Policy
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.preflight import Choice
from actserve.server.arcade.game import Game, GameSlots, GameStep, encode_png, values_output
from actserve.store.artifact import Artifact, Manifest
from tests.fake_policy import QUICK
from tests.test_atari import PONG
from tests.waiting import until

SIGNATURE = Signature(
    observations=(TensorSpec("pixels", "uint8", (210, 160, 3)),),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("seen", "int64", ()), TensorSpec("logits", "float32", (6,))),
    max_batch=8,
    state=(State(TensorSpec("count", "int64", ()), "next_count", 3),),
    is_init=True,
    exploration=("deterministic", "random"),
    noise=(Noise(TensorSpec("noise", "float32", ()), "uniform"),),
)


class Counting(Runtime):
    """The action counts up from 3 with every step, and by up to 5 more when it explores."""

    @classmethod
    def load(cls, artifact: Artifact, threads: int, shared: Path | None = None) -> Counting:
        return cls(SIGNATURE)

    def _run(self, arrays: list[Array]) -> list[Array]:
        inputs = dict(zip([spec.name for spec in self.signature.inputs], arrays, strict=True))
        count = np.where(inputs["is_init"], 3, inputs["count"])
        action = (count + (inputs["noise"] * 6).astype(np.int64)) % 6
        seen = inputs["pixels"].reshape(len(count), -1).sum(1, dtype=np.int64)
        return [action, seen, np.eye(6, dtype=np.float32)[action], count + 1]

    def close(self) -> None:
        pass


def counting(environment: Environment | None = PONG, signature: Signature = SIGNATURE) -> Policy:
    manifest = Manifest(1, "counting", 1, None, "", signature, environment, {}, {}, {}, {})
    return Policy(Artifact(Path("nowhere"), manifest), Counting(signature), Choice("onnx", ""), QUICK, Settings())


def played(
    steps: int, policy: Policy, exploration: Exploration | None = None, seed: int = 1, held: int | None = None
) -> list[GameStep]:
    async def play() -> list[GameStep]:
        async def find() -> Policy:
            return policy

        policy.start()
        game = Game(find, exploration, seed)
        try:
            await game.begin()
            taken: list[GameStep] = []
            while len(taken) < steps and not game.over:
                taken.append(await game.step(held))
            return taken
        finally:
            game.close()
            await policy.close()

    return asyncio.run(play())


def test_a_game_is_the_emulators_and_the_policy_carries_its_state() -> None:
    steps = played(40, counting())
    assert (
        [step.proposal.action for step in steps] == [step.taken for step in steps] == [(3 + i) % 6 for i in range(40)]
    )
    assert [step.proposal.number for step in steps] == list(range(1, 41))
    reference = AtariGame(PONG, 1)
    for step in steps:
        assert np.array_equal(step.proposal.screen, reference.screen())
        reference.act(step.taken)
        assert step.score == reference.score
        assert step.proposal.values is not None
        assert np.argmax(step.proposal.values) == step.proposal.action


def test_what_is_held_is_taken_and_the_policys_proposal_still_told() -> None:
    steps = played(12, counting(), held=2)
    assert {step.taken for step in steps} == {2}
    assert [step.proposal.action for step in steps] == [(3 + i) % 6 for i in range(12)]
    reference = AtariGame(PONG, 1)
    for _ in range(11):
        reference.act(2)
    assert np.array_equal(steps[-1].proposal.screen, reference.screen())


def test_exploration_comes_from_the_seed_and_the_step() -> None:
    one, again, other = (
        [step.proposal.action for step in played(20, counting(), "random", seed)] for seed in (1, 1, 2)
    )
    assert one == again != other
    assert one != [(3 + i) % 6 for i in range(20)]
    noise = np.random.Generator(np.random.Philox(key=np.array([step_seed(1, 1), 0], np.uint64))).random((), np.float32)
    assert one[0] == (3 + int(noise * 6)) % 6


def test_a_game_ends_and_so_does_its_thread() -> None:
    steps = played(1000, counting(replace(PONG, max_frames=200)))
    assert [step.over for step in steps] == [False] * 49 + [True]
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("game")])


def test_a_policy_that_cannot_play_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not trained on an Atari game"):
        played(1, counting(None))
    grey = replace(SIGNATURE, observations=(TensorSpec("pixels", "uint8", (210, 160)),))
    with pytest.raises(InvalidTensor, match="pixels"):
        played(1, counting(signature=grey))
    one_hot = replace(SIGNATURE, outputs=(TensorSpec("action", "int64", (6,)),))
    with pytest.raises(InvalidRequest, match="whose action is an index"):
        played(1, counting(signature=one_hot))
    with pytest.raises(InvalidRequest, match="exploration"):
        played(1, counting(signature=replace(SIGNATURE, exploration=("deterministic",), noise=())), "random")


def test_the_values_are_the_output_with_one_number_for_each_action() -> None:
    assert values_output(SIGNATURE, 6) == "logits"
    assert values_output(SIGNATURE, 18) is None


def test_a_png_has_the_screens_pixels() -> None:
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(screen)))), screen)
    assert len(encode_png(AtariGame(PONG, 0).screen())) < 2000


def test_game_slots_are_bounded_and_given_back() -> None:
    game_slots = GameSlots(2)
    assert game_slots.why_closed() is None
    with game_slots.take(), game_slots.take(), pytest.raises(TooManyGames, match="2 games"), game_slots.take():
        pass
    assert game_slots.taken == 0
    assert GameSlots(0).why_closed() == "games are turned off on this service"
