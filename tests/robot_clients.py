"""Clients of robots' wires, in a few lines each: what the packages send, with the names that their users have."""

from __future__ import annotations

import base64
import io
import json
from abc import ABC, abstractmethod
from socket import create_connection
from typing import Any, Self

import msgpack
import numpy as np
import urllib3
import zmq
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from actserve.core.signature import Array
from actserve.server.protocols.robots.packed import of_gr00t, of_openpi, pack, unpack

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


def json_numpy(value: Any) -> Any:
    array = np.asarray(value)
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def from_json_numpy(value: Any) -> Array:
    return np.frombuffer(base64.b64decode(value["__numpy__"]), value["dtype"]).reshape(value["shape"])


class JsonNumpyClient(RobotClient):
    """The client carries the state. No Content-Type, as `requests` sends bytes."""

    twice = False

    def open(self) -> None:
        self.http = urllib3.HTTPConnectionPool("127.0.0.1", self.port, timeout=TIMEOUT_S, retries=False)
        self.state: dict[str, Any] = {}

    def close(self) -> None:
        self.http.close()

    def act(self, **values: Any) -> Array:
        observation = {f"observation/{name}": json_numpy(value) for name, value in values.items()}
        answer = self._post({**observation, **self.state})
        self.state = {"recurrent_state": answer["recurrent_state"]}
        return from_json_numpy(answer["action"])

    def reset(self) -> None:
        self.state = {}

    def garbage(self) -> None:
        self._request(b'{"__numpy__')

    def cut(self) -> None:
        head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n{"
        with create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head)

    def _post(self, document: Any) -> Any:
        text = json.dumps(document)
        answer = self._request(json.dumps({"encoded": text} if self.twice else document).encode())
        return json.loads(answer) if self.twice else answer

    def _request(self, body: bytes, **headers: str) -> Any:
        response = self.http.request("POST", "/act", body=body, headers={**self.headers, **headers})
        if response.status != 200:
            raise Refused(response.json()["error"]["message"])
        return response.json()


class TwiceJsonNumpyClient(JsonNumpyClient):
    twice = True


class JsonNumpySessionClient(JsonNumpyClient):
    """The service keeps the state. The observation is an object of its own, as GR00T's server has it."""

    def open(self) -> None:
        super().open()
        self.reset()

    def act(self, **values: Any) -> Array:
        observation = {name: json_numpy(value) for name, value in values.items()}
        body = json.dumps({"observation": observation}).encode()
        return from_json_numpy(self._request(body, **{"X-Session": self.session})["action"])

    def reset(self) -> None:
        response = self.http.request("POST", f"/policies/{self.policy}/sessions", headers=self.headers)
        if response.status != 201:
            raise Refused(response.json()["error"]["message"])
        self.session = response.json()["session"]


class Gr00tClient(RobotClient):
    """As GR00T N1.6: axes for batch and time, and `options`."""

    def open(self) -> None:
        self.context = zmq.Context()
        self.socket: Any = self.context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{self.zmq_port}")
        assert self.call("ping") == {"status": "ok", "message": "Server is running"}

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    def act(self, **values: Any) -> Array:
        observation: dict[str, Any] = {"video": {}, "state": {}}
        for name, value in values.items():
            observation["state" if name == "state" else "video"][f"observation_{name}"] = np.asarray(value)[None, None]
        actions, info = self.call("get_action", {"observation": observation, "options": None})
        assert (actions["action"].shape[0], info) == (1, {})
        chunk: Array = actions["action"][0]
        return chunk

    def reset(self) -> None:
        self.call("reset", {"options": None})

    def garbage(self) -> None:
        self._exchange(b"\xc1 is nothing in msgpack")

    def cut(self) -> None:
        self.socket.send(b"\xdf\x00")
        self.close()
        self.open()

    def call(self, endpoint: str, data: Any = None) -> Any:
        request = {"endpoint": endpoint} | ({} if data is None else {"data": data})
        if self.token is not None:
            request["api_token"] = self.token
        return self._exchange(pack(request, of_gr00t))

    def _exchange(self, message: bytes) -> Any:
        self.socket.send(message)
        answer = unpack(self.socket.recv())
        if isinstance(answer, dict) and "error" in answer:
            raise Refused(answer["error"])
        return answer


class OldGr00tClient(Gr00tClient):
    """As GR00T N1.5: flat names."""

    def act(self, **values: Any) -> Array:
        flat = {
            f"{'state' if name == 'state' else 'video'}.observation_{name}": np.asarray(value)[None]
            for name, value in values.items()
        }
        chunk: Array = self.call("get_action", flat)["action"]
        return chunk


CLIENTS: dict[str, type[RobotClient]] = {
    "openpi": OpenpiClient,
    "openpi, by name": NamedOpenpiClient,
    "RoboArena": RoboArenaClient,
    "BEHAVIOR": BehaviorClient,
    "vla-eval": VlaEvalClient,
    "json-numpy": JsonNumpyClient,
    "json-numpy, twice": TwiceJsonNumpyClient,
    "json-numpy, session": JsonNumpySessionClient,
    "GR00T": Gr00tClient,
    "GR00T N1.5": OldGr00tClient,
}
