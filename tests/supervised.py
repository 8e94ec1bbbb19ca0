"""A supervised service of a few lines, as a process of its own: `python -m tests.supervised PORT COUNT [OPTION...]`.

Each worker answers a connection with its pid and how it began. It crashes, exits or hangs when it is told to.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

from actserve.server.processes import supervisor
from actserve.server.processes.address import Address
from actserve.server.processes.supervisor import Start, Supervisor


def work(listener: socket.socket, start: Start) -> None:
    """Until it is told to end, or the supervisor has gone."""
    if "unable" in sys.argv:
        sys.exit(7)
    told = False

    def tell(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True

    signal.signal(signal.SIGTERM, tell)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(start.lifeline_fd, selectors.EVENT_READ)
        while not told:
            os.write(start.heartbeat_fd, b".")
            for key, _ in selector.select(0.05):
                if key.fd == start.lifeline_fd:
                    return
                listener.setblocking(False)
                try:
                    client, _ = listener.accept()
                except BlockingIOError:
                    continue
                with client:
                    answer(client, start)
    if "stubborn" in sys.argv:
        time.sleep(60)


def answer(client: socket.socket, start: Start) -> None:
    client.setblocking(True)
    command = client.recv(10).decode()
    if command == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if command == "exit":
        os._exit(3)
    if command == "hang":
        time.sleep(60)
    told = {"pid": os.getpid(), "replaces": start.replaces, "delay_s": start.delay_s, "reason": start.reason}
    client.sendall(json.dumps(told).encode())


def refuse_some_processes_and_sockets(count: int) -> None:
    """Every second process, and after the first `count` every second socket, is refused, as under a limit."""
    fork, listen_again, forks, sockets = os.fork, Address.listen_again, itertools.count(), itertools.count()

    def fork_sometimes() -> int:
        if next(forks) % 2 == 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    def listen_again_sometimes(address: Address) -> socket.socket:
        if (number := next(sockets)) >= count and (number - count) % 2 == 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return listen_again(address)

    vars(os)["fork"] = fork_sometimes
    # Replaced in this process alone, which mypy forbids for methods.
    Address.listen_again = listen_again_sometimes  # type: ignore[method-assign, assignment]


def look_late() -> None:
    """The supervisor's first look at its workers comes when one has run and ended."""
    wait, looks = Supervisor._wait, itertools.count()

    def wait_late(self: Supervisor) -> None:
        if next(looks):
            wait(self)
        else:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)

    Supervisor._wait = wait_late  # type: ignore[method-assign]


def main(port: int, count: int) -> int:
    logging.basicConfig(level=logging.INFO)
    hurried: dict[str, Any] = {"DRAIN_S": 1.0} | ({"HANG_S": 1.0} if "hasty" in sys.argv else {})
    vars(supervisor).update(hurried)
    if "scarce" in sys.argv:
        refuse_some_processes_and_sockets(count)
    if "late" in sys.argv:
        look_late()
    return Supervisor(Address("127.0.0.1", port), count, work).run()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
