"""The whole service, with the policies that ship, on a real uvicorn in a thread: for the tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from actserve.core.settings import Settings
from actserve.server.app import create_app
from actserve.server.arcade.game import GameSlots
from tests.serving import port_of, serving
from tests.shipped import SHIPPED
from tests.waiting import until


@dataclass(frozen=True)
class Service:
    address: str  # host:port
    app: FastAPI
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def game_slots(self) -> GameSlots:
        game_slots: GameSlots = self.app.state.game_slots
        return game_slots


@contextmanager
def running(
    max_games: int = 4,
    session_idle_s: float = 600,
    store: Path = SHIPPED,
    tokens: Path | None = None,
    bundles: Path | None = None,
) -> Iterator[Service]:
    options = {"max_games": max_games, "session_idle_s": session_idle_s, "tokens": tokens, "bundles": bundles}
    app = create_app(Settings.model_validate({"store": store, "runtime": "onnx", **options}))
    with serving(app) as server:
        until(lambda: app.state.registry.not_ready() is None)
        yield Service(f"127.0.0.1:{port_of(server)}", app, server)
