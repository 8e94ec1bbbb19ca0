"""positronic-wire: its wire of RoboArena. It carries bytes; what they are is RoboArena's form of msgpack."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
from positronic_wire.registry import client_wire
from positronic_wire.roboarena import RoboarenaAddress

from tests.e2e.robots.episode import main

TIMEOUT_S = 60.0


def packed(value: Any) -> Any:
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def unpacked(found: Any) -> Any:
    return np.frombuffer(found[b"data"], found[b"dtype"]).reshape(found[b"shape"]) if b"data" in found else found


class Positronic:
    def __init__(self, port: int, token: str) -> None:
        address = RoboarenaAddress("127.0.0.1", port)
        headers = {"Authorization": f"Bearer {token}"}
        self._connection = client_wire("roboarena").dial(address, headers, TIMEOUT_S)
        self._connection.recv(TIMEOUT_S)

    def act(self, observation: dict[str, Any]) -> Any:
        named = {f"observation/{name}": value for name, value in observation.items()}
        request = {**named, "prompt": "pick up the cup", "endpoint": "infer"}
        self._connection.send(msgpack.packb(request, default=packed))
        return msgpack.unpackb(self._connection.recv(TIMEOUT_S), object_hook=unpacked)

    def close(self) -> None:
        self._connection.close()


if __name__ == "__main__":
    main(Positronic)
