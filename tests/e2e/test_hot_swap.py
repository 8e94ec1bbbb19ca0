"""Swaps of a real service under load, over real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3

from actserve.cli.tools import local_service as local
from actserve.store.local import ModelStore
from tests.benchmarks.swaps import Row, swap
from tests.variants import Variants
from tests.waiting import until


@pytest.fixture
def variants(cart_store: ModelStore, tmp_path: Path) -> Variants:
    made = Variants(cart_store.resolve("cart"), ModelStore(tmp_path / "store"))
    made.publish()
    return made


def described(http: urllib3.PoolManager, service: local.LocalService) -> Any:
    return http.request("GET", f"{service.url}/policies/cart").json()


def test_ten_swaps_under_load_fail_nobody_and_leave_nothing_behind(variants: Variants) -> None:
    rows: list[Row] = []
    environment = {**os.environ, "ACTSERVE_POLL_S": "0.05"}
    with (
        local.serve(variants.store.root, "--runtime", "onnx", environment=environment) as service,
        urllib3.PoolManager() as http,
    ):
        seen = asyncio.run(swap(variants, service, 10, connections=4, episodes=2, pause_s=0.02, report=rows.append))
        assert (seen.failures, seen.wrong) == ([], [])
        assert min(seen.answers[kind] for kind in ("request", "session", "stream")) > 40
        assert seen.outlived > 0
        assert [row.swaps for row in rows] == [10]
        until(lambda: described(http, service)["loaded"] == [11])


def test_a_body_that_is_on_its_way_while_the_version_changes_is_answered_by_the_old_one(variants: Variants) -> None:
    environment = {**os.environ, "ACTSERVE_POLL_S": "0.05"}
    body = variants.observations[0].tobytes()
    head = f"POST /act HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n"
    original = variants.episode(1)[0]
    with (
        local.serve(variants.store.root, "--runtime", "onnx", environment=environment) as service,
        urllib3.PoolManager() as http,
    ):
        address = ("127.0.0.1", urlsplit(service.url).port)
        # The lane takes the first, the routes take the second.
        waiting = [(socket.create_connection(address), extra) for extra in ("", "X-Other: 1\r\n")]
        for connection, extra in waiting:
            connection.sendall(head.encode() + extra.encode() + b"\r\n" + body[:5])
        time.sleep(1)  # until the service has read them
        assert variants.publish() == 2
        until(lambda: described(http, service)["version"] == 2)
        time.sleep(1.2)  # the lane releases versions that are no longer live
        for connection, _ in waiting:
            for version in (1, 2):
                answer = b""
                connection.sendall(body[5:] if version == 1 else head.encode() + b"\r\n" + body)
                while b"}" not in answer:
                    answer += connection.recv(1000)
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert answer.endswith(b'{"action":%d}' % variants.action(original, version))
            connection.close()
        until(lambda: described(http, service)["loaded"] == [2])
