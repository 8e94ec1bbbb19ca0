"""Other games than Pong, from training to playing through the service."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from actserve.cli.tools import local_service as local
from actserve.cli.tools import play_and_load as commands
from actserve.core.errors import UsageError
from actserve.store.local import ModelStore
from actserve_export.publish import export
from actserve_export.targets import load
from actserve_export.training.train import train


@pytest.mark.wide
@pytest.mark.parametrize(
    ("game", "height", "actions"),
    [("pacman", 250, 5), ("breakout", 210, 4), ("carnival", 214, 6)],
)
def test_any_game_can_be_trained_exported_and_played(tmp_path: Path, game: str, height: int, actions: int) -> None:
    checkpoint = train(game, out=tmp_path / "run", total_frames=128, seed=0)
    name, source = load(game, checkpoint)
    assert name == game.replace("_", "-")
    export(source, name, ModelStore(tmp_path / "store"), origin=game, runtimes=["onnx"])
    with local.serve(tmp_path / "store") as service:
        film = tmp_path / "game.gif"
        report = commands.play(
            service.url, name, console=Console(quiet=True), game=game, video=film, speed=20, max_steps=60
        )
        assert film.stat().st_size > 1000
    assert report.steps == 60
    signature = ModelStore(tmp_path / "store").resolve(name).manifest.signature
    assert signature.observations[0].shape == (height, 160, 3)
    assert signature.outputs[1].shape == (actions,)


def test_a_game_without_weights_says_how_to_get_them() -> None:
    with pytest.raises(UsageError, match="no weights of breakout ship: train it"):
        load("breakout")
