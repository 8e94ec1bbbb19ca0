"""Supervisor: keeps worker processes alive that share one address, and ends when it is told to.

    SIGTERM, SIGINT       the address is let go of, and every worker answers what it has; the deadline ends the rest
    a worker dies         its connections are reset by the system, at once; another one takes its seat
    again and again       the next one waits, twice as long each time; if no other is left, it rests: it says why it
                          cannot serve until it tries again
    a worker hangs        it is ended, when its loop has not turned for `HANG_S`
    the supervisor dies   every worker sees its lifeline end, answers what it has, and ends

Workers are forks of the supervisor, which has imported what they need and has started nothing: another one is there in
milliseconds, and what they share is in memory once. Each has a socket of its own on the port, which stays open while
its seat is empty: who connects meanwhile waits for the next one.
"""

from __future__ import annotations

import gc
import logging
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from types import FrameType

from actserve.server.processes.address import Address

log = logging.getLogger("actserve")

DRAIN_S = 35.0  # for workers that were told to end, which have 30 themselves
HANG_S = 30.0
STEADY_S = 60.0  # a worker that lived for so long did not die of what its predecessors did
MOST_S = 30.0  # between two tries
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Start:
    """How a worker begins. `lifeline` ends with the supervisor; what is written to `pulse` shows that the loop turns.

    `replaces` another one: it takes no connection before its policies are loaded. `rest_s`: how long it waits before it
    loads them, and `reason` why.
    """

    lifeline: int
    pulse: int
    replaces: bool = False
    rest_s: float = 0.0
    reason: str = ""


Work = Callable[[socket.socket, Start], None]


class Worker:
    def __init__(self, pid: int, pulse: int, rest_s: float) -> None:
        self.pid = pid
        self.pulse = pulse
        self.begun_s = self.seen_s = monotonic() + rest_s
        self.ran = False  # its loop has turned


class Seat:
    """A worker's place: its socket, and what became of those who had it."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener: socket.socket | None = listener
        self.worker: Worker | None = None
        self.begun = 0  # workers
        self.failures = 0  # in a row
        self.came_up = True  # the last one, before it died
        self.due_s = 0.0  # when the next one is to begin


class Supervisor:
    """Runs `count` workers at `address`, each of which is `work` in a process of its own."""

    def __init__(self, address: Address, count: int, work: Work) -> None:
        self._address = address
        self._work = work
        self._seats = [Seat(listener) for listener in address.listen(count)]
        self._selector = selectors.DefaultSelector()
        self._lifeline, self._alive = os.pipe()
        os.set_blocking(self._lifeline, False)
        self._told = False  # to end
        self._stopping_s = 0.0  # since when; 0: no
        self._reason = ""
        self._code = 0

    def run(self) -> int:
        """Until it is told to end: 0; or with what a worker ended with that could not begin."""
        gc.freeze()  # so that no collection of a worker's writes to what all share
        with self._signals():
            for seat in self._seats:
                self._fork(seat)
            while self._workers or not self._stopping_s:
                self._wait()
                if self._told:
                    self._stop()
                self._reap()
                self._end_hanging()
                if not self._stopping_s:
                    self._refill()
        self._address.close()
        return self._code

    @property
    def _workers(self) -> list[Worker]:
        return [seat.worker for seat in self._seats if seat.worker is not None]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        before = {number: signal.signal(number, self._tell) for number in SIGNALS}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        self._selector.register(woken, selectors.EVENT_READ)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell(self, _number: int, _frame: FrameType | None) -> None:
        self._told = True

    def _stop(self) -> None:
        if self._stopping_s:
            return
        self._stopping_s = monotonic()
        for seat in self._seats:
            if seat.listener is not None:
                seat.listener.close()  # or who connects now would wait for nobody
        for worker in self._workers:
            os.kill(worker.pid, signal.SIGTERM)

    def _wait(self) -> None:
        """For a signal, a pulse, or the next second."""
        for key, _ in self._selector.select(1.0):
            try:
                beats = os.read(key.fd, 4096)
            except BlockingIOError:
                continue
            for worker in self._workers:
                if worker.pulse == key.fd and beats:  # none: it has ended
                    worker.seen_s, worker.ran = monotonic(), True

    def _reap(self) -> None:
        for seat in self._seats:
            if seat.worker is None:
                continue
            pid, status = os.waitpid(seat.worker.pid, os.WNOHANG)
            if pid:
                worker, seat.worker = seat.worker, None
                self._selector.unregister(worker.pulse)
                os.close(worker.pulse)
                if not self._stopping_s:
                    self._mourn(seat, worker, os.waitstatus_to_exitcode(status))

    def _mourn(self, seat: Seat, worker: Worker, code: int) -> None:
        if code >= 0 and not worker.ran and seat.begun == 1:  # the service cannot be as it is wished; it has said why
            self._code = code or 1
            self._stop()
            return
        seat.failures = 1 if monotonic() - worker.begun_s > STEADY_S else seat.failures + 1
        seat.came_up = worker.ran
        wait_s = pause_s(seat.failures)
        seat.due_s = monotonic() + wait_s
        self._reason = f"worker {worker.pid} ended by {_cause(code)}, death {seat.failures} in a row"
        log.error("%s; the next one begins %s", self._reason, f"in {wait_s:g} s" if wait_s else "at once")
        if wait_s and self._workers and self._address.shared and seat.listener is not None:
            seat.listener.close()  # the others take its share
            seat.listener = None

    def _end_hanging(self) -> None:
        limit_s = DRAIN_S if self._stopping_s else HANG_S
        for worker in self._workers:
            silent_s = monotonic() - (self._stopping_s or worker.seen_s)
            if silent_s > limit_s:
                log.error("worker %d has done nothing for %.0f s and is ended", worker.pid, silent_s)
                os.kill(worker.pid, signal.SIGKILL)

    def _refill(self) -> None:
        for seat in self._seats:
            if seat.worker is None:
                rest_s = max(0.0, seat.due_s - monotonic())
                if not rest_s or (seat.came_up and not self._workers):
                    self._fork(seat, rest_s)

    def _fork(self, seat: Seat, rest_s: float = 0.0) -> None:
        if seat.listener is None:
            seat.listener = self._address.listen_once_more()
        beat, pulse = os.pipe()
        os.set_blocking(beat, False)
        os.set_blocking(pulse, False)
        start = Start(self._lifeline, pulse, seat.begun > 0 and not rest_s, rest_s, self._reason if rest_s else "")
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # each is for one of the two, and for the right one
        pid = os.fork()
        if not pid:
            self._be_a_worker(seat, start)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(pulse)
        seat.begun += 1
        seat.worker = Worker(pid, beat, rest_s)
        self._selector.register(beat, selectors.EVENT_READ)

    def _be_a_worker(self, seat: Seat, start: Start) -> None:
        """Never returns: what the supervisor has begun is not the worker's to end."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (*SIGNALS, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._selector.close()
            os.close(self._alive)
            for other in self._seats:
                if other.worker is not None:
                    os.close(other.worker.pulse)
                if other.listener is not None and other.listener is not seat.listener:
                    other.listener.close()
            assert seat.listener is not None
            self._work(seat.listener, start)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            log.exception("a worker failed")
        finally:
            logging.shutdown()
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(code)


def pause_s(failures: int) -> float:
    """How long the next worker waits after so many failures in a row."""
    return min(2.0 ** min(failures - 2, 10), MOST_S) if failures > 1 else 0.0


def _cause(code: int) -> str:
    if code >= 0:
        return f"itself, with exit code {code}"
    name = signal.Signals(-code).name
    return f"signal {-code} ({name}{', perhaps for want of memory' if name == 'SIGKILL' else ''})"
