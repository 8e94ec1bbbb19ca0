"""A video of games played through a service: the screen, and beside it the score and the policy's actions."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from actserve.atari.emulator import AtariGame
from actserve.atari.overlay import Overlay
from actserve.atari.video import VideoWriter
from actserve.client.remote_policy import RemotePolicy
from actserve.core.errors import UsageError
from actserve.core.signature import Arrays


class Film:
    """A video of the games of `remote` that shows every `speed`-th step. A context manager, like `VideoWriter`."""

    def __init__(self, path: Path, remote: RemotePolicy, speed: int = 1) -> None:
        environment = remote.environment
        if environment is None:
            raise UsageError(f"{remote.name} plays no game, so there is nothing to film")
        self._speed = speed
        self._note = f"{remote.name}@{remote.version} on .{remote.runtime}"
        # The output with one number per action, such as action values or logits, if the policy has one.
        self._values_output = next(
            (
                spec.name
                for spec in remote.signature.outputs[1:]
                if spec.shape == (len(environment.actions),) and spec.numpy_dtype.kind == "f"
            ),
            None,
        )
        self._overlay = Overlay(environment, self._values_output or "")
        self._writer = VideoWriter(path, fps=environment.actions_per_second, scale=1)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The policy's outputs that `add` needs beside the action."""
        return (self._values_output,) if self._values_output else ()

    def add(self, game: AtariGame, action: int, outputs: Arrays) -> None:
        """Film one step. `game` has taken `action` already; `outputs` are the policy's, by name."""
        if game.steps % self._speed and not game.over:
            return
        values = outputs[self._values_output] if self._values_output else None
        self._writer.add(
            self._overlay.compose(
                game.screen(), score=game.score, step=game.steps, action=action, values=values, note=self._note
            )
        )

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, traceback)
