"""Worker processes, and what becomes of them: with workers of a few lines (`tests.supervised`)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from actserve.cli.tools.local_service import free_port
from actserve.core.errors import UsageError
from actserve.server.processes.address import Address
from actserve.server.processes.supervisor import MAX_DELAY_S, restart_delay_s
from tests.waiting import WITHIN_S, until


@dataclass
class Running:
    process: subprocess.Popen[str]
    port: int

    def tell(self, command: str = "") -> dict[str, Any] | None:
        """The answer of the worker that got the connection; None: the worker ended."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=WITHIN_S) as connection:
            connection.sendall(command.encode() or b"-")
            try:
                told = connection.recv(4096)
            except ConnectionResetError:
                return None
        return json.loads(told) if told else None

    @property
    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def running(count: int, *options: str, log: IO[str] | int = subprocess.PIPE) -> Iterator[Running]:
    port = free_port()
    command = [sys.executable, "-m", "tests.supervised", str(port), str(count), *options]
    with subprocess.Popen(command, stderr=log, text=True) as process:
        try:
            service = Running(process, port)
            until(lambda: process.poll() is not None or (listens(port) and len(service.workers) == count))
            yield service
        finally:
            process.kill()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_connections_are_dealt_out() -> None:
    with running(2) as service:
        seen = Counter(answered["pid"] for _ in range(200) if (answered := service.tell()) is not None)
        assert sorted(seen) == sorted(service.workers)
        assert min(seen.values()) > 50


@pytest.mark.parametrize("command", ["crash", "exit"])
def test_one_that_dies_costs_only_what_it_held_and_its_successor_begins_at_once(command: str) -> None:
    with running(2) as service:
        before = service.workers
        assert service.tell(command) is None
        answers = [service.tell() for _ in range(50)]
        assert None not in answers
        until(lambda: len(service.workers) == 2)
        (successor,) = set(service.workers) - set(before)
        until(lambda: (answered := service.tell()) is not None and answered["pid"] == successor)
        assert len(set(service.workers) & set(before)) == 1
        answers = [service.tell() for _ in range(50)]
        assert {a["replaces"] for a in answers if a is not None and a["pid"] == successor} == {True}


def test_one_that_ran_and_ended_between_two_looks_is_replaced() -> None:
    with running(1, "late") as service:
        assert service.tell("exit") is None
        answered = service.tell()
        assert answered is not None
        assert answered["replaces"]


def test_a_lone_one_that_dies_again_and_again_rests_and_says_why() -> None:
    with running(1) as service:
        first = service.tell()
        assert first is not None
        assert (first["replaces"], first["delay_s"]) == (False, 0)
        assert service.tell("crash") is None
        second = service.tell()
        assert second is not None
        assert (second["replaces"], second["delay_s"], second["reason"]) == (True, 0, "")
        for number, delay_s in ((2, 1), (3, 2)):
            assert service.tell("crash") is None
            resting = service.tell()
            assert resting is not None
            assert 0 < resting["delay_s"] <= delay_s
            assert resting["reason"].endswith(f"signal 11 (SIGSEGV), death {number} in a row")


def test_it_rests_for_twice_as_long_each_time_and_never_gives_up() -> None:
    assert [restart_delay_s(failures) for failures in (1, 2, 3, 4, 8, 5000)] == [0, 1, 2, 4, MAX_DELAY_S, MAX_DELAY_S]


def test_others_take_the_share_of_one_that_dies_again_and_again() -> None:
    with running(2) as service:
        lasting, failing = service.workers
        for _ in range(3):
            os.kill(failing, signal.SIGSEGV)
            until(lambda: not alive(failing))  # noqa: B023, it is called at once
            time.sleep(0.2)  # until the supervisor knows
            answers = [service.tell() for _ in range(20)]
            assert None not in answers
            assert lasting in {answered["pid"] for answered in answers if answered is not None}
            until(lambda: len(service.workers) == 2)
            (failing,) = set(service.workers) - {lasting}
            until(lambda: (a := service.tell()) is not None and a["pid"] == failing)  # noqa: B023


def test_one_that_hangs_is_ended() -> None:
    with running(1, "hasty") as service:
        (hanging,) = service.workers
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(b"hang")
            until(lambda: not alive(hanging))
        answered = service.tell()
        assert answered is not None
        assert answered["pid"] != hanging


def processes(service: Running) -> list[int]:
    return [service.process.pid, *service.workers]


def test_a_pause_of_all_processes_is_not_a_death() -> None:
    with running(2, "hasty") as service:
        until(lambda: _answering(service) == set(service.workers))
        supervisor, *workers = processes(service)
        for pid in (supervisor, *workers):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3)  # three times as long as a worker may be silent
        os.kill(supervisor, signal.SIGCONT)  # the supervisor runs first: no worker has sent a heartbeat
        time.sleep(0.5)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        time.sleep(1.5)
        assert service.workers == workers
        assert _answering(service) == set(workers)


def test_a_pause_of_one_worker_is_not_its_death() -> None:
    with running(2, "hasty") as service:
        until(lambda: _answering(service) == set(service.workers))
        before = service.workers
        os.kill(before[0], signal.SIGSTOP)
        time.sleep(3)
        os.kill(before[0], signal.SIGCONT)
        time.sleep(1.5)
        assert service.workers == before
        assert _answering(service) == set(before)


def test_a_process_or_a_socket_that_is_refused_is_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open(log, "w") as file, running(2, "scarce", log=file) as service:
        until(lambda: len(service.workers) == 2)
        for _ in range(3):  # the second death in a row closes the worker's socket: it must listen again
            failing = service.workers[-1]  # the youngest
            os.kill(failing, signal.SIGSEGV)
            until(lambda: failing not in service.workers)  # noqa: B023, it is called at once
            until(lambda: len(service.workers) == 2)
        assert service.tell() is not None
    said = log.read_text()
    assert "no worker can be started: Resource temporarily unavailable; the next attempt is in 1 s" in said
    assert "no worker can be started: Too many open files" in said


def test_told_to_end_it_ends_with_all_its_workers() -> None:
    with running(3) as service:
        workers = service.workers
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(WITHIN_S) == 0
        assert not any(map(alive, workers))
        assert not listens(service.port)


def _answering(service: Running) -> set[int]:
    """The pids of workers that answer."""
    return {told["pid"] for _ in range(20) if (told := service.tell()) is not None}


def test_workers_that_do_not_end_are_ended_at_the_deadline() -> None:
    with running(2, "stubborn") as service:
        workers = service.workers
        until(lambda: _answering(service) == set(workers))  # a worker that has not begun yet ends at once
        began = time.monotonic()
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(WITHIN_S) == 0
        assert 0.9 < time.monotonic() - began < 50  # they would sleep for a minute
        assert not any(map(alive, workers))


def test_no_worker_outlives_its_supervisor() -> None:
    with running(2) as service:
        workers = service.workers
        service.process.kill()
        until(lambda: not any(map(alive, workers)))
        assert not listens(service.port)


def test_what_cannot_begin_ends_the_service() -> None:
    with running(2, "unable") as service:
        assert service.process.wait(WITHIN_S) == 7


def test_a_port_that_another_service_has_is_refused() -> None:
    with running(2) as service, pytest.raises(UsageError, match=r"cannot listen on 127\.0\.0\.1:.*in use"):
        Address("127.0.0.1", service.port).listen(2)


def test_a_unix_socket_that_was_left_behind_is_taken_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    address = Address("", 0, path)
    one, other = address.listen(2)
    assert one is other
    with pytest.raises(UsageError, match="another service listens there"):
        Address("", 0, path).listen(1)
    one.close()
    address.close()
    assert not path.exists()


def test_a_file_is_not_taken_for_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"cannot listen on unix:.*in use"):
        Address("", 0, path).listen(1)
    assert path.read_text() == "mine"
