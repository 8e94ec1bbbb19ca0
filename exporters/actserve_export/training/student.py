"""The training of a policy without memory from a teacher by DAgger (Ross et al. 2011).

The student plays, the teacher gives its action probabilities for the student's screens, and the student learns them
(KL divergence).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from actserve_export.training import atari
from actserve_export.training.bundled import WEIGHTS
from actserve_export.training.games import Game, Games, whole_games
from actserve_export.training.teacher import Teacher, moving_average

CENTRE, SPREAD = 87.0, 64.0  # the grey of Pong's background, and the typical distance of other greys from it


@dataclass(frozen=True)
class StudentRecipe:
    """DAgger's hyperparameters. Steps are environment steps, each of 4 emulator frames."""

    total_steps: int = 1_200_000
    games: int = 16
    steps_per_round: int = 8  # in each game
    updates_per_round: int = 4
    batch_size: int = 256  # screens; for a recurrent student, windows of one round
    buffer_size: int = 150_000
    warm_up: int = 2_000  # steps before learning
    learning_rate: float = 5e-4  # linear to 2 %
    teacher_steps: int = 20_000  # steps in which the teacher's share of the actions falls from 1 to 0
    random_share: float = 0.02
    average_over: int = 1_000  # updates in the exponential moving average of the saved weights
    evaluate_every: int = 100_000
    evaluation_games: int = 24


class Student:
    """A student without memory.

    It learns on centred screens; `weights` folds the centring into the first convolution.
    """

    def __init__(self, game: Game, recipe: StudentRecipe, seed: int) -> None:
        self.game = game
        self.recipe = recipe
        codes = [action.code for action in atari.environment(game.rom).actions]
        self.outputs = len(codes)
        self.chosen = torch.tensor([codes.index(code) for code in game.codes])  # the outputs that are the game's codes
        self.steps = 0
        self.best = float("-inf")
        self.loss = 0.0
        self.network = self.make()
        self.player = copy.deepcopy(self.network).requires_grad_(False)
        self.average = moving_average(self.network, recipe.average_over)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.learning_rate)
        self.random = np.random.default_rng(seed)
        self.replay = TensorDictReplayBuffer(
            storage=LazyTensorStorage(recipe.buffer_size), batch_size=recipe.batch_size
        )

    def make(self) -> nn.Module:
        """A new network."""
        return atari.value_network(self.outputs).to(memory_format=torch.channels_last)

    @property
    def name(self) -> str:
        """The policy that it becomes."""
        return self.game.rom

    def load_bundled(self) -> None:
        """Begin with the bundled weights."""
        network = self.make()
        network.load_state_dict(load_file(WEIGHTS[self.name]))
        centre(network)
        for target in (self.network, self.average.module):
            target.load_state_dict(network.state_dict())

    def train(self, games: Games, teacher: Teacher, after_round: Callable[[], None]) -> None:
        """Learn for the recipe's steps. While one round is played, another thread learns from the rounds before.

        The player's weights are therefore one round old. The result does not depend on the speed of the two threads.
        """
        self.player.load_state_dict(self.network.state_dict())
        values = self.playing(self.player)
        with ThreadPoolExecutor(1) as learner:
            while self.steps < self.recipe.total_steps:
                learning = learner.submit(self._learn)
                data = self._play(games, teacher, values)
                learning.result()
                self.replay.extend(self.arrange(data))
                self.player.load_state_dict(self.network.state_dict())
                self.steps += data.numel()
                after_round()

    def playing(self, network: nn.Module) -> Callable[[Games], TensorDict]:
        """A function: games -> `values` (games, codes) of the next action by `network`, with the inputs of learning."""

        def values(games: Games) -> TensorDict:
            pixels = torch.from_numpy(games.greys())
            with torch.no_grad():
                found = network(centred(pixels))[:, self.chosen]
            return TensorDict({"pixels": pixels, "values": found}, batch_size=[len(pixels)])

        return values

    def arrange(self, data: TensorDict) -> TensorDict:
        """One round, (games, steps) -> entries of the replay buffer."""
        return data.select("pixels", "target").reshape(-1)

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(the student's logits of all its actions, the teacher's probabilities of the codes) for a sampled batch."""
        with torch.autocast("cpu", torch.bfloat16):
            values = self.network(centred(batch["pixels"]))
        return values.float(), batch["target"]

    def _play(self, games: Games, teacher: Teacher, values: Callable[[Games], TensorDict]) -> TensorDict:
        steps = []
        for _ in range(self.recipe.steps_per_round):
            step = values(games)
            step["target"] = teacher.probabilities(games)
            games.step(self._choose(step))
            steps.append(step)
        return TensorDict.stack(steps, 1)

    def _choose(self, step: TensorDict) -> Tensor:
        """The teacher's action, the student's, or a random one, game by game: (games,) indices into the codes."""
        count = len(step)
        action: NDArray[np.int64] = step["values"].argmax(-1).numpy()
        teacher_share = max(0.0, 1 - self.steps / self.recipe.teacher_steps)
        action = np.where(self.random.random(count) < teacher_share, step["target"].argmax(-1).numpy(), action)
        random = self.random.random(count) < self.recipe.random_share
        return torch.from_numpy(np.where(random, self.random.integers(len(self.chosen), size=count), action))

    def _learn(self) -> None:
        if self.steps < self.recipe.warm_up or len(self.replay) == 0:
            return
        done = self.steps / self.recipe.total_steps
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * (1 - 0.98 * done)
        for _ in range(self.recipe.updates_per_round):
            logits, wanted = self.logits(self.replay.sample())
            target = torch.zeros_like(logits).index_copy(-1, self.chosen, wanted).flatten(0, -2)
            loss = nn.functional.kl_div(logits.flatten(0, -2).log_softmax(-1), target, reduction="batchmean")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
            self.optimizer.step()
            self.average.update_parameters(self.network)
            self.loss = float(loss.detach())

    def evaluate(self, seed: int) -> list[float]:
        """The scores of whole games with greedy actions."""
        values = self.playing(self.average.module)
        count = self.recipe.evaluation_games
        return whole_games(self.game, count, seed, lambda games: values(games)["values"].argmax(-1))

    def weights(self) -> dict[str, Tensor]:
        """The weights for greys in 0..1, for a checkpoint."""
        network = copy.deepcopy(self.average.module).to(memory_format=torch.contiguous_format)
        uncentre(network)
        return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def centred(pixels: Tensor) -> Tensor:
    """(..., 84, 84) uint8 greys -> (..., 1, 84, 84) float32."""
    return ((pixels.float() - CENTRE) / SPREAD).unsqueeze(-3)


def _first(network: nn.Module) -> nn.Conv2d:
    return next(module for module in network.modules() if isinstance(module, nn.Conv2d))


def uncentre(network: nn.Module) -> None:
    """Change a network for centred screens into one for greys in 0..1. Exact: the first convolution has no padding."""
    first = _first(network)
    with torch.no_grad():
        first.bias -= CENTRE / SPREAD * first.weight.sum((1, 2, 3))
        first.weight *= 255 / SPREAD


def centre(network: nn.Module) -> None:
    """The inverse of `uncentre`."""
    first = _first(network)
    with torch.no_grad():
        first.weight *= SPREAD / 255
        first.bias += CENTRE / SPREAD * first.weight.sum((1, 2, 3))
