"""A game that a served policy plays here, for somebody to watch and to take over.

The emulator has a thread of its own, so that the event loop never waits for it (ale-py lets go of the interpreter while
it computes a frame); the policy is asked as any client's request would ask it, through its batcher.
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
from actserve.core.environment import Environment
from actserve.core.errors import InvalidRequest, TooManyGames
from actserve.core.signature import Arrays, Exploration, Signature
from actserve.engine.policy import Policy
from actserve.server.admission import Admission

Find = Callable[[], Awaitable[Policy]]  # the policy of a game, asked again for every step: it may be swapped
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
class GameStep:
    """What the policy saw and made of it, and what came of it."""

    number: int  # from 1
    screen: Screen  # what the policy saw
    proposed: int  # the policy's action, an index
    taken: int  # the one that the game was given
    values: list[float] | None  # one per action
    reward: float
    score: float  # after the step
    queue_ns: int
    run_ns: int
    over: bool


class Game:
    """One game. `begin` first, `close` last; all in the event loop.

    `exploration` None: as the policy does by default. The same `seed` (0 to 2**63 - 1) gives the same game.
    """

    def __init__(
        self, find: Find, exploration: Exploration | None, seed: int, admission: Admission | None = None
    ) -> None:
        self.seed = seed
        self.over = False
        self._find = find
        self._admission = admission or Admission()
        self._asked_exploration = exploration
        self._state: Arrays = {}  # each (1, *shape); none before the first step
        self._steps = 0
        self._thread = ThreadPoolExecutor(1, "game")

    async def begin(self) -> None:
        """Set the game up. Raises `InvalidRequest` for a policy that cannot play here, or so."""
        self.policy = policy = await self._find()
        self.environment = _environment(policy)
        self.exploration, _ = choose_exploration(policy.signature, self._asked_exploration, self.seed)
        self.values = values_output(policy.signature, len(self.environment.actions))
        self._game = await self._beside(AtariGame, self.environment, self.seed)
        self._screen = self._game.screen().copy()
        policy.signature.validate_request({self.environment.screen: self._screen[None]})

    async def step(self, override: int | None = None) -> GameStep:
        """Ask the policy, then take its action; or `override`, an index. Raises what the policy raises."""
        self.policy = policy = await self._find()
        screen, seed = self._screen, step_seed(self.seed, self._steps + 1)
        inputs = {self.environment.screen: screen[None]} | self._state
        acted = await self._admission.act(policy, inputs, 1, self.exploration, seed)
        # Copies: what came is a part of the whole batch's array, which it would keep.
        self._state = policy.state_after(acted)
        proposed = int(acted.outputs[policy.signature.action.name][0])
        taken = proposed if override is None else override
        reward, self._screen = await self._beside(self._advance, taken)
        self._steps += 1
        self.over = self._game.over
        values = acted.outputs[self.values][0].tolist() if self.values else None
        score, queue_ns, run_ns = self._game.score, acted.queue_ns, acted.run_ns
        return GameStep(self._steps, screen, proposed, taken, values, reward, score, queue_ns, run_ns, self.over)

    async def png(self, step: GameStep) -> bytes:
        """The screen of a step, compressed beside the event loop."""
        return await self._beside(encode_png, step.screen)

    def close(self) -> None:
        """The thread ends by itself once it has done what it was given."""
        self._thread.shutdown(wait=False)

    def _advance(self, action: int) -> tuple[float, Screen]:
        """In the thread: the action's reward, and the screen after it."""
        return self._game.act(action), self._game.screen().copy()

    async def _beside(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


def values_output(signature: Signature, actions: int) -> str | None:
    """The output that has one number for each action: action values, logits; None where a policy gives none."""
    return next((spec.name for spec in signature.outputs[1:] if spec.shape == (actions,)), None)


def encode_png(screen: Screen) -> bytes:
    """(H, W, 3) uint8 -> PNG, in some 0.1 ms: unfiltered rows, which suit the flat colours of these games."""
    height, width, _ = screen.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter: 0, none
    rows[:, 1:] = screen.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _environment(policy: Policy) -> Environment:
    environment = policy.artifact.manifest.environment
    if environment is None:
        raise InvalidRequest(f"{policy.name} was not trained on an Atari game, and only these can be played here")
    action = policy.signature.action
    if action.shape or action.numpy_dtype.kind not in "iu":
        raise InvalidRequest(f"expected a policy whose action is the index of one; {policy.name} gives {action}")
    return environment
