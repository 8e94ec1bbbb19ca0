"""Tensors in shared memory, as `tritonclient.utils.shared_memory` registers it, and who may register."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import urllib3
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from actserve.core.settings import Settings
from actserve.server.access.tokens import add_token
from actserve.server.protocols.oip.fast_infer import INFER
from actserve.server.regions import FOLDER
from tests import stream_service
from tests.fake_policy import NAME, Alone, seen
from tests.serving import port_of
from tests.stream_service import Service

REGISTER = "/v2/systemsharedmemory/region/r/register"
INT64 = 8


@dataclass(frozen=True)
class Guarded:
    """A service that needs a token, and two of them."""

    service: Service
    headers: dict[str, str]
    others: dict[str, str]

    def client(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.service.url.removeprefix("http://"))

    def post(self, path: str, document: object, **headers: str) -> tuple[int, str]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = urllib3.request("POST", self.service.url + path, json=document, headers={**self.headers, **named})
        return answer.status, answer.data.decode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    robot, other = (f"Bearer {add_token(file, name)}" for name in ("robot", "other"))
    with stream_service.running(Settings(tokens=file)) as service:
        yield Guarded(service, {"Authorization": robot}, {"Authorization": other})


@contextmanager
def shared(size_bytes: int) -> Iterator[tuple[Any, str]]:
    """A new object, and its key."""
    key = f"actserve-test-{secrets.token_hex(6)}"
    handle = shm.create_shared_memory_region("test", key, size_bytes)
    try:
        yield handle, key
    finally:
        shm.destroy_shared_memory_region(handle)


def inputs(region: str, offset: int = 0, items: int = 1) -> list[triton.InferInput]:
    given = triton.InferInput("x", [items], "INT64")
    given.set_shared_memory(region, INT64 * items, offset)
    return [given]


def outputs(region: str, offset: int, items: int = 1) -> list[triton.InferRequestedOutput]:
    wanted = triton.InferRequestedOutput("action")
    wanted.set_shared_memory(region, INT64 * items, offset)
    return [wanted]


def test_tritons_client_sends_and_takes_tensors_in_shared_memory(guarded: Guarded) -> None:
    before = guarded.service.registry.counts.tally(NAME, "fastpath", INFER).answered
    with shared(64) as (handle, key), guarded.client() as client:
        client.register_system_shared_memory("frames", key, 48, offset=16, headers=guarded.headers)
        (told,) = client.get_system_shared_memory_status(headers=guarded.headers)
        assert told == {"name": "frames", "key": key, "offset": 16, "byte_size": 48}
        for x in (3, 500, 999):
            shm.set_shared_memory_region(handle, [np.array([x], np.int64)], 16 + 8)
            answer = client.infer(NAME, inputs("frames", 8), outputs=outputs("frames", 24), headers=guarded.headers)
            action = shm.get_contents_as_numpy(handle, np.int64, [1], 16 + 24)
            assert action == Alone(1, 0, None).take(seen(x))["action"]
            assert answer.get_output("action")["parameters"] == {
                "shared_memory_region": "frames", "shared_memory_offset": 24, "shared_memory_byte_size": 8,
            }  # fmt: skip
        assert guarded.service.registry.counts.tally(NAME, "fastpath", INFER).answered == before + 3
        client.unregister_system_shared_memory("frames", headers=guarded.headers)
        assert client.get_system_shared_memory_status(headers=guarded.headers) == []
        with pytest.raises(InferenceServerException, match="no shared memory region 'frames' is registered"):
            client.infer(NAME, inputs("frames", 8), headers=guarded.headers)


def test_on_the_routes_it_is_the_same(guarded: Guarded) -> None:
    with shared(64) as (handle, key), guarded.client() as client:
        client.register_system_shared_memory("batch", key, 64, headers=guarded.headers)
        shm.set_shared_memory_region(handle, [np.array([3, 500], np.int64)])
        client.infer(  # a batch with state is answered by a route
            NAME, inputs("batch", items=2), outputs=outputs("batch", 32, 2), headers=guarded.headers
        )
        expected = [int(Alone(1, 0, None).take(seen(x))["action"][0]) for x in (3, 500)]
        assert shm.get_contents_as_numpy(handle, np.int64, [2], 32).tolist() == expected
        client.unregister_system_shared_memory(headers=guarded.headers)


def test_nothing_outside_of_a_region_is_read_or_written(guarded: Guarded) -> None:
    with shared(64) as (handle, key), guarded.client() as client:
        client.register_system_shared_memory("part", key, 16, offset=16, headers=guarded.headers)
        refused = {
            "expected bytes within 0 to 16; got 16 to 24": (inputs("part", 16), None),
            "expected bytes within 0 to 16; got 12 to 20": (inputs("part", 12), None),
            "expected bytes within 0 to 16; got 9 to 17": (inputs("part"), outputs("part", 9)),
        }
        before = bytes(handle._mpsm_handle.buf)
        for message, (given, wanted) in refused.items():
            with pytest.raises(InferenceServerException, match=message):
                client.infer(NAME, given, outputs=wanted, headers=guarded.headers)
        assert bytes(handle._mpsm_handle.buf) == before
        os.truncate(FOLDER / key, 20)  # a client that breaks its promise
        for given, wanted in ((inputs("part"), None), (inputs("part"), outputs("part", 8))):
            with pytest.raises(InferenceServerException, match="the object has become shorter"):
                client.infer(NAME, given, outputs=wanted, headers=guarded.headers)
        os.truncate(FOLDER / key, 64)
        client.infer(NAME, inputs("part"), headers=guarded.headers)
        client.unregister_system_shared_memory("part", headers=guarded.headers)


def test_only_a_client_of_this_host_and_user_registers(guarded: Guarded) -> None:
    with shared(64) as (_, key):
        document = {"key": key, "offset": 0, "byte_size": 64}
        for name in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
            status, text = guarded.post(REGISTER, document, **{name: "127.0.0.1"})
            assert (status, "got a request that a proxy has passed on" in text) == (403, True)
        assert guarded.post(REGISTER, document, Authorization="Bearer no")[0] == 401
        with stream_service.running() as open_to_all:
            answer = urllib3.request("POST", open_to_all.url + REGISTER, json=document)
            assert answer.status == 403
            assert (
                answer.json()["error"] == "expected a client on the Unix socket, or one with a token; got one without"
            )


def test_a_refused_request_costs_no_connection(tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens", "hasty", rate=4)
    headers = {"Authorization": f"Bearer {token}"}
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    given = {"name": "x", "datatype": "INT64", "shape": [1], "parameters": place}
    with stream_service.running(Settings(tokens=tmp_path / "tokens")) as service, shared(64) as (_, key):
        pool = urllib3.HTTPConnectionPool("127.0.0.1", port_of(service.server), maxsize=1, retries=False)
        document = {"key": key, "offset": 0, "byte_size": 64}
        assert pool.request("POST", REGISTER, json=document, headers=headers).status == 200
        path = f"/v2/models/{NAME}/infer"
        found = [pool.request("POST", path, json={"inputs": [given]}, headers=headers).status for _ in range(8)]
        assert (found[0], found[-1], set(found)) == (200, 429, {200, 429})
        assert pool.num_connections == 1
        pool.close()


def test_names_belong_to_a_token(guarded: Guarded) -> None:
    with shared(64) as (_, key), guarded.client() as client:
        client.register_system_shared_memory("mine", key, 64, headers=guarded.headers)
        assert client.get_system_shared_memory_status(headers=guarded.others) == []
        with pytest.raises(InferenceServerException, match="no shared memory region 'mine'"):
            client.infer(NAME, inputs("mine"), headers=guarded.others)
        client.unregister_system_shared_memory("mine", headers=guarded.others)
        with pytest.raises(InferenceServerException, match="'mine' is registered; unregister it first"):
            client.register_system_shared_memory("mine", key, 64, headers=guarded.headers)
        client.unregister_system_shared_memory("mine", headers=guarded.headers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": "../etc/passwd"}, "without folders"),
        ({"key": ".."}, "without folders"),
        ({"key": ""}, "without folders"),
        ({"key": "no-such-object"}, "cannot be opened: No such file"),
        ({"byte_size": 65}, "expected bytes within 0 to 64; got 0 to 65"),
        ({"offset": 64, "byte_size": 1}, "expected bytes within 0 to 64; got 64 to 65"),
        ({"byte_size": 0}, "expected bytes within 0 to 64"),
        ({"byte_size": -1}, "expected {"),
        ({"byte_size": True}, "expected {"),
        ({"offset": 1.5}, "expected {"),
        ({"key": 5}, "expected {"),
    ],
)
def test_what_cannot_be_registered(guarded: Guarded, fields: dict[str, object], message: str) -> None:
    with shared(64) as (_, key):
        status, text = guarded.post(REGISTER, {"key": key, "offset": 0, "byte_size": 64} | fields)
        assert (status, message in json.loads(text)["error"]) == (400, True), text


def test_a_link_is_not_followed(guarded: Guarded, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    link = FOLDER / f"actserve-test-{secrets.token_hex(6)}"
    link.symlink_to(secret)
    try:
        status, text = guarded.post(REGISTER, {"key": link.name, "offset": 0, "byte_size": 64})
        assert (status, "cannot be opened" in text) == (400, True)
    finally:
        link.unlink()


def test_over_the_unix_socket_no_token_is_needed(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with stream_service.running(uds=path), shared(64) as (_, key):
        pool = _UnixPool(path)
        body = json.dumps({"key": key, "offset": 0, "byte_size": 64}).encode()
        assert pool.urlopen("POST", REGISTER, body=body, headers={"Host": "here"}).status == 200
        status = pool.urlopen("GET", "/v2/systemsharedmemory/status", headers={"Host": "here"}).json()
        assert status == [{"name": "r", "key": key, "offset": 0, "byte_size": 64}]


class _UnixConnection(urllib3.connection.HTTPConnection):
    path = ""

    def connect(self) -> None:
        import socket

        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


class _UnixPool(urllib3.HTTPConnectionPool):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self.ConnectionCls = type("Connection", (_UnixConnection,), {"path": path})
