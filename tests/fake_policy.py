"""A recurrent policy in a few lines of numpy, its versions, and a registry of them: for the tests of sessions.

Its state is a running digest of everything that it has seen, so that a step lost, done twice, done on another
session's state or on another version shows in every action after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from actserve.core.completion import complete, step_seed
from actserve.core.errors import UnknownPolicy, UnknownVersion
from actserve.core.settings import Settings
from actserve.core.signature import Array, Arrays, Exploration, Noise, Signature, State, TensorSpec
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.preflight import Choice
from actserve.engine.tuning import Tuning
from actserve.store.artifact import Artifact, Manifest
from actserve.store.local import ModelStore

NAME = "digest"
X = TensorSpec("x", "int64", (), 0, 999)
INITIAL = 7
SIGNATURE = Signature(
    observations=(X,),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("value", "float32", (2,))),
    max_batch=16,
    state=(
        State(TensorSpec("digest", "int64", (2,)), "next_digest", INITIAL),
        State(TensorSpec("odd", "bool", ()), "next_odd"),
    ),
    is_init=True,
    exploration=("deterministic", "random"),
    noise=(Noise(TensorSpec("noise", "float32", ()), "uniform"),),
)
QUICK = Tuning({1: 50_000, 8: 10_000})  # as if a call took so long
SLOW = Tuning({1: 5_000_000, 8: 1_000_000})  # too long for the event loop
SETTINGS = Settings(max_wait_ms=60_000)  # that this host is slow is no overload
RECORD_BYTES = 8 + 8 + 16 + 1  # action, value, digest, odd


class DigestRuntime(Runtime):
    """Counts the items that it ran, and can be told to fail."""

    def __init__(self, version: int) -> None:
        super().__init__(SIGNATURE)
        self.version = version
        self.items = 0
        self.batches = 0
        self.failing = False

    @classmethod
    def load(cls, artifact: Artifact, threads: int, shared: Path | None = None) -> DigestRuntime:
        return cls(artifact.manifest.version)

    def _run(self, arrays: list[Array]) -> list[Array]:
        if self.failing:
            raise ValueError("told to fail")
        inputs = dict(zip([spec.name for spec in self.signature.inputs], arrays, strict=True))
        self.items += len(inputs["x"])
        self.batches += 1
        init = inputs["is_init"]
        before = np.where(init[:, None], INITIAL, inputs["digest"])  # (B, 2)
        seen = inputs["x"] + self.version * 1000 + (inputs["noise"] * 1e6).astype(np.int64)  # (B,)
        after = (before * 31 + seen[:, None] + np.array([0, 1])) % 1_000_003
        odd = np.where(init, False, inputs["odd"]) ^ (seen % 2 == 1)
        return [after[:, 0] + odd, (after / 7).astype(np.float32), after, odd]

    def close(self) -> None:
        pass


class Listing(ModelStore):
    """A store that only lists versions."""

    def __init__(self, policies: Mapping[int, Policy]) -> None:
        super().__init__(Path("nowhere"))
        self._policies = policies

    def versions(self, name: str) -> list[int]:
        return sorted(self._policies)


class Versions(Registry):
    """A registry of `digest` alone. `publish` makes a further version live, `withdraw` takes one away."""

    def __init__(self, tuning: Tuning = QUICK) -> None:
        self.tuning = tuning
        self.policies: dict[int, Policy] = {}
        super().__init__(Listing(self.policies), SETTINGS)
        self.runtimes: dict[int, DigestRuntime] = {}

    @property
    def highest(self) -> int:
        return max(self.policies)

    def publish(self) -> int:
        """To be called in the event loop that will step."""
        version = max(self.policies, default=0) + 1
        manifest = Manifest(1, NAME, version, None, "", SIGNATURE, None, {}, {}, {}, {})
        artifact = Artifact(Path("nowhere"), manifest)
        self.runtimes[version] = DigestRuntime.load(artifact, threads=1)
        policy = Policy(artifact, self.runtimes[version], Choice("onnx", ""), self.tuning, SETTINGS)
        policy.batcher.meters = self.counts.meters(policy.program)
        if self.recorder is not None:
            policy.recorder = self.recorder.of(artifact, "onnx")
        policy.start()
        self.policies[version] = self._live[NAME] = policy
        self.generation += 1
        return version

    def withdraw(self, version: int) -> Policy:
        return self.policies.pop(version)

    async def get(self, name: str | None = None, version: int | None = None) -> Policy:
        if name not in (None, NAME):
            raise UnknownPolicy(name, [NAME])
        version = self.highest if version is None else version
        if version not in self.policies:
            raise UnknownVersion(NAME, version, sorted(self.policies))
        return self.policies[version]

    async def resume(self, name: str, version: int) -> Policy:
        return await self.get(name, version)

    def describe(self, name: str) -> dict[str, Any]:
        if name not in self.names:  # nothing is ever loaded here
            raise UnknownPolicy(name, self.names)
        return super().describe(name)

    async def close(self) -> None:
        for policy in self.policies.values():
            await policy.close()


class Alone:
    """The expected answers of one session: the same program alone, one item at a time, its state in a variable."""

    def __init__(self, version: int, seed: int | None, exploration: Exploration | None) -> None:
        assert seed is not None
        self.version = version
        self.seed = seed
        self.exploration = exploration
        self.step = 0
        self.outputs: Arrays = {}
        self._runtime = DigestRuntime(version)
        self._state: Arrays = {}

    def peek(self, tensors: Mapping[str, Array]) -> Arrays:
        """The next step's results, without taking it."""
        seed = step_seed(self.seed, self.step + 1)
        return self._runtime.run(complete(SIGNATURE, {**tensors, **self._state}, 1, self.exploration, seed).inputs)

    def take(self, tensors: Mapping[str, Array]) -> Arrays:
        """The next step's outputs."""
        results = self.peek(tensors)
        self._state = {state.spec.name: results[state.output] for state in SIGNATURE.state}
        self.outputs = {name: results[name] for name in SIGNATURE.output_names}
        self.step += 1
        return self.outputs


def seen(x: int, is_init: bool | None = None) -> Arrays:
    """One item's request."""
    flag = {} if is_init is None else {"is_init": np.array([is_init])}
    return {"x": np.array([x], np.int64), **flag}


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
