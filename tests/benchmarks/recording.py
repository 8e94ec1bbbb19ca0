"""The cost of recording, and recordings at scale. Run: python -m tests.benchmarks.recording cost|scale

`cost`: two services with `pong`, one that records and one that does not, take turns on one core with raw requests at
their peak. The figure is the ratio of their CPU times an action (user and system, all their processes), the median of
the rounds.

`scale`: sessions of two versions of `pong-lstm` side by side, `--steps` in all, are recorded whole in this process:
with resets, random exploration and retried steps. Replayed on the version that acted, every output must be the same
bit for bit. On the other version, the first step that diverges must be the one that a plain loop over all steps
finds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import urllib3
from rich.console import Console

from actserve.cli.tools import replay
from actserve.cli.tools.local_service import free_port
from actserve.core.completion import complete
from actserve.core.settings import Settings
from actserve.core.signature import Array, Arrays, Noise, TensorSpec
from actserve.engine import golden
from actserve.engine.registry import Registry
from actserve.engine.runtimes.onnx_runtime import OnnxRuntime
from actserve.recording.budget import Budget
from actserve.recording.reader import Recording, Steps
from actserve.recording.recorder import Recorder
from actserve.recording.writer import Writer
from actserve.server.sessions import Session, SessionLimits, Sessions
from actserve.store.artifact import GOLDEN, Artifact
from actserve.store.local import ModelStore
from tests.benchmarks.cost import measure
from tests.benchmarks.questions import request
from tests.benchmarks.server import Server, cores, running
from tests.benchmarks.ways import RAW_TYPE, any_answer, observations

PEAK, LSTM = "pong", "pong-lstm"
NUDGE = 1.0005  # of the weights of the other version
EPISODE, RETRIED = 500, 0.01  # steps of an episode, on average; share of the steps that are retried
STEPS = r'(?m)^actserve_recording_steps_total{outcome="(\w+)",policy="pong",version="1"} (\S+)$'
CONSOLE = Console(stderr=True)


def cost(store: Path, rounds: int, seconds: float, connections: int) -> dict[str, Any]:
    """The CPU microseconds an action without and with recording, and their ratio: of all actions, and by round.

    The services are asked in turn. Recording has its share of the time that passes, and so twice the share of the time
    in which its service is asked: the share is halved.
    """
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
            share = {"ACTSERVE_RECORD_CPU": str(Settings().record_cpu / 2)}  # each is asked half of the time
            started = running([sys.executable, "-m", "actserve", *command], ("127.0.0.1", port), on[:1], share)
            servers[name] = stack.enter_context(started)
            servers[name].first_answer_s(questions)
        for number in range(rounds + 1):
            for name in found if number % 2 else reversed(found):
                cell = measure(servers[name], questions, name, connections, seconds, on)
                if number:  # the first round warms up, and spends what the budget has saved
                    found[name].append(cell.cpu_us)
            CONSOLE.print(f"  round {number}: {', '.join(f'{k} {v[-1]:.1f} µs' for k, v in found.items() if v)}")
        answer = urllib3.request("GET", "http://{}:{}/metrics".format(*servers["on"].address)).data.decode()
    counted = {outcome: int(float(count)) for outcome, count in re.findall(STEPS, answer)}
    ratios = sorted(on_us / off_us for on_us, off_us in zip(found["on"], found["off"], strict=True))
    mean = {name: statistics.fmean(each) for name, each in found.items()}
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return {"cpu_us": mean, "ratio": mean["on"] / mean["off"], "median": statistics.median(ratios), "error": error} | {
        "steps": counted
    }


def explore(model: Any) -> None:
    """Let `model` draw its actions if `explore` says so, by a Gumbel number for each score."""
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for node in model.graph.node:
        node.output[:] = ["greedy" if name == "action" else name for name in node.output]
    for name, kind, shape in (
        ("explore", onnx.TensorProto.BOOL, [batch]),
        ("noise", onnx.TensorProto.FLOAT, [batch, 6]),
    ):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "last_axis"))
    for kind, inputs, output, options in (
        ("Cast", ["explore"], "explore_number", {"to": onnx.TensorProto.FLOAT}),
        ("Unsqueeze", ["explore_number", "last_axis"], "explore_column", {}),
        ("Mul", ["noise", "explore_column"], "noise_taken", {}),
        ("Add", ["action_value", "noise_taken"], "noisy", {}),
        ("ArgMax", ["noisy"], "action", {"axis": 1, "keepdims": 0}),
    ):
        model.graph.node.append(onnx.helper.make_node(kind, inputs, [output], **options))


def two_versions(artifact: Artifact, store: ModelStore) -> None:
    """Publish `artifact` with exploration as version 1, and with other weights of its first layer as version 2."""
    manifest = artifact.manifest
    model = onnx.load_model_from_string(artifact.read(manifest.programs["onnx"].file))
    explore(model)
    signature = replace(
        manifest.signature,
        exploration=("deterministic", "random"),
        noise=(Noise(TensorSpec("noise", "float32", (6,)), "gumbel"),),
    )
    inputs, outputs = golden.read(artifact)
    size = len(inputs["pixels"])
    inputs |= {"explore": np.zeros(size, bool), "noise": np.zeros((size, 6), np.float32)}
    weights = next(each for each in model.graph.initializer if len(each.dims) == 4)
    programs = {"onnx": replace(manifest.programs["onnx"], file="policy.onnx")}
    for factor in (1.0, NUDGE):
        nudged = onnx.numpy_helper.to_array(weights) * np.float32(factor)
        weights.CopyFrom(onnx.numpy_helper.from_array(nudged, weights.name))
        session = onnxruntime.InferenceSession(model.SerializeToString())
        found = dict(zip(outputs, session.run(list(outputs), inputs), strict=True))
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder, name) for name in ("policy.onnx", GOLDEN)}
            paths["policy.onnx"].write_bytes(model.SerializeToString())
            paths[GOLDEN].write_bytes(golden.save(inputs, found))
            store.publish(replace(manifest, signature=signature, programs=programs), paths)


def scale(store: Path, steps: int, sessions: int, folder: Path) -> dict[str, Any]:
    """Record sessions of two versions, and replay each on both; the figures of all."""
    with tempfile.TemporaryDirectory() as temporary:
        versions = ModelStore(Path(temporary))
        two_versions(ModelStore(store).resolve(LSTM), versions)
        begun_s = time.monotonic()
        recorder, retries = asyncio.run(_record(versions, observations(store, LSTM), steps, sessions, folder))
        recorded_s = time.monotonic() - begun_s
        assert recorder.stopped is None, recorder.stopped
        recording = Recording(folder)
        budget = recorder.budget
        return {
            "steps": recording.of(LSTM).count,
            "retries": retries,
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "recording_s": recorded_s,
            "recording_cpu_us_a_step": (budget.copying_ns + budget.writing_ns) / 1e3 / steps,
            "versions": [_replayed(recording.of(LSTM, number), versions, number) for number in (1, 2)],
        }


def _replayed(found: Steps, store: ModelStore, recorded: int) -> dict[str, Any]:
    """Replay the steps of the version `recorded` on that version and on the other one."""
    results = {}
    for number in (recorded, 3 - recorded):
        artifact = store.resolve(LSTM, number)
        CONSOLE.print(f"  {found.count:,} steps of version {recorded} on version {number}")
        with replay.program(artifact) as (actor, _, runtime):
            results[number] = replay.replay(found, actor, artifact.label, runtime, "full", lambda _: None)
    same, other = results[recorded].comparison, results[3 - recorded].comparison
    assert other.first is not None
    return {
        "steps": found.count,
        "identical": same.identical,
        "replay_s": results[recorded].seconds,
        "other version: same actions": other.same,
        "other version: first": (other.first.episode, other.first.step),
        "found directly": first_divergence(found, store.resolve(LSTM, 3 - recorded)),
    }


def first_divergence(found: Steps, artifact: Artifact) -> tuple[str, int] | None:
    """The episode and step of the first recorded action that the version `artifact` does not take.

    It is found one step after the other, without the code of replays.
    """
    runtime, signature = OnnxRuntime.load(artifact, 1), artifact.manifest.signature
    states: dict[str, Arrays] = {}
    for window in found.windows(replay.WINDOW_BYTES):
        for step in window:
            given = {"pixels": step.tensors["observation.pixels"][None], "is_init": step.tensors["is_init"][None]}
            given |= states.get(step.episode, {})
            completed = complete(signature, given, 1, step.exploration, step.seed)
            results = runtime.run(completed.inputs)
            if results["action"][0] != step.tensors["output.action"]:
                return step.episode, step.step
            states[step.episode] = {each.spec.name: results[each.output] for each in signature.state}
    return None


async def _record(store: ModelStore, screens: Array, steps: int, sessions: int, folder: Path) -> tuple[Recorder, int]:
    """Sessions of both versions side by side, half of them at random, with new episodes and retried steps.

    Returns the recorder and the number of retries.
    """
    recorder = Recorder(str(folder), Budget(1.0), 256 << 20)
    registry = Registry(store, Settings(runtime="onnx", max_wait_ms=60_000))
    registry.record(recorder)
    retries = 0

    async def play(session: Session) -> None:
        nonlocal retries
        rng = np.random.default_rng(session.number)
        for number in range(1, steps // sessions + 1):
            pixels = screens[rng.integers(0, len(screens))][None]
            tensors = {"pixels": pixels, "is_init": np.array([number == 1 or rng.random() < 1 / EPISODE])}
            result = await held.step(registry, session, tensors, number)
            if rng.random() < RETRIED:
                again = await held.step(registry, session, tensors, number)
                assert again.replayed
                assert again.acted.outputs["action"] == result.acted.outputs["action"]
                retries += 1
            while recorder.budget.waiting_bytes > 64 << 20:  # the disk and the other core are slower than the policy
                await asyncio.sleep(0.05)
            if number % 1000 == 0 and session.number == 1:
                CONSOLE.print(f"  {number * sessions:,} steps")

    with (
        Writer(recorder, folder),
        tempfile.TemporaryDirectory() as temporary,
        Sessions(Path(temporary) / "sessions", SessionLimits()) as held,
    ):
        registry.start()
        await registry.wait_loaded(60.0)
        begun = [
            held.begin(LSTM, 1 + number % 2, seed=number, exploration="random" if number % 4 < 2 else None)
            for number in range(sessions)
        ]
        await asyncio.gather(*map(play, begun))
        await registry.close()
    return recorder, retries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "scale"])
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
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
    right = all(
        each["identical"] == each["steps"] and each["found directly"] == each["other version: first"]
        for each in found["versions"]
    )
    return 0 if right and found["steps"] == sum(each["steps"] for each in found["versions"]) else 1


if __name__ == "__main__":
    sys.exit(main())
