"""A trained policy in one file: it needs numpy and onnxruntime, and the other files of this folder.

    from policy import Policy

    policy = Policy()
    episode = policy.episode(seed=1)   # keeps the state of a recurrent policy; the seed matters for random actions
    action = episode.act(observation)  # one observation, (*shape): the shapes are in manifest.json

`python policy.py` verifies the golden samples: inputs with the trained policy's own outputs. Seeds give the actions
that the service of actserve gives for them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Arrays = dict[str, Any]  # numpy arrays by tensor name; the first axis is the batch
MAX_SEED = 2**63 - 1
MAX_WRONG = 5  # outputs that are named
INPUT, OUTPUT = "input.", "output."  # of the names of golden samples


class BadInput(ValueError):
    """The input is wrong. The message says what was expected and what came."""


class Tensor:
    """One named tensor. `shape` is per item, without the batch axis. bfloat16 is held as float32."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.name: str = spec["name"]
        self.kind: str = spec["dtype"]
        self.shape = tuple(spec["shape"])
        self.dtype = np.dtype("float32" if self.kind == "bfloat16" else self.kind)
        self.bounds = [(spec.get("low"), np.less, "at least"), (spec.get("high"), np.greater, "at most")]

    def __str__(self) -> str:
        return f"{self.kind}[{', '.join(map(str, self.shape))}]"

    def check(self, batch: Any) -> Any:
        """`batch` as a row-major array (B, *shape); lists become arrays. Raises `BadInput`."""
        array = batch if isinstance(batch, np.ndarray) else np.asarray(batch, self.dtype)
        if array.dtype != self.dtype or array.shape[1:] != self.shape or array.ndim != len(self.shape) + 1:
            expected = f"{self.dtype}[B, {', '.join(map(str, self.shape))}]"
            raise BadInput(f"{self.name}: expected {expected}; got {array.dtype}{list(array.shape)}")
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise BadInput(f"{self.name}: expected numbers; got NaN")
        for bound, outside, relation in self.bounds:
            if bound is None:
                continue
            nothing = -np.inf if outside is np.less else np.inf
            each = np.array([nothing if one is None else one for one in np.atleast_1d(np.array(bound, object))], float)
            limit = each.reshape(self.shape) if isinstance(bound, list) else each
            if outside(array, limit).any():
                raise BadInput(
                    f"{self.name}: expected values of {relation} {bound}; got {array[outside(array, limit)][0]}"
                )
        return np.ascontiguousarray(array)


class Policy:
    """The program with its `observations`, `state` and `outputs` (the action first)."""

    def __init__(self, folder: str | Path | None = None, threads: int = 1) -> None:
        """Open the bundle in `folder`, by default the one of this file. Raises `ValueError` if a file was changed."""
        self.folder = Path(folder or Path(__file__).parent)
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_bytes())
        self.label = f"{self.manifest['name']}@{self.manifest['version']}"
        signature = self.manifest["signature"]
        self.observations = [Tensor(spec) for spec in signature["observations"]]
        self.outputs = [Tensor(spec) for spec in signature["outputs"]]
        self.action = self.outputs[0].name
        self.state = [(Tensor(part["spec"]), part["output"], part["initial"]) for part in signature["state"]]
        self.parameters = signature["parameters"]
        numbers = [Tensor({"dtype": "float32", "shape": (), **parameter}) for parameter in self.parameters]
        flags = [Tensor({"name": "is_init", "dtype": "bool", "shape": ()})] if signature["is_init"] else []
        self._known = [*self.observations, *(state for state, _, _ in self.state), *flags, *numbers]
        self.noise = [(Tensor(one["spec"]), one["distribution"], one["always"]) for one in signature["noise"]]
        self.modes = signature["exploration"]
        self.takes_is_init: bool = signature["is_init"]
        self.max_batch: int = signature["max_batch"]
        results = [*self.outputs, *(_renamed(tensor, output) for tensor, output, _ in self.state)]
        self._results = {tensor.name: tensor for tensor in results}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        program = self.read(self.manifest["programs"]["onnx"]["file"])
        self._session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        self._names = [node.name for node in self._session.get_outputs()]

    def read(self, file: str) -> bytes:
        """A file of the bundle. Raises `ValueError` if it is not the one that the manifest names."""
        data = (self.folder / file).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][file]["sha256"]:
            raise ValueError(f"{file} has changed: its SHA-256 is not the one in manifest.json")
        return data

    def run(self, inputs: Arrays) -> Arrays:
        """Call the program with all of its inputs, each (B, *shape) -> outputs and new state, each (B, *shape)."""
        return dict(zip(self._results, self._session.run(self._names, inputs), strict=True))

    def act(self, tensors: Arrays, exploration: str | None = None, seed: int | None = None) -> Arrays:
        """Act on B observations, each (B, *shape) -> outputs and new state, each (B, *shape).

        New state has the name of the input that it replaces: give it with the next observations. Without state, an
        episode begins. `exploration` is "deterministic" or "random". Raises `BadInput`.
        """
        found = self.run(self._complete(tensors, exploration, seed))
        outputs = {tensor.name: found[tensor.name] for tensor in self.outputs}
        return outputs | {state.name: found[output] for state, output, _ in self.state}

    def episode(self, exploration: str | None = None, seed: int | None = None) -> Episode:
        return Episode(self, exploration, seed)

    def _complete(self, tensors: Arrays, exploration: str | None, seed: int | None) -> Arrays:
        """Every input of the program."""
        begins = not any(state.name in tensors for state, _, _ in self.state)
        if unknown := set(tensors) - {tensor.name for tensor in self._known}:
            names = ", ".join(tensor.name for tensor in self._known)
            raise BadInput(f"expected inputs of {names}; got {unknown.pop()}")
        given = {tensor.name: tensor.check(tensors[tensor.name]) for tensor in self._known if tensor.name in tensors}
        needed = self.observations + [state for state, _, _ in self.state if not begins]
        if missing := [tensor for tensor in needed if tensor.name not in given]:
            raise BadInput(f"expected {missing[0].name}, {missing[0]}; got nothing")
        if len(sizes := {len(array) for array in given.values()}) != 1 or 0 in sizes:
            raise BadInput(f"expected the same number of items in every input, 1 at least; got {sorted(sizes)}")
        size = sizes.pop()
        if size > self.max_batch:
            raise BadInput(f"expected at most {self.max_batch} items; got {size}")
        for state, _, initial in self.state:
            one = np.reshape(np.asarray(initial, state.dtype), state.shape if np.ndim(initial) else ())
            given.setdefault(state.name, np.full((size, *state.shape), one, state.dtype))
        if self.takes_is_init:
            given.setdefault("is_init", np.full(size, begins))
        for parameter in self.parameters:
            given.setdefault(parameter["name"], np.full(size, parameter["default"], np.float32))
        exploration = exploration or self.modes[0]
        if exploration not in self.modes:
            raise BadInput(f"expected an exploration of {' or '.join(self.modes)}; got {exploration!r}")
        if len(self.modes) > 1:
            given["explore"] = np.full(size, exploration == "random")
        if any(always or exploration == "random" for _, _, always in self.noise):
            return given | self.draw(secrets.randbelow(MAX_SEED) if seed is None else seed, size)
        return given | {tensor.name: np.zeros((size, *tensor.shape), np.float32) for tensor, _, _ in self.noise}

    def draw(self, seed: int, size: int) -> Arrays:
        """The noise of `size` items, each (size, *shape) float32: Philox 4x64, keyed by (seed, item)."""
        if not 0 <= seed <= MAX_SEED:
            raise BadInput(f"expected a seed of 0 to 2**63 - 1; got {seed}")
        keys = [np.array([seed, item], np.uint64) for item in range(size)]
        items = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        drawn = [[_draw(kind, tensor.shape, item) for tensor, kind, _ in self.noise] for item in items]
        return {tensor.name: np.stack([one[i] for one in drawn]) for i, (tensor, _, _) in enumerate(self.noise)}


class Episode:
    """One run of an environment: keeps the state, and derives the seed of each step from the episode's."""

    def __init__(self, policy: Policy, exploration: str | None, seed: int | None) -> None:
        self._policy, self._exploration = policy, exploration
        self._seed = secrets.randbelow(MAX_SEED) if seed is None else seed
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self._state: Arrays = {}
        self._step = 0

    def act(self, *observations: Any, **parameters: float) -> Any:
        """The action for one observation, (*shape); several in the order of the signature. Raises `BadInput`."""
        return self.step(*observations, **parameters)[self._policy.action]

    def step(self, *observations: Any, **parameters: float) -> Arrays:
        """All outputs of one step, each (*shape)."""
        if len(observations) != len(self._policy.observations):
            names = ", ".join(f"{tensor.name} {tensor}" for tensor in self._policy.observations)
            raise BadInput(f"expected {names}; got {len(observations)} arrays")
        pairs = zip(self._policy.observations, observations, strict=True)
        tensors = {tensor.name: tensor.check(_one(tensor, array)) for tensor, array in pairs}
        tensors |= {name: np.array([value], np.float32) for name, value in parameters.items()}
        found = self._policy.act(tensors | self._state, self._exploration, step_seed(self._seed, self._step + 1))
        self._state = {state.name: found.pop(state.name) for state, _, _ in self._policy.state}
        self._step += 1
        return {name: array[0] for name, array in found.items()}


def step_seed(seed: int, step: int) -> int:
    """The seed of one step, counted from 1, of an episode with `seed`."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + step.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little") & MAX_SEED


def golden_samples(policy: Policy) -> tuple[Arrays, Arrays]:
    """(inputs, the trained policy's own outputs), by name. Raises `ValueError` if the file has changed."""
    tensors = _read_safetensors(policy.read("golden.safetensors"))
    inputs, outputs = (
        {name[len(prefix) :]: array for name, array in tensors.items() if name.startswith(prefix)}
        for prefix in (INPUT, OUTPUT)
    )
    return inputs, outputs


def verify(policy: Policy, inputs: Arrays, outputs: Arrays) -> list[str]:
    """Run the golden samples, one by one and in batches -> the differences; empty if there are none."""
    wrong: list[str] = []
    for size in sorted({1, min(8, policy.max_batch)}):
        parts = [policy.run(part) for part in _batches(inputs, size)]
        for name, tensor in policy._results.items():
            ours, expected = np.concatenate([part[name] for part in parts]), outputs[name]
            if not _agree(policy, tensor, ours, expected):
                wrong.append(f"{name} differs from the golden samples in batches of {size}")
    return wrong


def _agree(policy: Policy, tensor: Tensor, ours: Any, expected: Any) -> bool:
    tolerance = policy.manifest["certificate"]["tolerance"]
    if tensor.dtype.kind == "f":
        rounding = 2 * {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(tensor.kind, 0.0)
        absolute, relative = (max(tolerance[key], rounding) for key in ("absolute", "relative"))
        return np.allclose(ours.astype(float), expected.astype(float), rtol=relative, atol=absolute)
    if tensor.name == "limited" and policy.manifest["signature"].get("limits"):
        return bool((ours != expected).sum() <= max(1, len(ours) // 50))  # rounding decides at a limit
    return bool(np.array_equal(ours, expected))


def _batches(inputs: Arrays, size: int) -> Iterator[Arrays]:
    for start in range(0, len(next(iter(inputs.values()))), size):
        yield {name: array[start : start + size] for name, array in inputs.items()}


def _one(tensor: Tensor, array: Any) -> Any:
    return array[None] if isinstance(array, np.ndarray) else np.asarray(array, tensor.dtype)[None]


def _renamed(tensor: Tensor, name: str) -> Tensor:
    return Tensor({"name": name, "dtype": tensor.kind, "shape": tensor.shape})


def _draw(kind: str, shape: tuple[int, ...], generator: np.random.Generator) -> Any:
    if kind == "uniform":
        return generator.random(shape, np.float32)
    if kind == "normal":
        return generator.standard_normal(shape, np.float32)
    exponential = np.maximum(generator.standard_exponential(shape, np.float32), np.finfo(np.float32).tiny)
    return exponential if kind == "exponential" else -np.log(exponential)


_SAFETENSORS = {
    "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "I32": "i4", "I64": "i8",
    "F16": "f2", "F32": "f4", "F64": "f8", "BOOL": "?",
}  # fmt: skip


def _read_safetensors(data: bytes) -> Arrays:
    """The tensors of a file: the length of the header in eight bytes, the header in JSON, then the data."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    tensors = {}
    for name, spec in header.items():
        first, last = spec["data_offsets"]
        flat = np.frombuffer(data[end + first : end + last], np.dtype(_SAFETENSORS[spec["dtype"]]).newbyteorder("<"))
        tensors[name] = flat.reshape(spec["shape"])
    return tensors


def check(policy: Policy, calls: int) -> dict[str, Any]:
    """Verify the golden samples, and time calls -> samples, versions, and the median time of a call in ms.

    Raises `ValueError` if the golden samples are not repeated.
    """
    inputs, outputs = golden_samples(policy)
    if wrong := verify(policy, inputs, outputs):
        raise ValueError("; ".join(wrong[:MAX_WRONG]))
    one = next(_batches(inputs, 1))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        policy.run(one)
        times.append(1e3 * (time.perf_counter() - start))
    versions = {"Python": platform.python_version(), "numpy": np.__version__, "onnxruntime": onnxruntime.__version__}
    samples = len(next(iter(inputs.values())))
    return {"samples": samples, "versions": versions, "call_ms": sorted(times)[len(times) // 2] if times else None}


def main() -> int:
    parser = argparse.ArgumentParser(description="Verify the golden samples, and time the program.")
    parser.add_argument("--calls", type=int, default=200, help="how many calls to time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        policy = Policy()
        found = check(policy, options.calls)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        print(f"not verified: {error}"[:500], file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{policy.label}: {found['samples']} golden samples are repeated, one by one and in batches")
    if found["call_ms"] is not None:
        print(f"{found['call_ms']:.3f} ms a call (median of {options.calls})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
