"""How the bundled Pong weights were made: a teacher by PPO on a few numbers, then `pong`'s network learns from it.

The second stage is DAgger (Ross et al. 2011): the student plays, the teacher says what it would have done on the
screens the student gets to, and the student learns the teacher's probabilities (KL). The result fits
`pong.safetensors`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from exporters.policies import pong
from exporters.policies.teacher import CODES, Games, Meter, Screens, Teacher, TeacherRecipe, greys
from exporters.train import Run, optimizer_tensors, prefixed, progress_bar, restore_optimizer, unprefixed

ACTIONS = torch.tensor([pong.CODES.index(int(code)) for code in CODES])  # the teacher's actions among the policy's
CENTRE, SPREAD = 87.0, 64.0  # the grey of the background, and about the distance of the rest from it
GREYS = greys()


@dataclass(frozen=True)
class StudentRecipe:
    """DAgger's hyperparameters. Steps are environment steps, each of 4 emulator frames."""

    total_steps: int = 1_000_000
    games: int = 16
    steps_per_round: int = 8  # in each game
    updates_per_round: int = 2
    batch_size: int = 256
    buffer_size: int = 150_000
    warm_up: int = 2_000  # steps before learning
    learning_rate: float = 5e-4  # linear to 2 %
    teacher_steps: int = 20_000  # over which the teacher's share of the actions falls from 1 to 0
    random_share: float = 0.02
    evaluate_every: int = 100_000
    evaluation_games: int = 3


def train(run: Run, seed: int, teacher: TeacherRecipe | None = None, student: StudentRecipe | None = None) -> None:
    """Both stages, into `run`; goes on from its checkpoint if there is one. The best student is `best.safetensors`."""
    torch.manual_seed(seed)
    teacher, student = _shared_out(run.total_frames, teacher or TeacherRecipe(), student or StudentRecipe())
    tensors = run.restore()
    with progress_bar() as bar:
        stage = _Stages(run, bar, Teacher(teacher, seed), Student(student, seed))
        stage.restore(tensors)
        stage.teach(seed)
        stage.distil(seed)


def _shared_out(
    total: int | None, teacher: TeacherRecipe, student: StudentRecipe
) -> tuple[TeacherRecipe, StudentRecipe]:
    """The recipes with `total` steps between them, in the same proportion."""
    if total is None:
        return teacher, student
    first = total * teacher.total_steps // (teacher.total_steps + student.total_steps)
    return replace(teacher, total_steps=first), replace(student, total_steps=total - first)


class Student:
    """`pong`'s network while it learns. It learns on centred screens; `plain` folds that into the first convolution."""

    def __init__(self, recipe: StudentRecipe, seed: int) -> None:
        self.recipe = recipe
        self.steps = 0
        self.best = float("-inf")
        self.loss = 0.0
        self.network = pong.value_network().to(memory_format=torch.channels_last)
        self.player = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.learning_rate)
        self.random = np.random.default_rng(seed)
        self.replay = TensorDictReplayBuffer(
            storage=LazyTensorStorage(recipe.buffer_size), batch_size=recipe.batch_size
        )

    def train(self, games: Games, teacher: Teacher, after_round: Callable[[], None]) -> None:
        """Learn until the recipe's steps are done. While one round is played, another thread learns from those before.

        The player's weights are therefore one round old, and the result does not depend on which of the two is faster.
        """
        self.player.load_state_dict(self.network.state_dict())
        with ThreadPoolExecutor(1) as learner:
            while self.steps < self.recipe.total_steps:
                learning = learner.submit(self._learn)
                data = self._play(games, teacher)
                learning.result()
                self.replay.extend(data)
                self.player.load_state_dict(self.network.state_dict())
                self.steps += data.numel()
                after_round()

    def _play(self, games: Games, teacher: Teacher) -> TensorDict:
        """One round: the screens that were seen, as rounded greys, and what the teacher thinks of them."""
        seen, wanted = [], []
        for _ in range(self.recipe.steps_per_round):
            probabilities = teacher.probabilities(games.screens)
            seen.append(torch.from_numpy(GREYS[games.screens]))
            wanted.append(probabilities)
            games.step(CODES[self._choose(games.screens, probabilities)])
        pixels, target = torch.cat(seen), torch.cat(wanted)
        return TensorDict({"pixels": pixels, "target": target}, batch_size=[len(pixels)])

    def _choose(self, screens: Screens, probabilities: Tensor) -> NDArray[np.int64]:
        """The teacher's action, the student's, or a random one, game by game: (games,) indices into `CODES`."""
        count = len(screens)
        values = self.player(_centred(torch.from_numpy(GREYS[screens])))[:, ACTIONS]
        action: NDArray[np.int64] = values.argmax(-1).numpy()
        teacher_share = max(0.0, 1 - self.steps / self.recipe.teacher_steps)
        action = np.where(self.random.random(count) < teacher_share, probabilities.argmax(-1).numpy(), action)
        random = self.random.random(count) < self.recipe.random_share
        return np.where(random, self.random.integers(len(CODES), size=count), action)

    def _learn(self) -> None:
        if len(self.replay) < min(self.recipe.warm_up, self.recipe.buffer_size):
            return
        done = self.steps / self.recipe.total_steps
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * (1 - 0.98 * done)
        for _ in range(self.recipe.updates_per_round):
            batch = self.replay.sample()
            target = torch.zeros(len(batch), len(pong.ACTIONS)).index_copy(1, ACTIONS, batch["target"])
            with torch.autocast("cpu", torch.bfloat16):
                values = self.network(_centred(batch["pixels"]))
            loss = nn.functional.kl_div(values.float().log_softmax(-1), target, reduction="batchmean")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
            self.optimizer.step()
            self.loss = float(loss.detach())

    def plain(self) -> nn.Module:
        """The same function of greys in 0..1, exactly: the first convolution has no padding."""
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format).requires_grad_(False)
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        first.bias -= CENTRE / SPREAD * first.weight.sum((1, 2, 3))
        first.weight *= 255 / SPREAD
        return network

    def weights(self) -> dict[str, Tensor]:
        """`plain`'s, for a checkpoint."""
        return {name: tensor.contiguous() for name, tensor in self.plain().state_dict().items()}


def _centred(pixels: Tensor) -> Tensor:
    """(N, 84, 84) uint8 greys -> (N, 1, 84, 84)."""
    return ((pixels.float() - CENTRE) / SPREAD)[:, None]


class _Stages:
    """The two stages, with what they leave in the run's folder."""

    def __init__(self, run: Run, bar: Progress, teacher: Teacher, student: Student) -> None:
        self.run, self.bar, self.teacher, self.student = run, bar, teacher, student
        self.meter = Meter()
        self.recorded = 0.0
        self.finished = 0
        self.points = 0.0

    def teach(self, seed: int) -> None:
        recipe = self.teacher.recipe
        if self.teacher.steps >= recipe.total_steps:
            return
        games = Games(recipe.games, seed + self.teacher.steps)
        task = self.bar.add_task("teacher", total=recipe.total_steps, completed=self.teacher.steps)

        def after_round(points: float) -> None:
            self.points += 0.05 * (points - self.points)
            self._count(games, recipe.games * recipe.steps_per_round, every=50_000)
            description = f"teacher  {self.points:+.1f} points per 1,000 steps"
            self.bar.update(task, completed=self.teacher.steps, description=description)

        self.teacher.train(games, after_round)
        self.run.save(*self.tensors())

    def distil(self, seed: int) -> None:
        recipe = self.student.recipe
        if self.student.steps >= recipe.total_steps:
            return
        games = Games(recipe.games, seed + 1 + self.student.steps)
        self.finished = 0
        task = self.bar.add_task("student", total=recipe.total_steps, completed=self.student.steps)

        def after_round() -> None:
            size = recipe.games * recipe.steps_per_round
            self._count(games, size, every=10_000)
            if self.student.steps % recipe.evaluate_every < size or self.student.steps >= recipe.total_steps:
                self._keep_best(seed)
            self.bar.update(task, completed=self.student.steps, description=f"student  loss {self.student.loss:.4f}")

        self.student.train(games, self.teacher, after_round)
        self.run.save(*self.tensors())

    def _count(self, games: Games, steps: int, every: int) -> None:
        self.run.step(steps, len(games.finished) - self.finished)
        self.finished = len(games.finished)
        frames = self.run.counters["frames"]
        if frames - self.recorded >= every:
            recent = games.finished[-20:]
            self.run.record(
                mean_return=sum(recent) / len(recent) if recent else -21.0,
                points_per_1000=self.points,
                loss=self.student.loss,
                steps_per_s=self.meter.read(int(frames - self.recorded)),
            )
            self.recorded = frames
        if self.run.save_is_due:
            self.run.save(*self.tensors())

    def _keep_best(self, seed: int) -> None:
        scores = evaluate(self.student.plain(), self.student.recipe.evaluation_games, seed + 500, see=see_quickly)
        mean = sum(scores) / len(scores)
        self.bar.console.print(f"after {self.student.steps:,} steps the student's mean score is {mean:+.1f}")
        if mean >= self.student.best:
            self.student.best = mean
            self.run.keep("best.safetensors", self.student.weights())

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights, everything that going on needs); the optimiser is that of the stage in progress."""
        teaching = self.teacher.steps < self.teacher.recipe.total_steps
        training = (
            prefixed("teacher.policy", self.teacher.policy.state_dict())
            | prefixed("teacher.value", self.teacher.value.state_dict())
            | prefixed("student.network", self.student.network.state_dict())
            | optimizer_tensors(self.teacher.optimizer if teaching else self.student.optimizer)
            | {"teacher.steps": torch.tensor(self.teacher.steps), "student.steps": torch.tensor(self.student.steps)}
            | {"student.best": torch.tensor(self.student.best)}
        )
        return self.student.weights(), {name: tensor.detach().clone().contiguous() for name, tensor in training.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        self.recorded = self.run.counters["frames"]
        self.teacher.policy.load_state_dict(unprefixed("teacher.policy", tensors))
        self.teacher.value.load_state_dict(unprefixed("teacher.value", tensors))
        self.student.network.load_state_dict(unprefixed("student.network", tensors))
        self.teacher.steps, self.student.steps = int(tensors["teacher.steps"]), int(tensors["student.steps"])
        self.student.best = float(tensors["student.best"])
        teaching = self.teacher.steps < self.teacher.recipe.total_steps
        restore_optimizer(self.teacher.optimizer if teaching else self.student.optimizer, tensors)


def see_quickly(games: Games) -> Tensor:
    """(N, 1, 84, 84) float32 greys in 0..1, within 1/510 of `see_as_served`."""
    return torch.from_numpy(GREYS[games.screens]).float()[:, None] / 255


_PREPROCESSING = pong.preprocessing()


def see_as_served(games: Games) -> Tensor:
    """(N, 1, 84, 84) float32: the raw RGB screens through `pong`'s own preprocessing."""
    screens = np.zeros((len(games.games), *pong.SCREEN), np.uint8)
    for screen, game in zip(screens, games.games, strict=True):
        game.getScreenRGB(screen)
    data = TensorDict({"pixels": torch.from_numpy(screens)}, batch_size=[len(screens)])
    seen: Tensor = _PREPROCESSING(data)["pixels"]
    return seen


def evaluate(network: nn.Module, games: int, seed: int, see: Callable[[Games], Tensor] = see_as_served) -> list[float]:
    """The scores of `games` whole games, -21 to 21, played greedily over all six actions."""
    codes = np.array(pong.CODES)
    playing = Games(games, seed)
    scores: dict[int, float] = {}
    while len(scores) < games:
        before = playing.scores.copy()
        with torch.no_grad():
            values = network(see(playing))
        points = playing.step(codes[values.argmax(-1).numpy()])
        over = np.flatnonzero(playing.scores != before + points)  # `step` zeroes the score of a game that is over
        for i in over:
            scores.setdefault(int(i), float(before[i] + points[i]))
    return [scores[i] for i in range(games)]
