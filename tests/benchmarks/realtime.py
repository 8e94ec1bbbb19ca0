"""A control loop at a fixed rate through a slow network. Run: python -m tests.benchmarks.realtime --minutes 30

Each answer of the service is delayed by 150 ± 20 ms. `Realtime` acts at 50 Hz all the same: it asks for the next chunk
of 50 actions while it takes those of the last one. Beside it, in a process of its own, a loop that only sleeps shows
how late this machine wakes a process. Then the same loop asks and waits for each action. The policy follows a clock:
its observation is the number of the control period, so each action says for which period it was planned.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from actserve import Realtime, RemotePolicy
from actserve.cli.tools import local_service as local
from tests.exported import exported

PERIOD_S = 0.02
DELAY_S, SPREAD_S = 0.15, 0.02
WAITING_S = 20.0  # the loop that asks and waits


@contextmanager
def delayed(url: str) -> Iterator[str]:
    """The service at `url` behind a proxy that delays its answers -> the proxy's URL. The proxy is another process."""
    ours, theirs = multiprocessing.Pipe()
    proxy = multiprocessing.Process(target=_proxy, args=(url, theirs), daemon=True)
    proxy.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        proxy.terminate()
        proxy.join()


def _proxy(url: str, ready: Connection) -> None:
    """Serve until the process is ended; sends the port to `ready`."""
    address = urlsplit(url)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delays: bool) -> None:
        try:
            while data := await reader.read(1 << 20):
                if delays:
                    await asyncio.sleep(random.uniform(DELAY_S - SPREAD_S, DELAY_S + SPREAD_S))
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
            await writer.wait_closed()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_service, to_service = await asyncio.open_connection(address.hostname, address.port)
        both = forward(reader, to_service, False), forward(from_service, writer, True)
        await asyncio.gather(*both, return_exceptions=True)

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def sleep_only(seconds: float, late: Any) -> None:
    """How late a process wakes that has nothing else to do, in ms."""
    found, until_s = [], time.monotonic()
    for _ in range(int(seconds / PERIOD_S)):
        until_s += PERIOD_S
        time.sleep(max(0.0, until_s - time.monotonic()))
        found.append(1000 * (time.monotonic() - until_s))
    late.put(found)


def in_time(url: str, seconds: float) -> dict[str, Any]:
    """`Realtime`, and the loop that only sleeps, for so long."""
    late: Any = multiprocessing.Queue()
    alone = multiprocessing.Process(target=sleep_only, args=(seconds, late))
    alone.start()
    wrong = 0
    with Realtime(url, "planner", period_s=PERIOD_S) as loop:
        for tick in loop:
            action = loop.act(np.array([float(tick)], np.float32))
            wrong += float(action[0]) != tick
            if tick >= seconds / PERIOD_S:
                break
    machine = percentiles(late.get(timeout=60))
    alone.join()
    report = loop.report
    return {
        "ticks": report.ticks,
        "starved": report.starved,
        "actions for another period": wrong,
        "least actions left": report.least_left,
        "answers": report.answers,
        "answer ms": percentiles(report.answer_ms),
        "late ms": percentiles(report.late_ms),
        "machine's own late ms": machine,
    }


def asking_and_waiting(url: str) -> dict[str, Any]:
    """Each action is asked for with the newest observation, and waited for."""
    missed, late, begun_s = 0, [], time.monotonic()
    with RemotePolicy(url, "planner") as remote:
        for tick in range(int(WAITING_S / PERIOD_S)):
            due_s = begun_s + tick * PERIOD_S
            time.sleep(max(0.0, due_s - time.monotonic()))
            remote.act(np.array([float(tick)], np.float32))
            late.append(1000 * (time.monotonic() - due_s))
            missed += late[-1] > 1000 * PERIOD_S
            if time.monotonic() > begun_s + WAITING_S:
                break
    return {"ticks": len(late), "missed": missed, "actions a second": len(late) / (time.monotonic() - begun_s)}


def percentiles(values: Any) -> dict[str, float]:
    found = np.percentile(list(values), [50, 99, 100])
    return dict(zip(("p50", "p99", "most"), (round(float(value), 2) for value in found), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    arguments = parser.parse_args()
    store = exported("tests.policies:planner", ("onnx",)).root
    with local.serve(store, "--runtime", "onnx") as service, delayed(service.url) as url:
        found = {"Realtime": in_time(url, 60 * arguments.minutes), "ask and wait": asking_and_waiting(url)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
