"""Workers that die, and a service that ends, while clients ask."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from actserve.cli.tools import local_service as local
from actserve.cli.tools.local_service import LocalService
from actserve.client.remote_policy import RemotePolicy
from actserve.core.errors import ServiceError, ServiceUnreachable
from actserve.core.signature import Array
from actserve.store.local import ModelStore
from tests import policies
from tests.exported import made_once
from tests.shipped import SHIPPED
from tests.waiting import until

RAW = {"Content-Type": "application/octet-stream"}
CLIENTS = 8


class Client(threading.Thread):
    """Asks on and on over one connection, and over a new one when that is gone."""

    def __init__(self, service: LocalService, screens: Array) -> None:
        super().__init__()
        self.answers: Counter[str] = Counter()  # by status, or the name of the exception
        self.longest_s = 0.0
        self.pause = threading.Event()
        self._address = urlsplit(service.url)
        self._screens = screens
        self._ended = threading.Event()

    def run(self) -> None:
        connection = self._connect()
        index = 0
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                connection.request("POST", "/policies/pong/act", self._screens[index % 16].tobytes(), RAW)
                response = connection.getresponse()
                response.read()
                self.answers[str(response.status)] += 1
            except (OSError, http.client.HTTPException) as error:
                self.answers[type(error).__name__] += 1
                connection.close()
                connection = self._connect()
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            index += 1
        connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        assert self._address.hostname
        return http.client.HTTPConnection(self._address.hostname, self._address.port, timeout=120)

    def end(self) -> None:
        self._ended.set()
        self.join()


@contextmanager
def asking(service: LocalService, screens: Array) -> Iterator[list[Client]]:
    clients = [Client(service, screens) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.end()


def total(clients: list[Client]) -> Counter[str]:
    return sum((client.answers for client in clients), Counter())


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def both_are_ready(service: LocalService) -> bool:
    """Each worker says so; which one answers is the system's choice."""
    address = urlsplit(service.url)
    statuses = set()
    for _ in range(20):
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=120)
        connection.request("GET", "/readyz")
        statuses.add(connection.getresponse().status)
        connection.close()
    return len(service.workers) == 2 and statuses == {200}


def test_a_worker_that_is_killed_under_load_costs_only_what_it_held(screens: Array) -> None:
    with local.serve(SHIPPED, "--runtime", "onnx", "--workers", "2") as service:
        until(lambda: both_are_ready(service))
        with asking(service, screens) as clients:
            for _ in range(3):
                until(lambda: all(client.answers["200"] > 20 for client in clients))
                killed = service.workers[0]
                os.kill(killed, signal.SIGKILL)
                until(lambda: not alive(killed) and len(service.workers) == 2)  # noqa: B023
                time.sleep(0.5)
        seen = total(clients)
        lost = sum(count for what, count in seen.items() if what != "200")
        assert not any(what.isdecimal() and what != "200" for what in seen), seen
        assert 0 < lost <= 3 * CLIENTS, seen  # at most one for each connection and death
        assert max(client.longest_s for client in clients) < 60  # at once, and not by a time-out
        until(lambda: both_are_ready(service))


def test_a_service_that_is_told_to_end_answers_what_it_took_and_ends_well(screens: Array) -> None:
    store, port = str(SHIPPED), local.free_port()
    command = [sys.executable, "-m", "actserve", "serve", "--store", store, "--port", str(port), "--workers", "2"]
    with subprocess.Popen([*command, "--runtime", "onnx"], stderr=subprocess.DEVNULL) as process:
        service = LocalService(f"http://127.0.0.1:{port}", process.pid)
        until(lambda: answers(port, "/readyz"))
        workers = service.workers
        with asking(service, screens) as clients:
            until(lambda: all(client.answers["200"] > 20 for client in clients))
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        seen = total(clients)
        # A kept connection may be closed just when the next request is sent; every other end is a refusal to connect.
        closed = ("RemoteDisconnected", "ConnectionResetError", "BrokenPipeError")
        assert set(seen) <= {"200", "ConnectionRefusedError", *closed}
        assert sum(seen[what] for what in closed) <= CLIENTS, seen
    assert not any(map(alive, workers))


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_no_worker_outlives_a_supervisor_that_is_killed() -> None:
    with local.serve(SHIPPED, "--runtime", "onnx", "--workers", "2") as service:
        workers = service.workers
        os.kill(service.pid, signal.SIGKILL)
        until(lambda: not any(map(alive, workers)))


def test_a_crash_loop_is_not_ready_and_says_why() -> None:
    with local.serve(SHIPPED, "--runtime", "onnx") as service:
        port = urlsplit(service.url).port
        assert port
        for _ in range(3):
            until(lambda: answers(port, "/healthz"))
            (worker,) = service.workers
            os.kill(worker, signal.SIGSEGV)
            until(lambda: service.workers not in ([], [worker]))  # noqa: B023, it is called at once
        until(lambda: answers(port, "/healthz"))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        assert response.status == 503
        assert "ended by signal 11 (SIGSEGV), death 3 in a row" in json.loads(response.read())["error"]["message"]
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        assert (response.status, response.read()[:2]) == (200, b'{"')
        connection.close()
        until(lambda: answers(port, "/readyz"))


def test_a_port_in_use_ends_the_service_with_the_reason(capfd: pytest.CaptureFixture[str]) -> None:
    with local.serve(SHIPPED, "--runtime", "onnx") as service:
        port = str(urlsplit(service.url).port)
        command = [sys.executable, "-m", "actserve", "serve", "--store", str(SHIPPED), "--port", port]
        assert subprocess.run(command, timeout=600, check=False).returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capfd.readouterr().err


def export_fragile(store: Path) -> None:
    from torch._inductor import config

    from actserve_export.publish import export
    from actserve_export.targets import load

    source = load("tests.policies:fragile")[1]
    with config.patch(assert_indirect_indexing=False):
        export(source, "fragile", ModelStore(store), origin="tests.policies:fragile", runtimes=["pt2"])


def test_native_code_that_ends_its_process_takes_no_other_request_with_it() -> None:
    """By reading where it must not, for one observation only."""
    store = made_once("fragile", export_fragile, [Path(policies.__file__), Path(__file__)])
    with local.serve(store) as service, RemotePolicy(service.url) as remote:
        good = np.array(7, np.int64)
        assert remote.act(good) == 1
        for _ in range(2):
            (worker,) = service.workers
            with pytest.raises((ServiceUnreachable, ServiceError)):  # the client may ask its successor
                remote.act(np.array(policies.Fragile.FATAL, np.int64))
            until(lambda: service.workers not in ([], [worker]))  # noqa: B023, it is called at once
            until(lambda: answers(int(service.url.rpartition(":")[2]), "/readyz"))
            assert remote.act(good) == 1
