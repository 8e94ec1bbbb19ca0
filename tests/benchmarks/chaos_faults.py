"""The faults of the chaos benchmark. Each is a context manager: the fault has ended when its block ends."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import urllib3

from actserve.cli.tools.local_service import free_port
from actserve.store.local import ModelStore
from tests.publishing import republish
from tests.waiting import until

TURN_S = 0.05  # of the throttle
READY_S = 60.0


class Service:
    """`actserve serve` with two workers, which is started again when it has ended, as an init system does."""

    def __init__(self, store: Path, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.sessions = folder / "sessions.sqlite"
        self.port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"

    def start(self) -> None:
        command = [sys.executable, "-m", "actserve", "serve", "--store", str(self.store), "--workers", "2"]
        command += ["--port", str(self.port), "--grpc-port", str(self.grpc_port), "--runtime", "onnx"]
        settings = {"ACTSERVE_SESSIONS": str(self.sessions), "ACTSERVE_POLL_S": "0.5", "ACTSERVE_MAX_WAIT_MS": "60000"}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **settings})
        until(self.is_ready, READY_S)

    def stop(self) -> int:
        """The exit code."""
        self._process.terminate()
        return self._process.wait(60)

    def is_ready(self) -> bool:
        try:
            return urllib3.request("GET", self.url + "/readyz", timeout=1, retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    @property
    def supervisor(self) -> int:
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.supervisor}/task/{self.supervisor}/children").read_text()
        return [int(pid) for pid in children.split()]

    def memory_mb(self) -> float:
        """Resident, of all workers."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.workers]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def files(self) -> int:
        """Open, of all workers."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.workers)


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def kill_worker(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    send([chance.choice(service.workers)], signal.SIGKILL)
    yield


@contextmanager
def stop_worker(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    stopped = [chance.choice(service.workers)]
    send(stopped, signal.SIGSTOP)
    time.sleep(lasts_s)
    send(stopped, signal.SIGCONT)
    yield


@contextmanager
def stop_all(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    stopped = [service.supervisor, *service.workers]
    send(stopped, signal.SIGSTOP)
    time.sleep(lasts_s)
    send(stopped, signal.SIGCONT)
    yield
    workers = service.workers  # one more may have begun meanwhile
    assert set(stopped[1:]) <= set(workers), f"a pause is not a death: {stopped[1:]} before, {workers} now"


@contextmanager
def kill_supervisor(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    workers = service.workers
    send([service.supervisor], signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    service.start()
    yield


@contextmanager
def fill_disk(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    """No file may grow, as on a disk that is full."""
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in service.workers}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    time.sleep(lasts_s)
    for pid, limit in limits.items():
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    yield


@contextmanager
def take_store_away(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    away = service.store.rename(service.store.with_name("away"))
    time.sleep(lasts_s)
    away.rename(service.store)
    yield


@contextmanager
def swap_version(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    store = ModelStore(service.store)
    name = chance.choice(["pong", "pong-lstm"])
    version = republish(store.resolve(name), store).manifest.version
    yield
    described = f"{service.url}/policies/{name}"
    until(lambda: urllib3.request("GET", described, timeout=10).json()["version"] == version, READY_S)


@contextmanager
def lock_sessions(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    """Another process holds the lock of the sessions file, and does not run."""
    lock = sqlite3.connect(service.sessions, isolation_level=None, timeout=10)
    lock.execute("BEGIN IMMEDIATE")
    time.sleep(lasts_s)
    lock.close()
    yield


@contextmanager
def throttle(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    """The workers run a fifth of the time."""
    workers, end_s = service.workers, time.monotonic() + lasts_s
    while time.monotonic() < end_s:
        send(workers, signal.SIGSTOP)
        time.sleep(0.8 * TURN_S)
        send(workers, signal.SIGCONT)
        time.sleep(0.2 * TURN_S)
    yield


@contextmanager
def flood(service: Service, chance: random.Random, lasts_s: float) -> Iterator[None]:
    """Connections with half a request each: of a head, of a screen, of a large body, of JSON."""
    head = b"POST /policies/pong/act HTTP/1.1\r\nHost: h\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    halves = [
        b"POST /act HTTP/1.1\r\nHost: h\r\nContent-",
        head % (b"application/octet-stream", 100_800) + bytes(50_000),
        head % (b"application/octet-stream", 32 * 100_800) + bytes(1000),
        head % (b"application/json", 1_000_000) + b'{"pixels": [' + b"1," * 5000,
    ]
    with ExitStack() as stack:
        for _ in range(200):
            with suppress(OSError):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=5))
                connection.sendall(chance.choice(halves))
        time.sleep(lasts_s)
    yield


Fault = Callable[[Service, random.Random, float], object]
FAULTS: dict[str, Callable[..., object]] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        *(kill_worker, stop_worker, stop_all, kill_supervisor, fill_disk),
        *(take_store_away, swap_version, lock_sessions, throttle, flood),
    )
}
