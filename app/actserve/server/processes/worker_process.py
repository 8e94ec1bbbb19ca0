"""WorkerProcess: one worker, as the supervisor sees it."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic

STOPPED = (b"T", b"t")  # states in /proc: by a signal, by a debugger
RUNNABLE = b"R"


class WorkerProcess:
    """`silent_s` is the time since its last heartbeat in which it could have run."""

    def __init__(self, pid: int, heartbeat_fd: int, delay_s: float) -> None:
        self.pid = pid
        self.heartbeat_fd = heartbeat_fd
        self.begun_s = monotonic() + delay_s
        self.silent_s = -delay_s
        self.ran = False  # its event loop has run
        self._cpu_ticks = -1  # at the last `pass_time`

    def read_heartbeat(self) -> None:
        try:
            written = os.read(self.heartbeat_fd, 4096)
        except BlockingIOError:
            return
        if written:  # otherwise the worker has ended
            self.silent_s, self.ran = 0.0, True

    def pass_time(self, elapsed_s: float) -> None:
        """Count `elapsed_s` as silence, unless the system did not let the worker run."""
        if self._could_run():
            self.silent_s += elapsed_s

    def _could_run(self) -> bool:
        """False if a signal or a debugger has stopped it, or if it has waited for a CPU and got none."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:  # it has ended, or this system has no /proc
            return True
        fields = stat.rpartition(b")")[2].split()  # proc(5), from the third field on
        state, cpu_ticks = fields[0], int(fields[11]) + int(fields[12])
        starved = state == RUNNABLE and cpu_ticks == self._cpu_ticks
        self._cpu_ticks = cpu_ticks
        return state not in STOPPED and not starved
