"""The doors of `doors.py` that are robots' wires: each gives an action, or the code and the text of an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import zmq
from websockets.sync.client import connect

from actserve import wire
from actserve.core.signature import Array
from actserve.server.protocols.robots.packed import of_gr00t, of_openpi, of_vla_eval, pack, unpack
from tests.fastpath_service import NAME
from tests.robot_clients import as_json_numpy, from_json_numpy

if TYPE_CHECKING:
    from tests.doors import Service

Given = int | tuple[str, str]


def openpi(service: Service, items: Array) -> Given:
    url = f"ws://127.0.0.1:{service.port}/"
    with connect(url, compression=None, proxy=None, additional_headers=service.headers, max_size=None) as socket:
        socket.recv(60)
        socket.send(pack({"observation": {"pixels": items[0]}}, of_openpi))
        answer = socket.recv(60)
    if isinstance(answer, bytes):
        return int(unpack(answer)["actions"][0, 0])
    code, _, text = answer.partition(": ")
    return code, text


def vla_eval(service: Service, items: Array) -> Given:
    url = f"ws://127.0.0.1:{service.port}/policies/{NAME}/vla-eval"
    with connect(url, compression=None, proxy=None, additional_headers=service.headers, max_size=None) as socket:
        socket.send(pack({"type": "observation", "seq": 1, "payload": {"pixels": items[0]}}, of_vla_eval))
        message = socket.recv(60)
    assert isinstance(message, bytes)
    answer = unpack(message)["payload"]
    return (answer["code"], answer["error"]) if "error" in answer else int(answer["actions"])


def json_numpy(service: Service, items: Array) -> Given:
    response = service.post("/act", json.dumps({"pixels": as_json_numpy(items[0])}).encode(), wire.JSON)
    if response.status == 200:
        return int(from_json_numpy(response.json()))
    error = response.json()["error"]
    return error["code"], error["message"]


def gr00t(service: Service, items: Array) -> Given:
    request = {"data": {"video.pixels": items[:1]}, **({} if service.token is None else {"api_token": service.token})}
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect(f"tcp://127.0.0.1:{service.gr00t_port}")
        socket.send(pack(request, of_gr00t))
        answer = unpack(socket.recv())
    return (answer["code"], answer["error"]) if "error" in answer else int(answer["action"][0, 0])
