"""A worker whose policy can no longer act says so and is replaced: no request waits for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import urllib3

from actserve.cli.tools.local_service import free_port
from tests.shipped import SHIPPED
from tests.waiting import until

# The service, in which the bookkeeping of a batcher fails once, as soon as the file in the first argument exists.
SCRIPT = """
import sys
from pathlib import Path
from actserve.engine.batcher import Batcher
flag, go_on = Path(sys.argv.pop(1)), Batcher._go_on
def fail_once(self):
    if flag.exists():
        flag.unlink()
        raise MemoryError
    go_on(self)
Batcher._go_on = fail_once
from actserve.cli.main import main
main()
"""
RAW = {"Content-Type": "application/octet-stream"}


def test_a_worker_whose_policy_has_failed_is_replaced(tmp_path: Path) -> None:
    flag, port = tmp_path / "flag", free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", SCRIPT, str(flag), "serve", "--store", str(SHIPPED), "--port", str(port)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            until(lambda: status(url + "/readyz") == 200)
            (before,) = workers(process.pid)
            flag.touch()
            act(url)
            until(lambda: before not in workers(process.pid))
            until(lambda: status(url + "/readyz") == 200 and len(workers(process.pid)) == 1)
            assert act(url) == 200
        finally:
            process.terminate()
    said = (tmp_path / "log").read_text()
    assert "a policy can no longer be served by this worker" in said
    assert "ended by itself, with exit code 70" in said


def status(url: str) -> int:
    try:
        return urllib3.request("GET", url, timeout=5, retries=False).status
    except urllib3.exceptions.HTTPError:
        return 0


def act(url: str) -> int:
    return urllib3.request("POST", url + "/act", body=bytes(100_800), headers=RAW, timeout=60, retries=False).status


def workers(supervisor: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()]
