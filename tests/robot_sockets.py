"""Clients of the robots' wires that are WebSockets, and the interface of all clients of robots."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from typing import Any, Self

import msgpack
import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from actserve.core.signature import Array
from actserve.server.protocols.robots.packed import of_openpi, pack, unpack

TIMEOUT_S = 60.0


class Refused(Exception):
    """What the client is told."""


class RobotClient(ABC):
    """One client of the service on `port`. `act` takes `image`, `wrist_image` and `state`, and gives the chunk.

    Raises `Refused` for an error of the service.
    """

    policy = "robot"

    def __init__(self, port: int, zmq_port: int, token: str | None = None) -> None:
        self.port, self.zmq_port, self.token = port, zmq_port, token

    def __enter__(self) -> Self:
        try:
            self.open()
        except InvalidStatus as error:
            raise Refused(error.response.body.decode()) from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @abstractmethod
    def open(self) -> None:
        """Connect."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""

    @abstractmethod
    def act(self, **values: Any) -> Array:
        """(HORIZON, DIM)."""

    @abstractmethod
    def reset(self) -> None:
        """Begin an episode."""

    @abstractmethod
    def garbage(self) -> None:
        """Send what is no message. Raises `Refused`."""

    @abstractmethod
    def cut(self) -> None:
        """Send half a message, and disconnect without a word."""


class SocketClient(RobotClient):
    path = "/"

    def open(self) -> None:
        self.held = connect(
            f"ws://127.0.0.1:{self.port}{self.path}",
            compression=None,
            max_size=None,
            proxy=None,
            additional_headers=self.headers,
        )
        self.socket = self.held.__enter__()

    def close(self) -> None:
        self.held.__exit__(None, None, None)

    def garbage(self) -> None:
        self.receive(b"\xc1 is nothing in msgpack")

    def cut(self) -> None:
        self.socket.socket.sendall(b"\x82\xfe\x40\x00\x00\x00\x00\x00half of it")
        self.socket.socket.close()

    def receive(self, message: bytes) -> Any:
        self.socket.send(message)
        try:
            answer = self.socket.recv(TIMEOUT_S)
        except ConnectionClosed as error:
            raise Refused(str(error)) from None
        if isinstance(answer, str):
            raise Refused(answer)
        return unpack(answer)


class OpenpiClient(SocketClient):
    @property
    def headers(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Api-Key {self.token}"}

    begins = False

    def open(self) -> None:
        super().open()
        greeting = self.socket.recv(TIMEOUT_S)
        assert isinstance(greeting, bytes)
        self.metadata = unpack(greeting)

    def act(self, **values: Any) -> Array:
        observation = {f"observation/{name}": value for name, value in values.items()}
        if self.begins:
            observation["is_init"], self.begins = np.array(True), False
        answer = self.receive(pack(observation, of_openpi))
        assert answer["server_timing"]["infer_ms"] > 0
        actions: Array = answer["actions"]
        return actions

    def reset(self) -> None:
        self.begins = True


class NamedOpenpiClient(OpenpiClient):
    path = "/policies/robot/openpi"

    def act(self, **values: Any) -> Array:
        """Nested names, as LeRobot has them, and a batch of one."""
        observation = {"observation": {name: np.asarray(value)[None] for name, value in values.items()}}
        actions: Array = self.receive(pack(observation | self._begin(), of_openpi))["actions"]
        return actions

    def _begin(self) -> dict[str, Any]:
        begins, self.begins = self.begins, False
        return {"is_init": True} if begins else {}


class RoboArenaClient(OpenpiClient):
    def act(self, **values: Any) -> Array:
        observation = {f"observation/{name}": value for name, value in values.items()}
        actions: Array = self.receive(pack({**observation, "endpoint": "infer"}, of_openpi))
        return actions

    def reset(self) -> None:
        self.socket.send(pack({"endpoint": "reset"}, of_openpi))
        assert self.socket.recv(TIMEOUT_S) == "reset successful"


class BehaviorClient(OpenpiClient):
    def act(self, **values: Any) -> Array:
        observation = {f"robot.observation.{name}": value for name, value in values.items()}
        action: Array = self.receive(pack(observation, of_openpi))["action"]
        return action

    def reset(self) -> None:
        self.socket.send(pack({"reset": True}, of_openpi))


class VlaEvalClient(SocketClient):
    path = "/vla-eval"
    seq = 0

    @property
    def headers(self) -> dict[str, str]:
        """As a URL with a password gives it."""
        secret = base64.b64encode(f"robot:{self.token}".encode()).decode()
        return {} if self.token is None else {"Authorization": f"Basic {secret}"}

    def open(self) -> None:
        super().open()
        assert self._exchange("hello", {"harness_version": "0.8.0", "protocol_version": 1})["protocol_version"] == 1
        self.reset()

    def act(self, **values: Any) -> Array:
        """Images are PNG."""
        images = {f"observation/{name}": _png(v) for name, v in values.items() if name != "state"}
        rest = {"state": _vla(np.asarray(values["state"]))} if "state" in values else {}
        actions: Array = self._exchange("observation", {"images": images, **rest})["actions"]
        return actions

    def reset(self) -> None:
        self._send("episode_end", {})
        self._send("episode_start", {"name": "task"})

    def garbage(self) -> None:
        answer = self.receive(b"\xc1 is nothing in msgpack")
        raise Refused(answer["payload"]["error"])

    def _send(self, kind: str, payload: Any) -> bytes:
        self.seq += 1
        message: bytes = msgpack.packb({"type": kind, "payload": payload, "seq": self.seq, "timestamp": 1.0})
        if kind.startswith("episode"):
            self.socket.send(message)
        return message

    def _exchange(self, kind: str, payload: Any) -> Any:
        answer = self.receive(self._send(kind, payload))
        if answer["type"] == "error":
            raise Refused(answer["payload"]["error"])
        assert (answer["type"], answer["seq"]) == ("action" if kind == "observation" else kind, self.seq)
        return answer["payload"]


def _png(value: Any) -> Any:
    file = io.BytesIO()
    Image.fromarray(value).save(file, "PNG")
    return {"__image__": True, "format": "png", "data": file.getvalue(), "shape": list(value.shape)}


def _vla(array: Array) -> Any:
    return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}
