"""Runs a service in a child process during a `with` block: for the demo, the benchmarks and the tests."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3

from actserve.core.errors import ServiceUnreachable


@dataclass(frozen=True)
class LocalService:
    url: str
    pid: int  # process id of the supervisor

    @property
    def workers(self) -> list[int]:
        """The workers' process ids."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


@contextmanager
def serve(
    store: Path | str,
    *options: str,
    environment: Mapping[str, str] | None = None,
    ready_within_s: float = 300.0,
    port: int | None = None,
) -> Iterator[LocalService]:
    """Run `actserve serve` on 127.0.0.1 until the block ends. Enters the block once it is ready.

    `options` are further command-line arguments; `environment` replaces the inherited one; `port` None takes a free
    port. Raises `ServiceUnreachable` with the end of the log if the service does not become ready.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "actserve", "serve", "--store", str(store), "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            if not _wait_until_ready(process, url, ready_within_s):
                log.seek(0)
                raise ServiceUnreachable(
                    f"the service did not become ready:\n{log.read().decode(errors='replace')[-2000:]}"
                )
            yield LocalService(url, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(35)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    with urllib3.PoolManager(retries=False) as http:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if http.request("GET", f"{url}/readyz").status == 200:
                    return True
            except urllib3.exceptions.HTTPError:
                pass
            time.sleep(0.01)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
