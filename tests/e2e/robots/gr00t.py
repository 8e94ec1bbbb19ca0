"""A client of GR00T's form, which has no package: a ZeroMQ REQ socket, msgpack, arrays as .npy."""

from __future__ import annotations

import io
from typing import Any

import msgpack
import numpy as np
import zmq

from tests.e2e.robots.episode import main


def packed(value: Any) -> Any:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def unpacked(found: Any) -> Any:
    return np.load(io.BytesIO(found["as_npy"]), allow_pickle=False) if "__ndarray_class__" in found else found


class Gr00t:
    def __init__(self, port: int, token: str) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.REQ)
        self._socket.setsockopt(zmq.RCVTIMEO, 60_000)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._token = token

    def act(self, observation: dict[str, Any]) -> Any:
        cameras = {f"observation_{name}": v[None, None] for name, v in observation.items() if name != "state"}
        seen = {"video": cameras, "language": {"prompt": [["pick up the cup"]]}}
        if "state" in observation:
            seen["state"] = {"observation_state": observation["state"][None, None]}
        data = {"observation": seen, "options": None}
        request = {"endpoint": "get_action", "data": data, "api_token": self._token}
        self._socket.send(msgpack.packb(request, default=packed))
        answer = msgpack.unpackb(self._socket.recv(), object_hook=unpacked)
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        actions, _ = answer
        return actions["action"][0]

    def close(self) -> None:
        self._socket.close()


if __name__ == "__main__":
    main(Gr00t)
