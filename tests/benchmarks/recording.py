"""What recording costs, and how much can be recorded. Run: python -m tests.benchmarks.recording cost|scale

`cost`: two services with `pong`, one that records and one that does not, take turns on one core with raw requests at
their peak. The figure is the ratio of their CPU times an action (user and system, all their processes), the median of
the rounds.

`scale`: sessions of `pong-lstm` side by side, `--steps` in all, are recorded whole in this process, and the recording
is replayed: every output must be the same bit for bit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from actserve.cli.tools import replay
from actserve.cli.tools.local_service import free_port
from actserve.core.settings import Settings
from actserve.core.signature import Array
from actserve.engine.policy import Policy
from actserve.recording.budget import Budget
from actserve.recording.reader import Recording
from actserve.recording.recorder import Recorder
from actserve.recording.writer import Writer
from actserve.server.admission import Admission
from actserve.server.episode_state import EpisodeState
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve.telemetry.counts import Tally
from tests.benchmarks.cost import measure
from tests.benchmarks.questions import request
from tests.benchmarks.server import Server, cores, running
from tests.benchmarks.ways import RAW_TYPE, any_answer, observations

PEAK, LSTM = "pong", "pong-lstm"
CONSOLE = Console(stderr=True)


def cost(store: Path, rounds: int, seconds: float, connections: int) -> dict[str, Any]:
    """The CPU microseconds an action without and with recording, and their ratio."""
    on = cores()
    items = observations(store, PEAK)
    questions = any_answer([request(f"/policies/{PEAK}/act", item.tobytes(), RAW_TYPE) for item in items])
    found: dict[str, list[float]] = {"off": [], "on": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "recording"
        servers: dict[str, Server] = {}
        for name in found:
            port = free_port()
            command = ["serve", "--runtime", "onnx", "--store", str(store), "--policy", PEAK, "--port", str(port)]
            command += ["--record", str(folder)] if name == "on" else []
            started = running([sys.executable, "-m", "actserve", *command], ("127.0.0.1", port), on[:1], {})
            servers[name] = stack.enter_context(started)
            servers[name].first_answer_s(questions)
        for number in range(rounds + 1):
            for name in found if number % 2 else reversed(found):
                cell = measure(servers[name], questions, name, connections, seconds, on)
                if number:  # the first round warms up, and spends what the budget has saved
                    found[name].append(cell.cpu_us)
            CONSOLE.print(f"  round {number}: {', '.join(f'{k} {v[-1]:.1f} µs' for k, v in found.items() if v)}")
    ratio = statistics.median(on_us / off_us for on_us, off_us in zip(found["on"], found["off"], strict=True))
    return {"cpu_us": {name: statistics.median(each) for name, each in found.items()}, "ratio": ratio}


def scale(store: Path, steps: int, sessions: int, folder: Path) -> dict[str, Any]:
    """Record and replay; the figures of both."""
    artifact = ModelStore(store).resolve(LSTM)
    begun_s = time.monotonic()
    recorder = asyncio.run(_record(artifact, observations(store, LSTM), steps, sessions, folder))
    recorded_s = time.monotonic() - begun_s
    assert recorder.stopped is None, recorder.stopped
    found = Recording(folder).of(LSTM)
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    budget = recorder.budget
    with replay.program(artifact) as (actor, runtime):
        result = replay.replay(found, actor, artifact.label, runtime, "full", lambda _: None)
    return {
        "steps": found.count,
        "bytes": size_bytes,
        "recording_s": recorded_s,
        "recording_cpu_us_a_step": (budget.copying_ns + budget.writing_ns) / 1e3 / steps,
        "replay_s": result.seconds,
        "identical": result.comparison.identical,
    }


async def _record(artifact: Artifact, screens: Array, steps: int, sessions: int, folder: Path) -> Recorder:
    recorder = Recorder(str(folder), Budget(1.0), 256 << 20)
    with Writer(recorder, folder):
        policy = Policy.load(artifact, Settings(runtime="onnx", max_wait_ms=60_000))
        policy.recorder = recorder.of(artifact, policy.choice.runtime)
        policy.start()
        admission, rng = Admission(), np.random.default_rng(0)
        episodes = [EpisodeState(policy, admission, Tally(), None, {}, "stream") for _ in range(sessions)]
        for step in range(steps // sessions):
            chosen = screens[rng.integers(0, len(screens), sessions)]
            acts = (each.act({"pixels": screen[None]}) for each, screen in zip(episodes, chosen, strict=True))
            await asyncio.gather(*acts)
            while recorder.budget.waiting_bytes > 64 << 20:  # the disk and the other core are slower than the policy
                await asyncio.sleep(0.05)
            if step % 1000 == 999:
                CONSOLE.print(f"  {(step + 1) * sessions:,} steps")
        await policy.close()
    return recorder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "scale"])
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where the recording stays; default: a temporary folder")
    wanted = parser.parse_args()
    if wanted.what == "cost":
        print(json.dumps(cost(wanted.store, wanted.rounds, wanted.seconds, wanted.connections)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        found = scale(wanted.store, wanted.steps, wanted.sessions, wanted.folder or Path(temporary) / "recording")
    print(json.dumps(found))
    return 0 if found["identical"] == found["steps"] else 1


if __name__ == "__main__":
    sys.exit(main())
