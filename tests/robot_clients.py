"""Clients of robots' wires, in a few lines each: what the packages send, with the names that their users have."""

from __future__ import annotations

import base64
import json
from socket import create_connection
from typing import Any

import numpy as np
import urllib3
import zmq

from actserve.core.signature import Array
from actserve.server.protocols.robots.packed import of_gr00t, pack, unpack
from tests.robot_sockets import (
    TIMEOUT_S,
    BehaviorClient,
    NamedOpenpiClient,
    OpenpiClient,
    Refused,
    RoboArenaClient,
    RobotClient,
    VlaEvalClient,
)


def as_json_numpy(value: Any) -> Any:
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
        observation = {f"observation/{name}": as_json_numpy(value) for name, value in values.items()}
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
        observation = {name: as_json_numpy(value) for name, value in values.items()}
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
