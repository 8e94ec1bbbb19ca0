"""The clock of an open loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from time import perf_counter_ns


class Pacer:
    """Calls `on_due` in the event loop whenever a request falls due; once if several fall due together.

    Runs in a thread: the timers of event loops have a resolution of 1 ms, which would dominate the measured latency.
    """

    def __init__(self, on_due: Callable[[], None]) -> None:
        self._on_due = on_due
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, started_ns: int, interval_ns: float, requests: int) -> None:
        """Call from the running event loop. Request i falls due at `started_ns + i * interval_ns`."""
        arguments = (asyncio.get_running_loop(), started_ns, interval_ns, requests)
        self._thread = threading.Thread(target=self._run, args=arguments, name="pacer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, loop: asyncio.AbstractEventLoop, started_ns: int, interval_ns: float, requests: int) -> None:
        request = 0
        while request < requests and not self._stopped.is_set():
            wait_s = (started_ns + request * interval_ns - perf_counter_ns()) / 1e9
            if wait_s > 0.2:
                self._stopped.wait(wait_s - 0.1)  # `stop` must not wait for the next request of a slow rate
                continue
            if wait_s > 0:
                time.sleep(wait_s)
            loop.call_soon_threadsafe(self._on_due)
            request = max(request + 1, int((perf_counter_ns() - started_ns) / interval_ns) + 1)
