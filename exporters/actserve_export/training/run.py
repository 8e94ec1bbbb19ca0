"""The run folder of a training: checkpoints, history, learning curve, progress.

    <run>/checkpoint.safetensors   the last weights, for `actserve export --checkpoint`
    <run>/best.safetensors         the best weights, if the training evaluates
    <run>/training.safetensors     optimiser, counters and other tensors for resuming
    <run>/recipe.json              hyperparameters, seed, versions
    <run>/history.csv  curve.png   the learning curve, as numbers and as a picture

The replay buffer is not saved: a resumed run fills it again before it learns.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

CHECKPOINT_EVERY_S = 60.0
LAST, BEST, TRAINING = "checkpoint.safetensors", "best.safetensors", "training.safetensors"
_TOOLS = ("torch", "torchrl", "tensordict", "ale-py", "gymnasium", "numpy")


class Run:
    """The folder and the progress of one run. A trainer calls `restore` once, then `step` after every few steps."""

    def __init__(self, folder: Path, total_frames: int | None, resume: bool) -> None:
        self.folder = folder
        self.total_frames = total_frames  # None: the recipe decides
        self.resume = resume
        self.counters: dict[str, float] = {"frames": 0, "episodes": 0, "seconds": 0.0}
        self._saved_at = time.monotonic()
        self._ticked_at = self._saved_at

    def restore(self) -> dict[str, Tensor]:
        """The tensors of the last checkpoint by name; empty for a new run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        training = self.folder / TRAINING
        if not self.resume or not training.exists():
            # Remove all files of an old run: a run that stops before its first save would seem to own them.
            for name in (TRAINING, LAST, BEST, "recipe.json", "history.csv", "curve.png"):
                (self.folder / name).unlink(missing_ok=True)
            return {}
        with safe_open(training, "pt") as file:
            self.counters = json.loads(file.metadata()["counters"])
        self._drop_unsaved_history()
        return load_file(training)

    def _drop_unsaved_history(self) -> None:
        """Remove the history's rows after the checkpoint: the run repeats those steps."""
        history = self.folder / "history.csv"
        if history.exists():
            head, *rows = history.read_text().splitlines(keepends=True)
            kept = [row for row in rows if float(row.partition(",")[0]) <= self.counters["frames"]]
            _write(history, lambda path: path.write_text("".join((head, *kept))))

    def save(self, weights: Mapping[str, Tensor], training: Mapping[str, Tensor]) -> None:
        """Write a checkpoint. After a crash, each file is either the old or the new one."""
        # As bytes, because safetensors writes files that only their owner may read. The counters are in the same file
        # as the tensors, because two files cannot be replaced atomically.
        kept = save(dict(training), metadata={"counters": json.dumps(self.counters)})
        self._keep(LAST, weights)
        _write(self.folder / TRAINING, lambda path: path.write_bytes(kept))
        self._saved_at = time.monotonic()

    def keep_best(self, weights: Mapping[str, Tensor]) -> None:
        """Write the best weights so far."""
        self._keep(BEST, weights)

    @property
    def weights(self) -> Path:
        """The weights to export: the best, if there was an evaluation, else the last."""
        best = self.folder / BEST
        return best if best.exists() else self.folder / LAST

    def _keep(self, name: str, weights: Mapping[str, Tensor]) -> None:
        _write(self.folder / name, lambda path: path.write_bytes(save(dict(weights))))

    @property
    def save_is_due(self) -> bool:
        return time.monotonic() - self._saved_at > CHECKPOINT_EVERY_S

    def step(self, frames: int, episodes: int) -> None:
        """Add to the counters."""
        now = time.monotonic()
        self.counters["frames"] += frames
        self.counters["episodes"] += episodes
        self.counters["seconds"] += now - self._ticked_at
        self._ticked_at = now

    def describe(self, **recipe: Any) -> None:
        """Write `recipe.json`: `recipe` (JSON-able) and the versions of the tools."""
        versions = {tool: metadata.version(tool).partition("+")[0] for tool in _TOOLS}
        text = json.dumps({**recipe, "versions": versions}, indent=1) + "\n"
        _write(self.folder / "recipe.json", lambda path: path.write_text(text))

    def record(self, *, stage: str = "", **values: float) -> None:
        """Append one row to the history: the counters and `values`. A curve is drawn for each `stage`."""
        numbers = {name: round(value, 5) for name, value in (self.counters | values).items()}
        row = {**numbers, "stage": stage}
        history = self.folder / "history.csv"
        new = not history.exists()
        with history.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


def progress_bar() -> Progress:
    """One live line on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat named tensors, for safetensors."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): v for name, v in tensors.items() if name.startswith(f"{prefix}.")}


def draw(history: Path, target: Path, title: str) -> None:
    """The learning curve: mean return over steps, a line for each stage."""
    from matplotlib.figure import Figure

    with history.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    for stage, colour in zip(stages, ("#2f6f8f", "#c8553d"), strict=False):
        line = [(float(row["frames"]) / 1e6, float(row["mean_return"])) for row in rows if row["stage"] == stage]
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=2, label=stage)
    axes.set(title=f"{title}: learning curve", xlabel="environment steps (millions)", ylabel="mean return, exploring")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(stages):
        axes.legend(frameon=False)
    _write(target, lambda path: figure.savefig(path, dpi=120, format="png"))


class Meter:
    """Measures steps per second."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def read(self, steps: int) -> float:
        """The rate of `steps` steps since the last call."""
        now = time.monotonic()
        rate = steps / (now - self._at)
        self._at = now
        return rate


def _write(target: Path, write: Callable[[Path], Any]) -> None:
    part = target.with_name(target.name + ".part")
    write(part)
    os.replace(part, target)
