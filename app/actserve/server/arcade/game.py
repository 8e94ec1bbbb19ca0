"""Game: a policy of this service plays a game, and the page can watch it and take over.

The emulator has its own thread, so that it does not block the event loop: ale-py releases the GIL while it computes a
frame. The policy acts through admission and its batcher, as for any client.
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actserve.atari.emulator import AtariGame
from actserve.core.completion import choose_exploration, step_seed
from actserve.core.environment import Environment, game_of
from actserve.core.errors import InvalidRequest, TooManyGames
from actserve.core.signature import Arrays, Exploration, Signature
from actserve.engine.policy import Policy
from actserve.server.admission import Admission

FindPolicy = Callable[[], Awaitable[Policy]]  # called for every step: the policy may be swapped
T = TypeVar("T")
Screen = NDArray[np.uint8]  # (H, W, 3) RGB


class GameSlots:
    """Bounds how many games are played at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Take a slot for one game. Raises `TooManyGames`."""
        if self.taken >= self.limit:
            raise TooManyGames(self.limit)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    def why_closed(self) -> str | None:
        """Why this service plays no games; None if it does."""
        if not self.limit:
            return "games are turned off on this service"
        if find_spec("ale_py") is None:
            return 'games need ale-py on the service: pip install "actserve[play]"'
        return None


@dataclass(frozen=True)
class Proposal:
    """What the policy would do at one step."""

    number: int  # of the step, from 1
    screen: Screen  # the observation
    action: int  # the index
    values: list[float] | None  # one per action
    queue_ns: int
    run_ns: int


@dataclass(frozen=True)
class GameStep:
    """One step that was taken."""

    proposal: Proposal
    taken: int  # the index of the action
    reward: float
    score: float  # after the step
    over: bool


class Game:
    """One game. Call `begin` first and `close` last, in the event loop.

    Without `exploration`, the policy uses its default. The same `seed` (0 to 2**63 - 1) gives the same game.
    """

    def __init__(
        self, find: FindPolicy, exploration: Exploration | None, seed: int, admission: Admission | None = None
    ) -> None:
        self.seed = seed
        self.over = False
        self._find = find
        self._admission = admission or Admission()
        self._requested_exploration = exploration
        self._state: Arrays = {}  # each (1, *shape); empty before the first step
        self._steps = 0
        self._thread = ThreadPoolExecutor(1, "game")

    async def begin(self) -> None:
        """Start the game. Raises `InvalidRequest` for a policy or exploration that does not fit."""
        self.policy = policy = await self._find()
        self.environment = _environment(policy)
        self.exploration, _ = choose_exploration(policy.signature, self._requested_exploration, self.seed)
        self.values = values_output(policy.signature, len(self.environment.actions))
        self._game = await self._in_thread(AtariGame, self.environment, self.seed)
        self._screen = self._game.screen().copy()
        policy.signature.validate_request({self.environment.screen: self._screen[None]})

    async def step(self, override: int | None = None) -> GameStep:
        """Let the policy act, then take its action, or the action `override` if given. Raises as the policy."""
        return await self.take(await self.propose(), override)

    async def propose(self) -> Proposal:
        """Let the policy act on the current screen. `take` must follow. Raises as the policy."""
        self.policy = policy = await self._find()
        screen, seed = self._screen, step_seed(self.seed, self._steps + 1)
        inputs = {self.environment.screen: screen[None]} | self._state
        acted = await self._admission.act(policy, inputs, 1, self.exploration, seed)
        # `state_after` copies: a view would keep the array of the whole batch in memory.
        self._state = policy.state_after(acted)
        proposed = int(acted.outputs[policy.signature.action.name][0])
        values = acted.outputs[self.values][0].tolist() if self.values else None
        self._steps += 1
        return Proposal(self._steps, screen, proposed, values, acted.queue_ns, acted.run_ns)

    async def take(self, proposal: Proposal, override: int | None = None) -> GameStep:
        """Take the proposed action, or `override` if given."""
        taken = proposal.action if override is None else override
        reward, self._screen = await self._in_thread(self._advance, taken)
        self.over = self._game.over
        return GameStep(proposal, taken, reward, self._game.score, self.over)

    async def png(self, proposal: Proposal) -> bytes:
        """The screen of a step as a PNG, compressed in the thread of the game."""
        return await self._in_thread(encode_png, proposal.screen)

    def close(self) -> None:
        """End the thread after its current call; does not wait for it."""
        self._thread.shutdown(wait=False)

    def _advance(self, action: int) -> tuple[float, Screen]:
        """Take an action; returns its reward and the next screen. Runs in the thread."""
        return self._game.act(action), self._game.screen().copy()

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


def values_output(signature: Signature, actions: int) -> str | None:
    """The first output with one number for each action, such as action values or logits; None if there is none."""
    return next((spec.name for spec in signature.outputs[1:] if spec.shape == (actions,)), None)


def encode_png(screen: Screen) -> bytes:
    """(H, W, 3) uint8 -> PNG, in about 0.1 ms. Unfiltered rows suit the flat colours of these games."""
    height, width, _ = screen.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # the first byte of a row is its filter: 0 is none
    rows[:, 1:] = screen.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _environment(policy: Policy) -> Environment:
    environment = game_of(policy.artifact.manifest.environment)
    if environment is None:
        raise InvalidRequest(f"{policy.name} was not trained on an Atari game; only Atari games can be played here")
    action = policy.signature.action
    if action.shape or action.numpy_dtype.kind not in "iu":
        raise InvalidRequest(f"expected a policy whose action is an index; the action of {policy.name} is {action}")
    return environment
