"""The clients of the chaos benchmark: one for every door. Each holds every answer against the policy run alone."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import urllib3
from safetensors.numpy import load, save
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from actserve import wire
from actserve.client.remote_policy import RemotePolicy
from actserve.client.sequence import OipSequence
from actserve.client.stream import Stream
from actserve.core.completion import complete
from actserve.core.errors import ServiceError, ServiceUnreachable
from actserve.core.signature import Array, Arrays
from actserve.engine.golden import INPUT
from actserve.engine.runtimes.onnx_runtime import OnnxRuntime
from actserve.store.artifact import GOLDEN
from actserve.store.local import ModelStore
from tests.oip import in_binary
from tests.oip_grpc import infer

STEPS = 16  # of an episode
ANSWER_S = 10.0
PAUSE_S = 0.01  # between two requests of a client
POOR, GONE = 503, (404, 410)


class Models:
    """The bundled policies, run alone: the action for each screen, and for each step of an episode over the screens."""

    def __init__(self, store: ModelStore) -> None:
        single, recurrent = (store.resolve(name) for name in ("pong", "pong-lstm"))
        self.screens: Array = load((single.folder / GOLDEN).read_bytes())[f"{INPUT}pixels"][:STEPS]
        runtime = OnnxRuntime.load(single, 1)
        signature = single.manifest.signature
        self.actions = [
            int(runtime.run(complete(signature, {"pixels": screen[None]}, 1).inputs)["action"][0])
            for screen in self.screens
        ]
        runtime, signature = OnnxRuntime.load(recurrent, 1), recurrent.manifest.signature
        self.episode: list[int] = []
        state: Arrays = {}
        for screen in self.screens:
            outputs = runtime.run(complete(signature, {"pixels": screen[None], **state}, 1).inputs)
            state = {part.spec.name: outputs[part.output] for part in signature.state}
            self.episode.append(int(outputs["action"][0]))


@dataclass
class Door:
    """The results of the requests through one protocol."""

    name: str
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # state that the documents promise to keep
    others: Counter[str] = field(default_factory=Counter)  # refused, broken connections, episodes that ended
    right_s: float = 0.0  # the time of the last right answer

    def hold(self, got: int, expected: int, what: str) -> None:
        if got == expected:
            self.right += 1
            self.right_s = time.monotonic()
        else:
            self.wrong.append(f"{what}: {got}, expected {expected}")


class Clients:
    """One thread for each door, until `stop`."""

    def __init__(self, url: str, grpc_address: str, models: Models) -> None:
        self._url, self._grpc_address, self._models = url, grpc_address, models
        self._stopping = threading.Event()
        plays: dict[str, Callable[[Door], None]] = {
            "raw": self._raw,
            "JSON": self._json,
            "safetensors": self._safetensors,
            "session": self._session,
            "stream": self._stream,
            "OIP": self._oip,
            "gRPC": self._grpc,
        }
        self.doors = {name: Door(name) for name in plays}
        self._threads = [threading.Thread(target=self._repeat, args=(play, self.doors[n])) for n, play in plays.items()]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, play: Callable[[Door], None], door: Door) -> None:
        while not self._stopping.is_set():
            try:
                play(door)
            except (ServiceUnreachable, ServiceError, urllib3.exceptions.HTTPError, grpc.RpcError, OSError) as error:
                door.others[type(error).__name__] += 1
                self._stopping.wait(0.05)

    # single requests

    def _post(self, door: Door, path: str, body: bytes, content_type: str, **headers: str) -> bytes | None:
        with urllib3.HTTPConnectionPool(*self._address, maxsize=1, timeout=ANSWER_S, retries=False) as pool:
            answer = pool.request("POST", path, body=body, headers={"Content-Type": content_type, **headers})
        if answer.status == 200:
            return answer.data
        door.others[str(answer.status)] += 1
        if answer.status != POOR:
            door.wrong.append(f"{path}: {answer.status} {answer.data[:200]!r}")
        return None

    @property
    def _address(self) -> tuple[str, int]:
        host, _, port = self._url.removeprefix("http://").partition(":")
        return host, int(port)

    def _singles(self, door: Door, ask: Callable[[Array], int | None]) -> None:
        for screen, action in zip(self._models.screens, self._models.actions, strict=True):
            if self._stopping.wait(PAUSE_S):
                return
            got = ask(screen)
            if got is not None:
                door.hold(got, action, "action")

    def _raw(self, door: Door) -> None:
        def ask(screen: Array) -> int | None:
            body = self._post(door, "/policies/pong/act", screen.tobytes(), wire.RAW)
            return None if body is None else int(json.loads(body)["action"])

        self._singles(door, ask)

    def _json(self, door: Door) -> None:
        def ask(screen: Array) -> int | None:
            b64 = base64.b64encode(screen.tobytes()).decode()
            document = {"pixels": {"dtype": "uint8", "shape": screen.shape, "b64": b64}}
            body = self._post(door, "/policies/pong/act", json.dumps(document).encode(), wire.JSON)
            return None if body is None else int(json.loads(body)["action"])

        self._singles(door, ask)

    def _safetensors(self, door: Door) -> None:
        def ask(screen: Array) -> int | None:
            body = self._post(
                door, "/policies/pong/act", save({"pixels": screen}), wire.SAFETENSORS, Accept=wire.SAFETENSORS
            )
            return None if body is None else int(load(body)["action"])

        self._singles(door, ask)

    def _grpc(self, door: Door) -> None:
        with grpc.insecure_channel(self._grpc_address) as channel:
            stub = GRPCInferenceServiceStub(channel)

            def ask(screen: Array) -> int:
                answer = stub.ModelInfer(infer({"pixels": screen[None]}, model_name="pong"), timeout=ANSWER_S)
                return int(np.frombuffer(answer.raw_output_contents[0], np.int64)[0])

            self._singles(door, ask)

    # episodes

    def _session(self, door: Door) -> None:
        """A session survives everything: a step whose answer was lost is sent again, and is taken once."""
        with RemotePolicy(self._url, "pong-lstm") as policy:
            session = policy.session()
            for step, (screen, action) in enumerate(zip(self._models.screens, self._models.episode, strict=True)):
                got = self._insist(door, lambda: session.act(screen))  # noqa: B023, it is called at once
                if got is None:
                    return
                door.hold(got, action, f"step {step + 1} of a session")
            session.end()

    def _insist(self, door: Door, act: Callable[[], Any]) -> int | None:
        while not self._stopping.wait(PAUSE_S):
            try:
                return int(act())
            except ServiceUnreachable:
                door.others["ServiceUnreachable"] += 1
            except ServiceError as error:
                door.others[str(error.status)] += 1
                if error.status in GONE:
                    door.lost.append(error.message[:200])
                    return None
                if error.status != POOR:
                    raise
            self._stopping.wait(0.05)
        return None

    def _stream(self, door: Door) -> None:
        with Stream(self._url, "pong-lstm") as stream:
            self._play(door, stream.act)

    def _oip(self, door: Door) -> None:
        """Single requests, then a sequence. A sequence is over when an answer is lost: it has no step numbers."""
        with RemotePolicy(self._url, "pong-lstm") as policy:
            sequence = OipSequence(policy)
            self._play(door, sequence.act)
            sequence.end()
        body, headers = in_binary({"pixels": self._models.screens[:1]})
        content = self._post(door, "/v2/models/pong/infer", body, wire.RAW, **headers)
        if content is not None:
            door.hold(json.loads(content)["outputs"][0]["data"][0], self._models.actions[0], "infer")

    def _play(self, door: Door, act: Callable[[Array], Any]) -> None:
        for step, (screen, action) in enumerate(zip(self._models.screens, self._models.episode, strict=True)):
            if self._stopping.wait(PAUSE_S):
                return
            door.hold(int(act(screen)), action, f"step {step + 1} of an episode")
