"""Does anybody notice a swap? Run: python -m tests.benchmarks.swaps

Version after version of a policy is published under full load: connections that ask without a pause, sessions and
streams that begin on one version and end several versions later. Each version's answers are its own, so every answer
shows who gave it. Between two swaps only the live version may answer; sessions and streams stay on theirs. Versions
that are a dozen behind are deleted from the store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.asyncio.client import connect

from actserve.cli.tools import local_service as local
from actserve.store.local import ModelStore
from actserve.wire.stream_messages import Hello, ReplyCodec
from tests.variants import Variants

POLL_S = 0.1
KEPT = 12  # versions in the store
EPISODE = 24  # steps
WITHIN_S = 60.0  # for a swap


@dataclass
class Seen:
    """The results so far."""

    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)  # of single requests
    outlived: int = 0  # steps of episodes on a version that was not live any more


class Http:
    """One connection."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def ask(self, method: str, path: str, body: bytes = b"", headers: tuple[str, ...] = ()) -> Any:
        """The JSON of the answer. Raises `ValueError` for any other status than 2xx."""
        lines = [f"{method} {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *headers]
        self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        content = await self._reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 2"):
            raise ValueError(f"{path}: {head[9:12].decode()} {content.decode()}")
        return json.loads(content or b"null")

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


class Crowd:
    """Everybody who asks. `live` are the versions that may answer now: one, or two while a swap is under way."""

    def __init__(self, variants: Variants, port: int, pause_s: float) -> None:
        self.seen = Seen()
        self.live: tuple[int, ...] = ()
        self.stopping = False
        self._variants = variants
        self._port = port
        self._path = f"/policies/{variants.name}"
        self._pause_s = pause_s  # between two steps of an episode
        self._bodies = [item.tobytes() for item in variants.observations]
        self._episode = variants.episode(EPISODE)

    async def run(self, connections: int, episodes: int) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [self._requests] * connections
        kinds += [self._session] * episodes + [self._stream] * episodes
        await asyncio.gather(*(self._repeat(kind) for kind in kinds))

    async def _repeat(self, kind: Callable[[], Awaitable[None]]) -> None:
        while not self.stopping:
            try:
                await kind()
            except Exception as error:  # any other error: a request was not answered
                self.seen.failures.append(f"{type(error).__name__}: {error}"[:300])
                await asyncio.sleep(0.1)

    async def _requests(self) -> None:
        """Single requests, each the first step of an episode."""
        http = Http(self._port)
        await http.open()
        try:
            while not self.stopping:
                before, begun = self.live, time.perf_counter()
                answer = await http.ask("POST", f"{self._path}/act", self._bodies[0], RAW)
                self.seen.latencies_s.append(time.perf_counter() - begun)
                self._check("request", answer["action"], self._episode[0], {*before, *self.live})
        finally:
            await http.close()

    async def _session(self) -> None:
        http = Http(self._port)
        await http.open()
        try:
            session = await http.ask("POST", f"{self._path}/sessions")
            for step, original in enumerate(self._episode):
                headers = (*RAW, f"X-Session: {session['session']}", f"X-Step: {step + 1}")
                body = self._bodies[step % len(self._bodies)]
                answer = await http.ask("POST", f"{self._path}/act", body, headers)
                self._check("session", answer["action"], original, {session["version"]})
                await asyncio.sleep(self._pause_s)
            await http.ask("DELETE", f"{self._path}/sessions/{session['session']}")
        finally:
            await http.close()

    async def _stream(self) -> None:
        async with connect(f"ws://127.0.0.1:{self._port}{self._path}/stream", compression=None) as socket:
            hello = Hello.from_json(str(await socket.recv()))
            replies = ReplyCodec(hello.signature.outputs)
            for step, original in enumerate(self._episode):
                await socket.send(self._bodies[step % len(self._bodies)])
                message = await socket.recv()
                assert isinstance(message, bytes), message
                action = int(replies.unpack(message).outputs[hello.signature.action.name])
                self._check("stream", action, original, {hello.version})
                await asyncio.sleep(self._pause_s)

    def _check(self, kind: str, action: int, original: int, versions: set[int]) -> None:
        self.seen.answers[kind] += 1
        self.seen.outlived += kind != "request" and not versions & {*self.live}
        if action not in {self._variants.action(original, version) for version in versions}:
            self.seen.wrong.append(f"{kind}: {action} is none of what {sorted(versions)} would do")


RAW = ("Content-Type: application/octet-stream",)


@dataclass(frozen=True)
class Row:
    """After so many swaps."""

    swaps: int
    answers: int
    failures: int
    wrong: int
    rss_mb: float
    loaded: int  # versions in memory
    swap_s: float  # from published to live, the mean of the last ten


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def swap(
    variants: Variants,
    service: local.LocalService,
    swaps: int,
    connections: int,
    episodes: int,
    pause_s: float,
    report: Callable[[Row], None],
) -> Seen:
    """Publish `swaps` more versions, each when the one before is live, and ask all the time."""
    port = urlsplit(service.url).port
    assert port is not None
    crowd = Crowd(variants, port, pause_s)
    crowd.live = (variants.store.versions(variants.name)[-1],)
    asking = asyncio.create_task(crowd.run(connections, episodes))
    http = Http(port)
    await http.open()
    took: list[float] = []
    try:
        for index in range(1, swaps + 1):
            (old,) = crowd.live
            begun = time.perf_counter()
            crowd.live = (old, old + 1)
            assert await asyncio.to_thread(variants.publish) == old + 1
            described: dict[str, Any] = {"version": old}
            while described["version"] != old + 1:
                if time.perf_counter() - begun > WITHIN_S:
                    raise TimeoutError(f"version {old + 1} did not take over: {described['refused']}")
                await asyncio.sleep(0.02)
                described = await http.ask("GET", f"/policies/{variants.name}")
            crowd.live = (old + 1,)
            took.append(time.perf_counter() - begun)
            await asyncio.sleep(0.1)  # of that version alone
            shutil.rmtree(variants.store.root / variants.name / str(old + 1 - KEPT), ignore_errors=True)
            if index % 10 == 0:
                seen = crowd.seen
                report(
                    Row(
                        index, sum(seen.answers.values()), len(seen.failures), len(seen.wrong),
                        rss_mb(service.workers[0]), len(described["loaded"]), float(np.mean(took[-10:])),
                    )
                )  # fmt: skip
    finally:
        crowd.stopping = True
        await asking
        await http.close()
    return crowd.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="pong", help="of the store; with discrete actions")
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--connections", type=int, default=8, help="that ask without a pause")
    parser.add_argument("--episodes", type=int, default=4, help="sessions, and streams, at a time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    rows: list[Row] = []

    def report(row: Row) -> None:
        if not rows:
            print("swaps   answers  failed  wrong    RSS MB  loaded  s to go live")
        rows.append(row)
        print(
            f"{row.swaps:5}  {row.answers:8,}  {row.failures:6}  {row.wrong:5}  {row.rss_mb:8.1f}  {row.loaded:6}  "
            f"{row.swap_s:12.2f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        variants = Variants(ModelStore(given.store).resolve(given.policy), ModelStore(Path(folder)))
        variants.publish()
        environment = {**os.environ, "ACTSERVE_POLL_S": str(POLL_S)}
        with local.serve(folder, "--runtime", "onnx", environment=environment) as service:
            running = swap(variants, service, given.swaps, given.connections, given.episodes, 0.05, report)
            seen = asyncio.run(running)
    p50, p99, most = (float(value) * 1e3 for value in np.percentile(seen.latencies_s, [50, 99, 100]))
    counts = ", ".join(f"{count:,} by {kind}" for kind, count in sorted(seen.answers.items()))
    print(f"{counts}; {seen.outlived:,} steps on a version that was not live any more")
    print(f"requests: p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {most:.1f} ms")
    for problem in (*seen.failures[:5], *seen.wrong[:5]):
        print(problem)
    if given.json:
        given.json.write_text(json.dumps([vars(row) for row in rows], indent=1))
    raise SystemExit(bool(seen.failures or seen.wrong))


if __name__ == "__main__":
    main()
