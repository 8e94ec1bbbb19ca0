"""A video of a game and its policy: the screen, and beside it the score and the policy's actions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from actserve.atari.emulator import AtariGame
from actserve.atari.overlay import Overlay
from actserve.atari.video import VideoWriter
from actserve.client.remote_policy import RemotePolicy
from actserve.core.environment import Environment
from actserve.core.errors import UsageError
from actserve.core.signature import Array, Arrays, TensorSpec


class Film:
    """A video that shows every `speed`-th step. A context manager, like `VideoWriter`.

    `outputs` are those of the policy, and `note` is a line about it.
    """

    def __init__(
        self, path: Path, environment: Environment, outputs: Sequence[TensorSpec], note: str, speed: int = 1
    ) -> None:
        self._speed = speed
        self._note = note
        # The output with one number per action, such as action values or logits, if the policy has one.
        self._values_output = next(
            (
                spec.name
                for spec in outputs[1:]
                if spec.shape == (len(environment.actions),) and spec.numpy_dtype.kind == "f"
            ),
            None,
        )
        self._overlay = Overlay(environment, self._values_output or "")
        self._writer = VideoWriter(path, fps=environment.actions_per_second, scale=1)

    @classmethod
    def of(cls, path: Path, remote: RemotePolicy, speed: int = 1) -> Self:
        """A video of the games of `remote`. Raises `UsageError` if it plays none."""
        if remote.environment is None:
            raise UsageError(f"{remote.name} plays no game, so there is nothing to film")
        note = f"{remote.name}@{remote.version} on .{remote.runtime}"
        return cls(path, remote.environment, remote.signature.outputs, note, speed)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The policy's outputs that `add` and `show` need beside the action."""
        return (self._values_output,) if self._values_output else ()

    def add(self, game: AtariGame, action: int, outputs: Arrays) -> None:
        """Film one step. `game` has taken `action` already; `outputs` are the policy's, by name."""
        if game.over or not game.steps % self._speed:
            self.show(game.screen(), score=game.score, step=game.steps, action=action, outputs=outputs)

    def show(
        self, screen: Array, *, score: float | None, step: int, action: int, outputs: Arrays, note: str | None = None
    ) -> None:
        """Film one picture, uint8[H, W, 3]. `score` is None if it is not known; `note` replaces that of the film."""
        values = outputs[self._values_output] if self._values_output else None
        note = self._note if note is None else note
        self._writer.add(self._overlay.compose(screen, score=score, step=step, action=action, values=values, note=note))

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, traceback)
