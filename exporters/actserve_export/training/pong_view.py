"""The observation of Pong's teacher: a few numbers that are read from the 84x84 screen.

The numbers are the ball's x and y, both paddles' y, and the ball's height over the own paddle, and then the movement of
the ball and the own paddle since the last screen. A student without memory cannot see movement, so its teacher acts
without it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrl.data import Categorical, TensorSpec

from actserve_export.training.games import Bytes, Game, kept_pixels

BALL, ENEMY, OWN = 14, 56, 200  # indices into ALE's palette
FIELD = slice(14, 78)  # the rows of the 84 between the walls
ENEMY_COLUMN, OWN_COLUMN = 9, 75
NEAR = 40  # the ball's height over the own paddle is exact up to this many half rows
SIZES: tuple[int, ...] = (85, 128, 128, 128, 2 * NEAR + 2)  # bins of each number, including "not visible"
MOVES = (12, 40, 24)  # the largest exact movement of the ball's x and y and the own paddle's y
MOVE_SIZES = tuple(2 * most + 2 for most in MOVES)


class PongView:
    """The numbers as bins: rows of one table, `sum(SIZES + MOVE_SIZES)` long, those without movement first."""

    def __init__(self) -> None:
        self._kept = kept_pixels(210, 160)

    def look(self, emulator: Any) -> Bytes:
        """The pixels that the policy's resize keeps, as indices into ALE's palette, (84 * 84,)."""
        pixels: Bytes = emulator.getScreen().ravel().take(self._kept, mode="clip")
        return pixels

    def see(self, now: Bytes, before: Bytes) -> Tensor:
        """(N, 8) int64: each number's bin."""
        ball_x, ball_y, own_y, enemy_y = _places(now)
        over = np.where((ball_x < 84) & (own_y < 127), np.clip(ball_y - own_y, -NEAR, NEAR) + NEAR, 2 * NEAR + 1)
        numbers = [ball_x, ball_y, own_y, enemy_y, over]
        x, y, own, _ = _places(before)
        both = (ball_x < 84) & (x < 84)
        seen = (both, both, (own_y < 127) & (own < 127))
        for most, moved, known in zip(MOVES, (ball_x - x, ball_y - y, own_y - own), seen, strict=True):
            numbers.append(np.where(known, np.clip(moved, -most, most) + most, 2 * most + 1))
        return torch.from_numpy(np.stack(numbers, 1) + np.cumsum((0, *(SIZES + MOVE_SIZES)[:-1])))

    def spec(self, count: int) -> TensorSpec:
        """(count, 8)."""
        sizes = SIZES + MOVE_SIZES
        return Categorical(sum(sizes), (count, len(sizes)))

    def network(self, outputs: int, movement: bool) -> nn.Module:
        """Bins (N, 8) -> (N, outputs). The hidden layers have 192 (a table of the bins) and 128."""
        sizes = SIZES + MOVE_SIZES if movement else SIZES
        table = nn.EmbeddingBag(sum(sizes), 192, mode="sum")
        nn.init.normal_(table.weight, std=0.3)
        return nn.Sequential(
            _SumOfEmbeddings(table, len(sizes)), nn.ReLU(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, outputs)
        )


PONG = Game("pong", (0, 3, 4), PongView(), point_is_episode=True)  # NOOP, RIGHT, LEFT: FIRE changes nothing


def _places(pixels: Bytes) -> tuple[NDArray[np.int64], ...]:
    """The ball's x (84: not visible) and y, the own paddle's y and the other's, in half rows (127: not visible)."""
    field = pixels.reshape(-1, 84, 84)[:, FIELD]
    ball = field == BALL
    seen, ball_y = _middle(ball.any(2))
    ball_x = np.where(seen, ball.any(1).argmax(1), 84)
    _, own_y = _middle(field[:, :, OWN_COLUMN] == OWN)
    _, enemy_y = _middle(field[:, :, ENEMY_COLUMN] == ENEMY)
    return ball_x, ball_y, own_y, enemy_y


def _middle(rows: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N, 64) -> whether any row is set, (N,), and the middle of the set rows in half rows, else 127."""
    seen = np.asarray(rows.any(axis=1))
    middle = rows.argmax(1) + 63 - rows[:, ::-1].argmax(1)
    return seen, np.where(seen, middle, 127)


class _SumOfEmbeddings(nn.Module):
    """An EmbeddingBag over the first `count` of the last axis, (..., bins) -> (..., 192)."""

    def __init__(self, table: nn.EmbeddingBag, count: int) -> None:
        super().__init__()
        self.table, self.count = table, count

    def forward(self, bins: Tensor) -> Tensor:
        summed: Tensor = self.table(bins[..., : self.count].reshape(-1, self.count))
        return summed.reshape(*bins.shape[:-1], -1)
