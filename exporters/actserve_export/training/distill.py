"""The training of a policy for any game: a teacher learns by PPO on a few numbers, a student from it by DAgger.

`improve` begins with the bundled weights, on any machine. A new teacher first learns what the bundled policy does. Then
PPO improves the teacher, and the student learns from it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import torch
from rich.progress import Progress
from torch import Tensor

from actserve.core.errors import UsageError
from actserve_export.training.games import Game, Games
from actserve_export.training.pong_view import PONG
from actserve_export.training.ram_view import by_ram
from actserve_export.training.recurrent import RecurrentRecipe, RecurrentStudent
from actserve_export.training.run import (
    Meter,
    Run,
    optimizer_tensors,
    prefixed,
    progress_bar,
    restore_optimizer,
    unprefixed,
)
from actserve_export.training.student import Student, StudentRecipe
from actserve_export.training.teacher import ANY_GAME, CONTINUED, Teacher, TeacherRecipe


def train(
    run: Run,
    seed: int,
    game: str = "pong",
    teacher: TeacherRecipe | None = None,
    student: StudentRecipe | None = None,
) -> None:
    """Train a policy for `game` in both stages, and resume from the run's checkpoint.

    The best student is kept, too.
    """
    teacher = teacher or (TeacherRecipe() if game == PONG.rom else ANY_GAME)
    _train(run, seed, _game(game), Student, teacher, student or StudentRecipe())


def train_recurrent(
    run: Run, seed: int, teacher: TeacherRecipe | None = None, student: RecurrentRecipe | None = None
) -> None:
    """Train `pong-lstm` in the same way. Its teacher also knows the ball's movement."""
    teacher = teacher or TeacherRecipe(total_steps=10_000_000, movement=True)
    _train(run, seed, PONG, RecurrentStudent, teacher, student or RecurrentRecipe())


def improve(
    run: Run,
    seed: int,
    game: str = "pong",
    teacher: TeacherRecipe | None = None,
    student: StudentRecipe | None = None,
) -> None:
    """Train the bundled policy of `game` further. As `train` otherwise."""
    student = student or StudentRecipe(learning_rate=3e-4, teacher_steps=1)
    _train(run, seed, _game(game), Student, teacher or CONTINUED, student, from_bundled=True)


def improve_recurrent(
    run: Run, seed: int, teacher: TeacherRecipe | None = None, student: RecurrentRecipe | None = None
) -> None:
    """Train the bundled `pong-lstm` further. As `train_recurrent` otherwise."""
    teacher = teacher or replace(CONTINUED, movement=True)
    student = student or RecurrentRecipe(total_steps=400_000)
    _train(run, seed, PONG, RecurrentStudent, teacher, student, from_bundled=True)


def _game(rom: str) -> Game:
    return PONG if rom == PONG.rom else by_ram(rom)


def _train(
    run: Run,
    seed: int,
    game: Game,
    kind: type[Student],
    teacher: TeacherRecipe,
    student: StudentRecipe,
    from_bundled: bool = False,
) -> None:
    torch.manual_seed(seed)
    teacher, student = _scale_steps(run.total_frames, teacher, student)
    tensors = run.restore()
    method = "improve" if from_bundled else "distill"
    run.describe(game=game.rom, seed=seed, method=method, teacher=asdict(teacher), student=asdict(student))
    with progress_bar() as bar:
        stages = _Stages(run, bar, game, Teacher(game, teacher), kind(game, student, seed))
        if from_bundled:
            stages.student.load_bundled()
        stages.restore(tensors)
        stages.imitate(seed)
        stages.teach(seed)
        stages.distil(seed)


def _scale_steps(
    total: int | None, teacher: TeacherRecipe, student: StudentRecipe
) -> tuple[TeacherRecipe, StudentRecipe]:
    """The recipes scaled to `total` steps together."""
    if total is None:
        return teacher, student
    share = total / (teacher.imitation_steps + teacher.total_steps + student.total_steps)
    imitation, first = int(share * teacher.imitation_steps), int(share * teacher.total_steps)
    scaled = replace(teacher, imitation_steps=imitation, total_steps=first)
    return scaled, replace(student, total_steps=total - imitation - first)


class _Stages:
    """Runs the two stages, and writes their history and checkpoints."""

    def __init__(self, run: Run, bar: Progress, game: Game, teacher: Teacher, student: Student) -> None:
        self.run, self.bar, self.game, self.teacher, self.student = run, bar, game, teacher, student
        self.meter = Meter()
        self.recorded = 0.0
        self.finished = 0
        self.points = 0.0

    @property
    def teaching(self) -> bool:
        return self.teacher.steps < self.teacher.recipe.total_steps

    def imitate(self, seed: int) -> None:
        teacher = self.teacher
        if teacher.imitated >= teacher.recipe.imitation_steps:
            return
        games = Games(self.game, teacher.recipe.games, seed + 2 + teacher.imitated)
        task = self.bar.add_task("imitation", total=teacher.recipe.imitation_steps, completed=teacher.imitated)

        def after_round(steps: int, loss: float) -> None:
            self.bar.update(task, advance=steps, description=f"imitation  loss {loss:.4f}")

        teacher.imitate(games, self.student.playing(self.student.average.module), after_round)
        self._evaluate_teacher(seed)
        self.run.save(*self.tensors())

    def teach(self, seed: int) -> None:
        recipe = self.teacher.recipe
        if not self.teaching:
            return
        games = Games(self.game, recipe.games, seed + self.teacher.steps)
        task = self.bar.add_task("teacher", total=recipe.total_steps, completed=self.teacher.steps)

        def after_round(points: float) -> None:
            self.points += 0.05 * (points - self.points)
            size = recipe.games * recipe.steps_per_round
            self._count(games, size, every=50_000, stage="teacher")
            if self.teacher.steps % recipe.evaluate_every < size:
                self._evaluate_teacher(seed)
            description = f"teacher  {self.points:+.1f} points per 1,000 steps"
            self.bar.update(task, completed=self.teacher.steps, description=description)

        self.teacher.train(games, after_round)
        self.run.save(*self.tensors())

    def distil(self, seed: int) -> None:
        recipe = self.student.recipe
        if self.student.steps >= recipe.total_steps:
            return
        games = Games(self.game, recipe.games, seed + 1 + self.student.steps)
        self.finished = 0
        task = self.bar.add_task("student", total=recipe.total_steps, completed=self.student.steps)

        def after_round() -> None:
            size = recipe.games * recipe.steps_per_round
            self._count(games, size, every=10_000, stage="student")
            if self.student.steps % recipe.evaluate_every < size or self.student.steps >= recipe.total_steps:
                self._keep_best(seed)
            self.bar.update(task, completed=self.student.steps, description=f"student  loss {self.student.loss:.4f}")

        self.student.train(games, self.teacher, after_round)
        self.run.save(*self.tensors())

    def _count(self, games: Games, steps: int, every: int, stage: str) -> None:
        self.run.step(steps, len(games.finished) - self.finished)
        self.finished = len(games.finished)
        frames = self.run.counters["frames"]
        if frames - self.recorded >= every:
            recent = games.finished[-20:]
            self.run.record(
                stage=stage,
                mean_return=sum(recent) / len(recent) if recent else math.nan,
                points_per_1000=self.points,
                loss=self.student.loss,
                steps_per_s=self.meter.read(int(frames - self.recorded)),
            )
            self.recorded = frames
        if self.run.save_is_due:
            self.run.save(*self.tensors())

    def _evaluate_teacher(self, seed: int) -> None:
        self._print("teacher", self.teacher.steps, self.teacher.evaluate(seed + 500))

    def _print(self, who: str, steps: int, scores: list[float]) -> float:
        mean = sum(scores) / len(scores)
        self.bar.console.print(
            f"after {steps:,} steps the {who}'s mean score is {mean:+.1f} ({min(scores):+.0f} at least)"
        )
        return mean

    def _keep_best(self, seed: int) -> None:
        mean = self._print("student", self.student.steps, self.student.evaluate(seed + 500))
        if mean >= self.student.best:
            self.student.best = mean
            self.run.keep_best(self.student.weights())

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights, tensors for resuming). The optimiser is that of the current stage."""
        training = (
            prefixed("teacher.policy", self.teacher.policy.state_dict())
            | prefixed("teacher.value", self.teacher.value.state_dict())
            | prefixed("teacher.average", self.teacher.average.state_dict())
            | prefixed("student.network", self.student.network.state_dict())
            | prefixed("student.average", self.student.average.state_dict())
            | optimizer_tensors(self.teacher.optimizer if self.teaching else self.student.optimizer)
            | {"teacher.steps": torch.tensor(self.teacher.steps), "student.steps": torch.tensor(self.student.steps)}
            | {"teacher.imitated": torch.tensor(self.teacher.imitated)}
            | {"student.best": torch.tensor(self.student.best)}
        )
        return self.student.weights(), {name: tensor.detach().clone().contiguous() for name, tensor in training.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        missing = self.tensors()[1].keys() - tensors.keys()
        if any(not name.startswith("optimizer.") for name in missing):
            raise UsageError(
                f"the checkpoint in {self.run.folder} is of an older recipe: start again with --no-resume, "
                "or in another folder"
            )
        self.recorded = self.run.counters["frames"]
        self.teacher.policy.load_state_dict(unprefixed("teacher.policy", tensors))
        self.teacher.value.load_state_dict(unprefixed("teacher.value", tensors))
        self.teacher.average.load_state_dict(unprefixed("teacher.average", tensors))
        self.teacher.imitated = int(tensors["teacher.imitated"])
        self.student.network.load_state_dict(unprefixed("student.network", tensors))
        self.student.average.load_state_dict(unprefixed("student.average", tensors))
        self.teacher.steps, self.student.steps = int(tensors["teacher.steps"]), int(tensors["student.steps"])
        self.student.best = float(tensors["student.best"])
        restore_optimizer(self.teacher.optimizer if self.teaching else self.student.optimizer, tensors)
