"""Supervisor: runs worker processes that share one address, and replaces workers that die.

    SIGTERM, SIGINT       it closes the address, and the workers answer all accepted requests; after a deadline they
                          are killed
    a worker dies         the kernel resets its connections; a new worker takes its slot
    it dies repeatedly    each new worker waits, twice as long each time; if it is the only one, it starts at once, but
                          refuses requests with the reason, and loads its policies after the wait
    a worker hangs        the worker is killed if its event loop has not run for `HANG_S`. Only time in which it could
                          have run counts: not the time of a pause, of all processes or of this one
    no worker can start   fork, pipe or socket fail (limits on processes, files, memory): it tries again, more and more
                          slowly, and logs it
    the supervisor dies   the lifeline of each worker ends; the workers answer all accepted requests, and end

Workers are forks of the supervisor, which has imported their modules and started nothing. A new worker starts in
milliseconds, and all share the memory of the modules. Each worker has its own socket on the port. The socket stays open
while the slot is empty, so new connections wait for the next worker.
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
from actserve.server.processes.worker_process import WorkerProcess

log = logging.getLogger("actserve")

DRAIN_S = 35.0  # for workers to end after SIGTERM; their own deadline is 30 s
HANG_S = 30.0
STEADY_S = 60.0  # after this lifetime a death is not counted as a repeated one
MAX_DELAY_S = 30.0  # between two starts
TURN_S = 1.0  # the longest wait of the supervisor for an event
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Start:
    """How a worker starts.

    `lifeline_fd` reaches its end when the supervisor dies. The worker writes to `heartbeat_fd` while its event loop
    runs. A worker that `replaces` another accepts no connections before its policies are loaded. It loads them after
    `delay_s`, and `reason` says why it waits.
    """

    lifeline_fd: int
    heartbeat_fd: int
    replaces: bool = False
    delay_s: float = 0.0
    reason: str = ""


WorkerMain = Callable[[socket.socket, Start], None]


class WorkerSlot:
    """The place of one worker: its socket, and the history of the workers that had it."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener: socket.socket | None = listener
        self.worker: WorkerProcess | None = None
        self.starts = 0
        self.failures = 0  # in a row
        self.last_ran = True  # whether the last worker ran before it died
        self.due_s = 0.0  # when the next worker starts
        self.start_failures = 0  # attempts to start a worker that failed, in a row
        self.retry_s = 0.0  # when the next attempt is made


class Supervisor:
    """Runs `count` processes of `worker_main` at `address`."""

    def __init__(self, address: Address, count: int, worker_main: WorkerMain) -> None:
        self._address = address
        self._worker_main = worker_main
        self._slots = [WorkerSlot(listener) for listener in address.listen(count)]
        self._selector = selectors.DefaultSelector()
        self._lifeline_fd, self._lifeline_write_fd = os.pipe()
        os.set_blocking(self._lifeline_fd, False)
        self._signalled = False
        self._stopping = False
        self._draining_s = 0.0  # for so long it has been stopping, in which the workers could have run
        self._turn_began_s = 0.0
        self._reason = ""
        self._exit_code = 0

    def run(self) -> int:
        """Run until a signal comes; returns 0, or the exit code of a worker that could not start."""
        gc.freeze()  # garbage collections in the workers do not write to shared memory
        with self._signals():
            self._turn_began_s = monotonic()
            for slot in self._slots:
                self._start(slot)
            while self._workers or not self._stopping:
                self._wait()
                if self._signalled:
                    self._stop()
                self._reap()
                self._kill_hanging()
                if not self._stopping:
                    self._fill_slots()
        self._address.close()
        return self._exit_code

    @property
    def _workers(self) -> list[WorkerProcess]:
        return [slot.worker for slot in self._slots if slot.worker is not None]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        wakeup_read_fd, wakeup_write_fd = os.pipe()
        for fd in (wakeup_read_fd, wakeup_write_fd):
            os.set_blocking(fd, False)
        before = {number: signal.signal(number, self._handle_signal) for number in SIGNALS}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_write_fd)
        self._selector.register(wakeup_read_fd, selectors.EVENT_READ)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        for slot in self._slots:
            if slot.listener is not None:
                slot.listener.close()  # otherwise new connections would wait in vain
        for worker in self._workers:
            os.kill(worker.pid, signal.SIGTERM)

    def _wait(self) -> None:
        """Wait for a signal or a heartbeat, at most for `TURN_S`, and count the time in which workers were silent."""
        ready = self._selector.select(TURN_S)
        now_s = monotonic()
        # A longer turn is a pause of this process: of the whole service, most probably, and certainly no silence.
        elapsed_s = min(now_s - self._turn_began_s, TURN_S)
        self._turn_began_s = now_s
        self._draining_s += elapsed_s if self._stopping else 0.0
        for worker in self._workers:
            worker.pass_time(elapsed_s)
        for key, _ in ready:
            if key.data is not None:
                key.data.read_heartbeat()
            else:  # the signals since the last turn
                with suppress(BlockingIOError):
                    os.read(key.fd, 4096)

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.worker is None:
                continue
            pid, status = os.waitpid(slot.worker.pid, os.WNOHANG)
            if pid:
                worker, slot.worker = slot.worker, None
                worker.read_heartbeat()  # it may have run and ended since the last look
                self._selector.unregister(worker.heartbeat_fd)
                os.close(worker.heartbeat_fd)
                if not self._stopping:
                    self._record_death(slot, worker, os.waitstatus_to_exitcode(status))

    def _record_death(self, slot: WorkerSlot, worker: WorkerProcess, code: int) -> None:
        if code >= 0 and not worker.ran and slot.starts == 1:  # wrong settings, for example; the worker has logged them
            self._exit_code = code or 1
            self._stop()
            return
        slot.failures = 1 if monotonic() - worker.begun_s > STEADY_S else slot.failures + 1
        slot.last_ran = worker.ran
        delay_s = restart_delay_s(slot.failures)
        slot.due_s = monotonic() + delay_s
        self._reason = f"worker {worker.pid} ended by {_cause(code)}, death {slot.failures} in a row"
        log.error("%s; the next one starts %s", self._reason, f"in {delay_s:g} s" if delay_s else "at once")
        if delay_s and self._workers and self._address.shared and slot.listener is not None:
            slot.listener.close()  # the other workers get its connections
            slot.listener = None

    def _kill_hanging(self) -> None:
        limit_s = DRAIN_S if self._stopping else HANG_S
        for worker in self._workers:
            silent_s = self._draining_s if self._stopping else worker.silent_s
            if silent_s > limit_s:
                log.error("worker %d has not responded for %.0f s and is killed", worker.pid, silent_s)
                os.kill(worker.pid, signal.SIGKILL)

    def _fill_slots(self) -> None:
        for slot in self._slots:
            if slot.worker is None:
                delay_s = max(0.0, slot.due_s - monotonic())
                if not delay_s or (slot.last_ran and not self._workers):
                    self._start(slot, delay_s)

    def _start(self, slot: WorkerSlot, delay_s: float = 0.0) -> None:
        """Start a worker, or try again later where the system refuses a process, a pipe or a socket."""
        if monotonic() < slot.retry_s:
            return
        try:
            self._fork(slot, delay_s)
        except OSError as error:
            slot.start_failures += 1
            again_s = min(2.0 ** min(slot.start_failures - 1, 10), MAX_DELAY_S)
            slot.retry_s = monotonic() + again_s
            log.error("no worker can be started: %s; the next attempt is in %g s", error.strerror or error, again_s)
        else:
            slot.start_failures = 0

    def _fork(self, slot: WorkerSlot, delay_s: float = 0.0) -> None:
        """Raises `OSError`; then nothing has changed."""
        if slot.listener is None:
            slot.listener = self._address.listen_again()
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        replaces = slot.starts > 0 and not delay_s
        start = Start(self._lifeline_fd, write_fd, replaces, delay_s, self._reason if delay_s else "")
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has its own handlers
        try:
            pid = os.fork()
        except OSError:
            os.close(read_fd)
            raise
        else:
            if not pid:
                self._run_worker(slot, start)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.close(write_fd)
        slot.starts += 1
        slot.worker = WorkerProcess(pid, read_fd, delay_s)
        self._selector.register(read_fd, selectors.EVENT_READ, slot.worker)

    def _run_worker(self, slot: WorkerSlot, start: Start) -> None:
        """In the child. Never returns: the cleanup on the stack belongs to the supervisor."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (*SIGNALS, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._selector.close()
            os.close(self._lifeline_write_fd)
            for other in self._slots:
                if other.worker is not None:
                    os.close(other.worker.heartbeat_fd)
                if other.listener is not None and other.listener is not slot.listener:
                    other.listener.close()
            assert slot.listener is not None
            self._worker_main(slot.listener, start)
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


def restart_delay_s(failures: int) -> float:
    """How long the next worker waits after `failures` deaths in a row."""
    return min(2.0 ** min(failures - 2, 10), MAX_DELAY_S) if failures > 1 else 0.0


def _cause(code: int) -> str:
    if code >= 0:
        return f"itself, with exit code {code}"
    name = signal.Signals(-code).name
    return f"signal {-code} ({name}{', possibly out of memory' if name == 'SIGKILL' else ''})"
