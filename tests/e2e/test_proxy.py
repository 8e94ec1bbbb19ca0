"""Behind nginx with the configuration of docs/operations.md: a prefix, kept connections, WebSockets, reloads."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import urllib3

from actserve.cli.tools import local_service as local
from actserve.client.remote_policy import RemotePolicy
from actserve.client.stream import Stream
from tests.proxy import needs_nginx, nginx
from tests.shipped import SHIPPED

REQUESTS = 1000
CLIENTS = 8
RAW = {"Content-Type": "application/octet-stream"}
SCREEN = np.zeros((210, 160, 3), np.uint8)

pytestmark = needs_nginx


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with (
        local.serve(SHIPPED, "--runtime", "onnx", "--root-path", "/robots", "--workers", "2") as service,
        nginx(
            tmp_path_factory.mktemp("nginx"),
            "operations.md",
            {"127.0.0.1:8000": service.url.removeprefix("http://")},
            prefix="/robots",
        ) as proxy,
    ):
        yield proxy


def asked(url: str, requests: int, done: threading.Event) -> Counter[int]:
    """The statuses of so many requests on kept connections. nginx may close those to its clients when it reloads."""
    statuses: Counter[int] = Counter()
    with urllib3.PoolManager(maxsize=1, timeout=60) as pool:
        while sum(statuses.values()) < requests and not done.is_set():
            try:
                answer = pool.request("POST", url + "/act", body=SCREEN.tobytes(), headers=RAW, retries=False)
                statuses[answer.status] += 1
            except urllib3.exceptions.ProtocolError:  # nginx has closed this connection: it has not passed it on
                statuses[0] += 1
    return statuses


def load(
    url: str, process: subprocess.Popen[bytes], requests: int, reload_every_s: float = 1.0
) -> tuple[Counter[int], int]:
    """The statuses of `requests` from several clients, while nginx reloads again and again; and how often it did."""
    statuses: Counter[int] = Counter()
    reloads = 0
    done = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as clients:
        asking = [clients.submit(asked, url, requests // CLIENTS, done) for _ in range(CLIENTS)]
        while not all(one.done() for one in asking):
            time.sleep(reload_every_s)
            process.send_signal(signal.SIGHUP)
            reloads += 1
        for one in asking:
            statuses += one.result()
    return statuses, reloads


def test_no_request_is_lost_behind_nginx_under_load_and_reloads(proxied: tuple[str, subprocess.Popen[bytes]]) -> None:
    statuses, reloads = load(*proxied, REQUESTS)
    assert statuses[200] + statuses[0] == REQUESTS
    assert statuses[0] <= CLIENTS * reloads < REQUESTS, "a reload closes each connection once"


def test_everything_works_below_the_prefix(proxied: tuple[str, subprocess.Popen[bytes]]) -> None:
    url, _ = proxied
    with RemotePolicy(url, "pong-lstm") as policy, policy.session() as session, Stream(url, "pong-lstm") as stream:
        for _ in range(3):
            assert session.act(SCREEN) == stream.act(SCREEN)
    for path in ("/", "/page/page.js", "/docs", "/openapi.json", "/healthz"):
        assert urllib3.request("GET", url + path).status == 200
        assert urllib3.request("HEAD", url + path).status == 200
