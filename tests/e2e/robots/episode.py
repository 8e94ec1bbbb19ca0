"""An episode through a robot's own client: `test_robot_clients.py` runs each module here with a Python that has it.

python -m MODULE PORT TOKEN FOLDER reads the observations in FOLDER, writes the actions there, and prints, as JSON, what
the client is told when something is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Player(Protocol):
    """A connection. `act` takes `image`, `wrist_image` and `state`, and gives the actions."""

    def act(self, observation: dict[str, Any]) -> Any: ...

    def close(self) -> None: ...


Connect = Callable[[int, str], Player]  # port, token


def main(connect: Connect) -> None:
    port, token, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    recorded = np.load(folder / "episode.npz")
    episode = [dict(zip(recorded, step, strict=True)) for step in zip(*recorded.values(), strict=True)]
    player = connect(port, token)
    np.save(folder / "actions.npy", np.stack([np.asarray(player.act(step)) for step in episode]))
    player.close()
    first = episode[0]
    told = {"token": _told(connect, port, "wrong", first)}
    for what, wrong in (
        ("shape", {**first, "image": first["image"][:-1]}),
        ("missing", {name: value for name, value in first.items() if name != "state"}),
    ):
        told[what] = _told(connect, port, token, wrong)
    print(json.dumps(told), flush=True)
    connect(port, token).act(first)
    os._exit(0)  # the connection is cut


def _told(connect: Connect, port: int, token: str, observation: dict[str, Any]) -> str:
    """What the client raises, and what the service answered to its handshake."""
    try:
        connect(port, token).act(observation)
    except Exception as error:
        causes = [cause for cause in (error, error.__cause__, error.__context__) if cause is not None]
        bodies = [getattr(getattr(cause, "response", None), "body", b"") for cause in causes]
        return " | ".join(map(str, [*causes, *bodies]))
    return "nothing"
