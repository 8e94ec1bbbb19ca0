"""Pong's teacher: PPO (Schulman et al. 2017) on four numbers read off the 84x84 screen, and the games it plays.

The numbers are the ball's x and y and both paddles' y, plus the ball's height over the own paddle. The ball's velocity
is left out: the student sees one screen, and should not be asked for what that screen does not show.

The games are a plain loop over ALE, not a Collector over GymEnv, for speed: what is left is nearly all ALE's own time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ale_py import ALEInterface, LoggerMode, roms
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

CODES = np.array((0, 3, 4))  # NOOP, RIGHT, LEFT, as ALE numbers them
PALETTE = {
    0: (0, 0, 0),
    14: (236, 236, 236),
    34: (144, 72, 17),
    56: (213, 130, 74),
    200: (92, 186, 92),
    # these four only before the first step of a game
    138: (101, 111, 228),
    210: (53, 95, 24),
    228: (109, 118, 43),
    250: (210, 182, 86),
}
BALL, ENEMY, OWN = 14, 56, 200  # by ALE's index into the palette
FIELD = slice(14, 78)  # the rows of the 84 between the walls
ENEMY_COLUMN, OWN_COLUMN = 9, 75
NEAR = 40  # how far over the own paddle the ball's height is told exactly, in half rows
SIZES = (85, 128, 128, 128, 2 * NEAR + 2)  # bins of each number, "not to be seen" included
OFFSETS = np.cumsum((0, *SIZES[:-1]))

Screens = NDArray[np.uint8]


def picked() -> NDArray[np.int64]:
    """Which pixels of a flat 210x160 screen a nearest-neighbour resize to 84x84 takes, (84 * 84,)."""
    rows, columns = np.arange(84) * 210 // 84, np.arange(84) * 160 // 84
    flat: NDArray[np.int64] = (rows[:, None] * 160 + columns).ravel()
    return flat


def greys() -> Screens:
    """Palette index -> the tutorial's grey, 0 to 255 rounded, (256,)."""
    table = np.zeros(256, np.uint8)
    for index, (red, green, blue) in PALETTE.items():
        table[index] = round(0.2989 * red + 0.587 * green + 0.114 * blue)
    return table


class Games:
    """`count` games of Pong side by side, played as Gymnasium's v5 plays them: frame skip 4, sticky actions 0.25.

    `screens` is (count, 84, 84) uint8, the picked pixels as indices into ALE's palette. A game that is over
    starts anew.
    """

    def __init__(self, count: int, seed: int) -> None:
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.games = [_game(seed * 1000 + i) for i in range(count)]
        self.screens: Screens = np.zeros((count, 84, 84), np.uint8)
        self.scores = np.zeros(count)
        self.finished: list[float] = []  # the scores of the games that are over
        self._flat = self.screens.reshape(count, -1)
        self._picked = picked()
        for i in range(count):
            self._look(i)

    def step(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Act in every game; the points won (1) and lost (-1), (count,)."""
        points = np.zeros(len(self.games), np.float32)
        for i, game in enumerate(self.games):
            points[i] = game.act(int(codes[i]))
            self.scores[i] += points[i]
            if game.game_over(with_truncation=True):
                self.finished.append(float(self.scores[i]))
                self.scores[i] = 0
                game.reset_game()
            self._look(i)
        return points

    def _look(self, i: int) -> None:
        self.games[i].getScreen().ravel().take(self._picked, out=self._flat[i], mode="clip")


def _game(seed: int) -> Any:
    game = ALEInterface()
    game.setInt("random_seed", seed)
    game.setFloat("repeat_action_probability", 0.25)
    game.setInt("frame_skip", 4)
    game.setInt("max_num_frames_per_episode", 108_000)
    game.loadROM(roms.get_rom_path("pong"))
    game.reset_game()
    return game


def features(screens: Screens) -> Tensor:
    """(N, 84, 84) palette indices -> (N, 5) int64, each number's bin in one common table of `sum(SIZES)` rows."""
    field = screens[:, FIELD]
    ball = field == BALL
    seen, ball_y = _middle(ball.any(2))
    ball_x = np.where(seen, ball.any(1).argmax(1), 84)
    own_seen, own_y = _middle(field[:, :, OWN_COLUMN] == OWN)
    _, enemy_y = _middle(field[:, :, ENEMY_COLUMN] == ENEMY)
    over = np.clip(ball_y - own_y, -NEAR, NEAR) + NEAR
    over = np.where(seen & own_seen, over, 2 * NEAR + 1)
    return torch.from_numpy(np.stack((ball_x, ball_y, own_y, enemy_y, over), 1) + OFFSETS)


def _middle(rows: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N, 64) -> whether there is anything, and its middle in half rows, 127 if there is nothing."""
    seen = np.asarray(rows.any(axis=1))
    middle = rows.argmax(1) + 63 - rows[:, ::-1].argmax(1)
    return seen, np.where(seen, middle, 127)


def network(outputs: int) -> nn.Module:
    """(N, 5) bins -> (N, outputs): a one-hot layer of 192, looked up rather than multiplied, then 128."""
    table = nn.EmbeddingBag(sum(SIZES), 192, mode="sum")
    nn.init.normal_(table.weight, std=0.3)
    last = nn.Linear(128, outputs)
    nn.init.orthogonal_(last.weight, 0.01 if outputs > 1 else 1.0)
    nn.init.zeros_(last.bias)
    return nn.Sequential(table, nn.ReLU(), nn.Linear(192, 128), nn.ReLU(), last)


@dataclass(frozen=True)
class TeacherRecipe:
    """PPO's hyperparameters. Steps are environment steps, each of 4 emulator frames."""

    total_steps: int = 4_000_000
    games: int = 32
    steps_per_round: int = 64  # in each game
    epochs: int = 4
    batch_size: int = 512
    learning_rate: float = 7e-4  # constant for 40 %, then linear to 5 %
    gamma: float = 0.99
    lmbda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01  # falls linearly to 10 %
    critic: float = 0.5


class Teacher:
    """The teacher and its training. A point ends an episode, whatever the game does."""

    def __init__(self, recipe: TeacherRecipe, seed: int) -> None:
        self.recipe = recipe
        self.steps = 0
        self.policy, self.value = network(len(CODES)), network(1)
        self.generator = torch.Generator().manual_seed(seed)
        actor = ProbabilisticActor(
            TensorDictModule(self.policy, in_keys=["bins"], out_keys=["logits"]),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        self.loss = ClipPPOLoss(
            actor,
            ValueOperator(self.value, in_keys=["bins"]),
            clip_epsilon=recipe.clip,
            entropy_coeff=recipe.entropy,
            critic_coeff=recipe.critic,
            loss_critic_type="l2",
            normalize_advantage=True,
        )
        self.loss.set_keys(sample_log_prob="log_prob")
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=recipe.learning_rate, eps=1e-5)

    def probabilities(self, screens: Screens) -> Tensor:
        """(N, 84, 84) palette indices -> (N, 3), of NOOP, RIGHT, LEFT."""
        with torch.no_grad():
            probabilities: Tensor = self.policy(features(screens)).softmax(-1)
        return probabilities

    def train(self, games: Games, after_round: Callable[[float], None]) -> None:
        """Learn until the recipe's steps are done. `after_round` gets each round's points per 1,000 steps."""
        size = self.recipe.games * self.recipe.steps_per_round
        replay = TensorDictReplayBuffer(
            storage=LazyTensorStorage(size), sampler=SamplerWithoutReplacement(), batch_size=self.recipe.batch_size
        )
        while self.steps < self.recipe.total_steps:
            self._schedule(self.steps / self.recipe.total_steps)
            data = self._play(games)
            replay.empty()
            replay.extend(self._with_advantage(data))
            for _ in range(self.recipe.epochs):
                for batch in replay:
                    self._update(batch)
            self.steps += size
            after_round(1000 * float(data["reward"].mean()))

    def _schedule(self, done: float) -> None:
        share = 1 - 0.95 * max(0.0, (done - 0.4) / 0.6)
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * share
        self.loss.entropy_coeff.fill_(self.recipe.entropy * (1 - 0.9 * done))

    def _play(self, games: Games) -> TensorDict:
        """One round, batch size (games, steps_per_round); `bins` has one step more, so it stays outside the batch."""
        kept: dict[str, list[Tensor]] = {"bins": [], "action": [], "log_prob": [], "reward": []}
        for _ in range(self.recipe.steps_per_round):
            bins = features(games.screens)
            log_probabilities = self.policy(bins).log_softmax(-1).detach()
            action = torch.multinomial(log_probabilities.exp(), 1, generator=self.generator)
            kept["bins"].append(bins)
            kept["action"].append(action[:, 0])
            kept["log_prob"].append(log_probabilities.gather(1, action)[:, 0])
            kept["reward"].append(torch.from_numpy(games.step(CODES[action[:, 0].numpy()]))[:, None])
        stacked = {name: torch.stack(values, 1) for name, values in kept.items()}
        data = TensorDict(stacked, batch_size=[self.recipe.games, self.recipe.steps_per_round])
        values = self.value(torch.cat((stacked["bins"], features(games.screens)[:, None]), 1).flatten(0, 1))
        values = values.detach().reshape(self.recipe.games, -1, 1)
        return data.set("state_value", values[:, :-1]).set("next_value", values[:, 1:])

    def _with_advantage(self, data: TensorDict) -> TensorDict:
        done = data["reward"] != 0
        advantage, target = vec_generalized_advantage_estimate(
            self.recipe.gamma, self.recipe.lmbda, data["state_value"], data["next_value"], data["reward"], done, done
        )
        data.set("advantage", advantage).set("value_target", target)
        return data.reshape(-1)

    def _update(self, batch: TensorDict) -> None:
        losses = self.loss(batch)
        self.optimizer.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
        self.optimizer.step()


class Meter:
    """Steps a second, over the time since it was made or last read."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def read(self, steps: int) -> float:
        """What `steps` more steps came to."""
        now = time.monotonic()
        rate = steps / (now - self._at)
        self._at = now
        return rate
