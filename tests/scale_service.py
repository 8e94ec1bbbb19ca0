"""The service on a Ray cluster of this machine, for the length of a `with`: `tests.ray_cluster`, as others see it.

Ray has an environment of its own, `make .venv/ray/installed`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actserve.cli.tools.local_service import free_port
from tests.benchmarks.server import stop, tree

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv" / "ray" / "bin" / "python"
SESSION_HEADER = "x-session"  # Ray's proxies find a session's home by it
ENDS_WITHIN_S = 60.0


@dataclass(frozen=True)
class Replica:
    pid: int
    home: int


@dataclass(frozen=True)
class Scaled:
    url: str
    process: subprocess.Popen[str]

    def replicas(self) -> list[Replica]:
        """The replicas that Ray lists as alive. Raises ValueError when the cluster is no more."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> list[Replica]:
        assert self.process.stdout is not None
        return [Replica(**replica) for replica in json.loads(self.process.stdout.readline())]


def environment(folder: str, haproxy: bool = False) -> dict[str, str]:
    """Ray's own files are in `folder`; it sends no statistics, and only clients with the token can join.

    `haproxy`: requests enter through HAProxy instead of Ray's own proxy.
    """
    settings = {
        "HOME": folder,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'app'}",
        "RAY_enable_metrics_collection": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SERVE_SESSION_ID_HEADER_KEY": SESSION_HEADER,
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": folder,
    }
    if haproxy:
        places = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_FILE": "state"}
        settings |= {f"RAY_SERVE_HAPROXY_{what}": f"{folder}/haproxy/{name}" for what, name in places.items()}
        settings |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{folder}/haproxy"}
    # That this host is slow is no failure: Ray waits 5 s for a new proxy, and kills it.
    patient = {f"RAY_SERVE_PROXY_{what}_CHECK_TIMEOUT_S": "120" for what in ("READY", "HEALTH")}
    return {name: value for name, value in os.environ.items() if not name.startswith("ACTSERVE_")} | settings | patient


@contextmanager
def running(nodes: Sequence[int], haproxy: bool = False, **arguments: Any) -> Iterator[Scaled]:
    """On as many nodes, each with so many CPUs. `haproxy`: see `environment`. `arguments`: of
    `actserve.server.ray.build`. Entered once it is ready; nothing is left of it in the end. Raises ValueError with the
    end of the log when it does not come up."""
    port = free_port()
    command = [str(PYTHON), "-m", "tests.ray_cluster", str(port), ",".join(map(str, nodes)), json.dumps(arguments)]
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment(folder, haproxy),
        ) as process,
    ):
        scaled = Scaled(f"http://127.0.0.1:{port}", process)
        try:
            try:
                scaled.read()
            except ValueError as error:
                log.seek(0)
                raise ValueError(f"the cluster did not come up:\n{log.read()[-3000:]}") from error
            yield scaled
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    pids = tree(process.pid)
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(ENDS_WITHIN_S)
    stop(process, pids)
