"""A game of the page on a runtime that the service does not otherwise run."""

from __future__ import annotations

import json
import struct

from websockets.sync.client import connect

from actserve.cli.tools import local_service as local


def played(service: local.LocalService, runtime: str) -> list[list[float]]:
    """The action values of the first steps of one game."""
    url = f"{service.url.replace('http', 'ws')}/games?policy=pong&seed=1&runtime={runtime}"
    with connect(url, compression=None, proxy=None, open_timeout=60) as ws:
        assert json.loads(ws.recv(60))["runtime"] == runtime
        values = []
        for _ in range(20):
            message = ws.recv(60)
            assert isinstance(message, bytes)
            (size,) = struct.unpack_from("<I", message)
            values.append(json.loads(message[4 : 4 + size])["values"])
        return values


def test_a_game_can_have_a_runtime_of_its_own(both: dict[str, local.LocalService]) -> None:
    onnx, pt2 = (played(both["onnx"], runtime) for runtime in ("onnx", "pt2"))
    assert len(onnx) == len(pt2) == 20
    assert all(abs(a - b) < 1e-3 for one, other in zip(onnx, pt2, strict=True) for a, b in zip(one, other, strict=True))
    assert onnx != pt2, "the same to the last bit: two engines' arithmetic is not"
