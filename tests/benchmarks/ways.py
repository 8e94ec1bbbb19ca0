"""What each way to ask costs the server. Run: python -m tests.benchmarks.ways [--store models_store]

One actserve with `pong`, `pong-lstm` and a policy of four floats, on a core of its own, is asked in every encoding,
with and without state, in turn, several rounds. The table has microseconds of the server's CPU time (user and system,
all its processes) an action, the median of the rounds, and its ratio to the first row of the same policy. The last row
is another server: a FastAPI service of ten lines.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
from backports import zstd
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save

from actserve import wire
from actserve.cli.tools.local_service import free_port
from actserve.core.signature import Array, Signature
from actserve.engine.tuning.tuned import tune_briefly
from actserve.server.access.tokens import add_token
from actserve.server.arcade.game import encode_png
from actserve.store.local import ModelStore
from actserve.wire.oip import DATATYPES
from tests.benchmarks.cost import measure
from tests.benchmarks.questions import Questions, Screens, request, stream
from tests.benchmarks.server import DoesNotServe, Server, cores, running

CACHE = Path(".cache/benchmarks/ways")
POLICIES = ("pong", "pong-lstm", "cart")
SESSIONS = 256
REQUESTS = 32
FRAMES = 8
JSON_TYPE, SAFETENSORS_TYPE = {"Content-Type": wire.JSON}, {"Content-Type": wire.SAFETENSORS}
RAW_TYPE = {"Content-Type": wire.RAW}
ZSTD_TYPE = RAW_TYPE | {"Content-Encoding": "zstd"}
OUTPUTS = {"pong": "action,action_value", "pong-lstm": "action,action_value", "cart": "action,action_value"}
FASTAPI = "FastAPI in ten lines, JSON"
Asking = Callable[["Subject"], Questions]


@dataclass(frozen=True)
class Subject:
    """A policy to ask: observations of it, each (32, *shape), and where."""

    name: str
    signature: Signature
    items: Array
    port: int
    token: str

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """A request with the token."""
        return request(path, body, {**headers, "Authorization": f"Bearer {self.token}"})

    def send(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
        """The answer to a request that is sent now."""
        named = {**(headers or {}), "Authorization": f"Bearer {self.token}"}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, named, method="POST")
        with urllib.request.urlopen(asked) as answer:
            content: bytes = answer.read()
        return content

    @property
    def path(self) -> str:
        return f"/policies/{self.name}/act"

    @property
    def observation(self) -> str:
        return self.signature.observations[0].name


def any_answer(requests: list[bytes], **how: Any) -> Questions:
    """The tests check answers; here every answer with status 200 counts."""
    return Questions(requests, [[0]] * len(requests), read=lambda _: [0], **how)


def posting(encode: Callable[[Subject, Array], bytes], headers: Mapping[str, str], query: str = "") -> Asking:
    return lambda subject: any_answer(
        [subject.post(subject.path + query, encode(subject, item), headers) for item in subject.items]
    )


def raw(_: Subject, item: Array) -> bytes:
    return item.tobytes()


def lists(subject: Subject, item: Array) -> bytes:
    return json.dumps({subject.observation: item.tolist()}).encode()


def tensors(subject: Subject, item: Array) -> bytes:
    return save({subject.observation: item})


def carried(subject: Subject, item: Array) -> bytes:
    state = {state.spec.name: state.initial_value(1)[0] for state in subject.signature.state}
    return save({subject.observation: item, **state})


def in_sessions(subject: Subject) -> Questions:
    requests = []
    for number in range(SESSIONS):
        session = json.loads(subject.send(f"/policies/{subject.name}/sessions", b"{}"))["session"]
        item = subject.items[number % len(subject.items)]
        requests.append(subject.post(subject.path, item.tobytes(), RAW_TYPE | {"X-Session": session}))
    return any_answer(requests)


def streaming(subject: Subject) -> Questions:
    """Messages of a WebSocket, an observation each."""
    screens = Screens(subject.items, [0] * len(subject.items))
    asked = stream(screens, f"/policies/{subject.name}/stream", {"Authorization": f"Bearer {subject.token}"})
    return replace(asked, read=lambda _: [0])


def inferring(subject: Subject, sequences: bool = False) -> Questions:
    """The Open Inference Protocol's binary tensors."""
    spec = subject.signature.observations[0]
    shape = [1, *spec.shape]
    given: dict[str, Any] = {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}
    given["parameters"] = {"binary_data_size": spec.item_bytes}
    requests = []
    for number in range(SESSIONS if sequences else len(subject.items)):
        parameters: dict[str, Any] = {"sequence_id": number + 1} if sequences else {}
        if sequences:
            _infer(subject, given, number, parameters | {"sequence_start": True}, send=True)
        requests.append(_infer(subject, given, number, parameters))
    return any_answer(requests)


def _infer(subject: Subject, given: Mapping[str, Any], number: int, parameters: object, send: bool = False) -> bytes:
    """An infer request. `send`: it is sent, too, and answered."""
    document = {"inputs": [given], "outputs": [{"name": subject.signature.action.name}], "parameters": parameters}
    head = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    body = head + subject.items[number % len(subject.items)].tobytes()
    path = f"/v2/models/{subject.name}/infer"
    if send:
        subject.send(path, body, headers)
    return subject.post(path, body, headers)


def several(subject: Subject) -> Questions:
    """`FRAMES` observations a request, one behind the other."""
    bodies = [subject.items[first : first + FRAMES].tobytes() for first in range(0, REQUESTS, FRAMES)]
    return any_answer([subject.post(subject.path, body, RAW_TYPE) for body in bodies], frames=FRAMES)


def in_shared_memory(subject: Subject) -> Questions:
    """The same in shared memory."""
    spec = subject.signature.observations[0]
    memory = SharedMemory(create=True, size=subject.items.nbytes)
    atexit.register(memory.unlink)
    assert memory.buf is not None
    memory.buf[: subject.items.nbytes] = subject.items.tobytes()
    region = {"key": memory.name, "offset": 0, "byte_size": subject.items.nbytes}
    subject.send("/v2/systemsharedmemory/region/frames/register", json.dumps(region).encode())
    given: dict[str, Any] = {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": [FRAMES, *spec.shape]}
    requests = []
    for first in range(0, REQUESTS, FRAMES):
        place: dict[str, Any] = {"shared_memory_region": "frames"}
        place |= {"shared_memory_byte_size": FRAMES * spec.item_bytes, "shared_memory_offset": first * spec.item_bytes}
        outputs = [{"name": subject.signature.action.name}]
        document = json.dumps({"inputs": [given | {"parameters": place}], "outputs": outputs}).encode()
        requests.append(subject.post(f"/v2/models/{subject.name}/infer", document, JSON_TYPE))
    return any_answer(requests, frames=FRAMES)


def rows() -> Iterator[tuple[str, str, Asking]]:
    """(policy, way, how): the first of each policy is what the others are compared with."""
    for policy in POLICIES:
        yield policy, "raw", posting(raw, RAW_TYPE)
        yield policy, "safetensors", posting(tensors, SAFETENSORS_TYPE)
        yield policy, "all outputs", posting(raw, RAW_TYPE, "?outputs=" + OUTPUTS[policy])
        yield policy, "stream", streaming
        yield policy, "session", in_sessions
        yield policy, "OIP, binary", inferring
        yield policy, "OIP, sequence", partial(inferring, sequences=True)
        if policy == "cart":
            yield policy, "JSON", posting(lists, JSON_TYPE)
        else:
            yield policy, "zstd", posting(lambda _, item: zstd.compress(item.tobytes()), ZSTD_TYPE)
            yield policy, "PNG", posting(lambda _, item: encode_png(item), {"Content-Type": wire.PNG})
        if policy == "pong":
            yield policy, "8 frames, raw", several
            yield policy, "8 frames, shared memory", in_shared_memory
        if policy == "pong-lstm":
            yield policy, "carried state", posting(carried, SAFETENSORS_TYPE | {"Accept": wire.SAFETENSORS})


def prepare(models: Path) -> Path:
    """A store with all `POLICIES`: two from the store `models`, and one that is exported here."""
    store = CACHE / "store"
    shutil.rmtree(store, ignore_errors=True)
    for name in ("pong", "pong-lstm"):
        latest = ModelStore(models).resolve(name).folder
        shutil.copytree(latest, store / name / latest.name)
    command = [sys.executable, "-m", "actserve", "export", "tests.policies:cart", "--runtime", "onnx"]
    subprocess.run([*command, "--store", store], check=True, stdout=subprocess.DEVNULL)
    for name in POLICIES:
        tune_briefly(ModelStore(store).resolve(name), lambda _: None)
    return store


def observations(store: Path, name: str) -> Array:
    """(32, *shape): those that the certificate was made with."""
    artifact = ModelStore(store).resolve(name)
    golden = load_file(artifact.folder / "golden.safetensors")
    spec = artifact.manifest.signature.observations[0]
    return np.resize(golden[f"input.{spec.name}"], (REQUESTS, *spec.shape))


class Run:
    """Every row in turn. `found` has the microseconds an action of each round, by policy, way and connections."""

    def __init__(self, wanted: argparse.Namespace, console: Console) -> None:
        self.found: dict[tuple[str, str, int], list[float]] = {}
        self.errors: list[str] = []
        self._wanted, self._console = wanted, console
        self._on = cores()

    def play(self, store: Path) -> None:
        os.sched_setaffinity(0, {self._on[1]})
        signatures = {name: ModelStore(store).resolve(name).manifest.signature for name in POLICIES}
        items = {name: observations(store, name) for name in POLICIES}
        for number in range(self._wanted.rounds):
            self._console.print(f"round {number + 1}/{self._wanted.rounds}")
            port = free_port()
            tokens = store.with_name(f"tokens-{port}")
            token = add_token(tokens, "benchmark")
            command = [sys.executable, "-m", "actserve", "serve", "--runtime", "onnx", "--store", store, "--port", port]
            # 64 requests of 8 frames are 60 ms of work.
            environment = {"ACTSERVE_TOKENS": str(tokens), "ACTSERVE_MAX_WAIT_MS": "250"}
            environment["ACTSERVE_MAX_SESSIONS_PER_TOKEN"] = str(len(POLICIES) * 2 * SESSIONS)
            with running(list(map(str, command)), ("127.0.0.1", port), self._on[:1], environment) as server:
                subjects = {name: Subject(name, signatures[name], items[name], port, token) for name in POLICIES}
                _wait(server, subjects.values())
                asked = [
                    (policy, way, ask(subjects[policy]))
                    for policy, way, ask in rows()
                    if fnmatch(f"{policy} {way}", self._wanted.only)
                ]
                for policy, way, questions in asked:
                    self._measure(server, policy, way, questions)
            if fnmatch(FASTAPI, self._wanted.only):
                self._measure_fastapi(store, items["cart"])

    def _measure_fastapi(self, store: Path, items: Array) -> None:
        port = free_port()
        environment = {"PORT": str(port), "PROGRAM": str(ModelStore(store).resolve("cart").folder / "policy.onnx")}
        command = [sys.executable, "-m", "tests.benchmarks.peers.fastapi_json"]
        requests = [request("/act", json.dumps({"observation": item.tolist()}).encode(), JSON_TYPE) for item in items]
        with running(command, ("127.0.0.1", port), self._on[:1], environment) as server:
            questions = any_answer(requests)
            server.first_answer_s(questions)
            self._measure(server, "cart", FASTAPI, questions)

    def _measure(self, server: Server, policy: str, way: str, questions: Questions) -> None:
        costs = []
        for connections in self._wanted.connections:
            try:
                cell = measure(server, questions, way, connections, self._wanted.seconds, self._on)
            except DoesNotServe as error:
                self.errors.append(f"{policy}, {way}: {error}")
                continue
            if cell.errors:
                self.errors.append(f"{policy}, {way}, {connections} connections: {cell.errors}")
            self.found.setdefault((policy, way, connections), []).append(cell.cpu_us)
            costs.append(f"{cell.cpu_us:,.0f}")
        self._console.print(f"  {policy}, {way}: {' / '.join(costs)} µs", highlight=False)


def _wait(server: Server, subjects: Iterable[Subject]) -> None:
    """Until all policies are served."""
    for subject in subjects:
        server.first_answer_s(any_answer([subject.post(subject.path, subject.items[0].tobytes(), RAW_TYPE)]))


def table(found: Mapping[tuple[str, str, int], list[float]], connections: list[int]) -> Table:
    shown = Table("policy", "way", *[f"{count} connections" for count in connections], title="server CPU an action")
    ways = list(dict.fromkeys((policy, way) for policy, way, _ in found))
    for policy, way in ways:
        first = next(other for name, other in ways if name == policy)
        cells = []
        for count in connections:
            each, base = found.get((policy, way, count)), found.get((policy, first, count))
            if each is None or base is None:
                cells.append("-")
                continue
            ratio = statistics.median(one / other for one, other in zip(each, base, strict=False))
            cells.append(f"{statistics.median(each):,.0f} µs  {ratio:.2f}")
        shown.add_row(policy, way, *cells)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("models_store"), help="with pong and pong-lstm")
    parser.add_argument("--only", default="*", help="a pattern of a policy and a way, such as 'cart *'")
    parser.add_argument("--connections", default="8,64")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    wanted.connections = [int(count) for count in wanted.connections.split(",")]
    console = Console(stderr=True)
    run = Run(wanted, console)
    run.play(prepare(wanted.store))
    Console().print(table(run.found, wanted.connections))
    for error in run.errors:
        console.print(error, style="red", highlight=False)
    return 1 if run.errors else 0


if __name__ == "__main__":
    sys.exit(main())
