"""What an open loop keeps time with."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from time import perf_counter_ns


class Metronome:
    """Calls `tick` in the event loop whenever a beat is due; once for several that have become due together.

    A thread, because the event loops' own timers count in milliseconds, which would be most of the latency measured.
    """

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, started_ns: int, interval_ns: float, beats: int) -> None:
        """From the running event loop; the beats are at `started_ns + i * interval_ns`."""
        arguments = (asyncio.get_running_loop(), started_ns, interval_ns, beats)
        self._thread = threading.Thread(target=self._beat, args=arguments, name="metronome", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self, loop: asyncio.AbstractEventLoop, started_ns: int, interval_ns: float, beats: int) -> None:
        beat = 0
        while beat < beats and not self._stopped.is_set():
            wait_s = (started_ns + beat * interval_ns - perf_counter_ns()) / 1e9
            if wait_s > 0.2:
                self._stopped.wait(wait_s - 0.1)  # a slow rate must not hold up the end
                continue
            if wait_s > 0:
                time.sleep(wait_s)
            loop.call_soon_threadsafe(self._tick)
            beat = max(beat + 1, int((perf_counter_ns() - started_ns) / interval_ns) + 1)
