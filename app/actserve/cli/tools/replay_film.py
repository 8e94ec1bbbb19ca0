"""Films one episode of a recording as a version of its policy sees it: the screens, and what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from actserve.atari.film import Film
from actserve.atari.video import VideoWriter, check_video_path
from actserve.cli.tools.replay import WINDOW_BYTES, Replayed
from actserve.core.environment import Environment
from actserve.core.errors import UsageError
from actserve.core.signature import Array, Arrays, Signature, TensorSpec
from actserve.recording.images import as_image, image_shape, is_image
from actserve.recording.rate import contract_of, steps_per_second
from actserve.recording.reader import Step, Steps
from actserve.recording.replay import Actor, Player
from actserve.recording.rows import OBSERVATION, OUTPUT

LEAST_ROWS = 240  # smaller images are enlarged

# (a step, the sum of the rewards before it or None if none is known, the outputs of the replay, each (*shape))
Add = Callable[[Step, float | None, Arrays], None]


class Filming:
    """Films episodes at `path`, as `actor` acts in them: every `speed`-th step.

    Raises `UsageError` if there can be no such file, or if the actor sees no images.
    """

    def __init__(self, path: Path, actor: Actor, speed: int = 1) -> None:
        check_video_path(path)
        if not _images(actor.signature):
            seen = ", ".join(f"{spec.name}: {spec}" for spec in actor.signature.observations)
            raise UsageError(f"expected a policy that sees images, for a film; this one sees {seen}")
        self._path, self._actor, self._speed = path, actor, speed

    def film(
        self, steps: Steps, found: Replayed, episode: str | None, progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Film an episode; None: the first that diverges, else the longest.

        Returns `file`, `episode`, and the number of `steps` that the film shows. Raises `UsageError` if the recording
        does not have the episode, or if several workers took its steps.
        """
        chosen = episode or _chosen(steps, found)
        shown, player = 0, Player(self._actor, steps.signature)
        with _opened(self._path, steps, self._actor.signature, found) as add:
            for window in _of_episode(steps, chosen, progress):
                scores = {id(step): score for step, score in window}
                for batch, outputs in player.play([step for step, _ in window]):
                    for row, step in enumerate(batch):
                        if (step.step - 1) % self._speed == 0 or step.is_last:
                            add(step, scores[id(step)], {name: array[row] for name, array in outputs.items()})
                            shown += 1
        if not shown:
            raise UsageError(f"expected an episode of the recording whose steps can be played; got {chosen[:80]!r}")
        return {"file": str(self._path), "episode": chosen, "steps": shown}


def _chosen(steps: Steps, found: Replayed) -> str:
    if found.comparison.first is not None:
        return found.comparison.first.episode
    counts = Counter(name for shard in steps.shards for name in shard.facts()["episode"].to_pylist())
    return str(counts.most_common(1)[0][0])


def _of_episode(
    steps: Steps, episode: str, progress: Callable[[int], None]
) -> Iterator[list[tuple[Step, float | None]]]:
    """The steps of one episode in order, each with the sum of the rewards before it; None: no reward is known."""
    transitions = steps.transitions()
    reward = np.empty(len(transitions.row))
    reward[transitions.row] = transitions.reward
    row, score, writers = 0, None, set()
    for window in steps.windows(WINDOW_BYTES):
        kept: list[tuple[Step, float | None]] = []
        for step in window:
            if step.episode == episode:
                score = 0.0 if score is None and not np.isnan(reward[row]) else score
                kept.append((step, score))
                writers.add(step.writer)
                if score is not None:
                    score += float(np.nan_to_num(reward[row]))
            row += 1
        if len(writers) > 1:
            raise UsageError(
                f"several workers took the steps of the episode {episode}: they are not in order for a film"
            )
        progress(len(window))
        yield kept


@contextmanager
def _opened(path: Path, steps: Steps, signature: Signature, found: Replayed) -> Iterator[Add]:
    """A film of a game beside the policy's actions; of a robot, of its cameras side by side."""
    contract, action = contract_of(steps), signature.action.name
    if isinstance(contract, Environment):
        spec = next(spec for spec in signature.observations if spec.name == contract.screen)
        with Film(path, contract, signature.outputs, f"{found.label} on .{found.runtime}") as game:

            def add(step: Step, score: float | None, outputs: Arrays) -> None:
                chosen, recorded = int(outputs[action]), int(step.tensors[OUTPUT + action])
                did = contract.actions[recorded].meaning
                note = None if chosen == recorded else f"{found.label}; version {step.version} did {did}"
                screen = as_image(step.tensors[OBSERVATION + spec.name], spec)
                game.show(screen, score=score, step=step.step, action=chosen, outputs=outputs, note=note)

            yield add
        return
    images = _images(signature)
    scale = -(-LEAST_ROWS // max(image_shape(spec)[0] for spec in images))
    rate = steps_per_second(steps, steps.transitions()) or 1.0
    with VideoWriter(path, rate, scale) as video:
        yield lambda step, score, outputs: video.add(_side_by_side(step, images))


def _images(signature: Signature) -> list[TensorSpec]:
    return [spec for spec in signature.observations if is_image(spec)]


def _side_by_side(step: Step, images: list[TensorSpec]) -> Array:
    """All images of a step, (H, W, 3) uint8. Lower ones have black below."""
    shown = [as_image(step.tensors[OBSERVATION + spec.name], spec) for spec in images]
    rows = max(len(image) for image in shown)
    return np.concatenate([np.pad(image, ((0, rows - len(image)), (0, 0), (0, 0))) for image in shown], axis=1)
