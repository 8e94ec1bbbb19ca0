"""The observation of any other game's teacher: the console's 128 bytes of RAM.

They describe a game fully, and a game's counters and positions are numbers there, so that a small network learns from
them (Bellemare et al. 2013 offer them for this). Nothing has to be known of the game.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrl.data import Bounded, TensorSpec

from actserve_export.training.atari import environment
from actserve_export.training.games import Bytes, Game

SIZE = 128
HIDDEN = 128


class RamView:
    """The bytes now, and those of the last step."""

    def look(self, emulator: Any) -> Bytes:
        """(128,)."""
        ram: Bytes = emulator.getRAM()
        return ram

    def see(self, now: Bytes, before: Bytes) -> Tensor:
        """(N, 256) uint8."""
        return torch.from_numpy(np.concatenate((now, before), 1))

    def spec(self, count: int) -> TensorSpec:
        """(count, 256) uint8."""
        return Bounded(0, 255, (count, 2 * SIZE), dtype=torch.uint8)

    def network(self, outputs: int, movement: bool) -> nn.Module:
        """(N, 256) -> (N, outputs), with two hidden layers of 128."""
        return nn.Sequential(
            _Numbers(movement),
            nn.Linear(_Numbers.size(movement), HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, outputs),
        )


def by_ram(rom: str) -> Game:
    """`rom` with the actions that it knows. Raises `UsageError` for a game for two players."""
    return Game(rom, tuple(action.code for action in environment(rom).actions), RamView())


class _Numbers(nn.Module):
    """(..., 256) uint8 -> each byte as a number and as bits, and with `movement` its change: (..., 1152 or 1280)."""

    def __init__(self, movement: bool) -> None:
        super().__init__()
        self.movement = movement

    @staticmethod
    def size(movement: bool) -> int:
        return SIZE * (10 if movement else 9)

    def forward(self, ram: Tensor) -> Tensor:
        now, before = ram[..., :SIZE], ram[..., SIZE:]
        bits = (now.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        value = now.float() / 32 - 4
        parts = [value, bits.flatten(-2).float()]
        if self.movement:
            parts.append(value - (before.float() / 32 - 4))
        return torch.cat(parts, -1)
