"""Policies made at random, and the check that each is served as it acts, or refused with a reason that names the cause.

A generated policy has one or two observations, layers, perhaps a module that overwrites an observation in front, an
index, a buffer, state, noise, and perhaps mixes the items of a batch. `python -m tests.generated --count 2000` checks
many.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.nn import functional
from torchrl.envs.utils import ExplorationType, set_exploration_type

from actserve.core.completion import complete
from actserve.core.errors import ActserveError
from actserve.core.signature import Arrays, Signature
from actserve.engine import golden
from actserve.engine.runtimes.load import load
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export.capture import capture
from actserve_export.publish import export
from actserve_export.sources import samples
from actserve_export.sources.policy_source import PolicySource

NOISES = ("none", "none", "none", "where", "bernoulli", "multinomial", "normal")
MIXES = ("none", "none", "none", "max", "mean", "centre", "softmax")
BUFFERS = ("none", "none", "frozen", "counts", "averages", "attribute")
STATES = ("none", "none", "next", "beside")
LOOKUPS = ("none", "none", "none", "embedding", "one_hot", "from one", "halved")
ROWS = 7  # of the table, for lookups
DTYPES = (torch.float32, torch.float32, torch.uint8, torch.int64)
ITEMS = 24
STEPS = 12


@dataclass(frozen=True)
class Recipe:
    """The choices that make a policy."""

    seed: int
    widths: tuple[int, ...]  # of the observations
    dtypes: tuple[torch.dtype, ...]
    hidden: int
    actions: int
    noise: str
    mix: str
    buffer: str
    state: str
    overwrites: bool  # a module in front writes the key that it reads
    in_place: bool
    dashed: bool  # the observations' names have dashes and dots
    lookup: str  # how one more observation, "place", is an index; "halved": computed, so that no bound is known

    @property
    def hides_state(self) -> bool:
        return self.buffer in ("counts", "averages", "attribute")

    @property
    def names(self) -> list[str]:
        names = ("robot-0.state", "noise") if self.dashed else ("observation", "action")
        return [*names[: len(self.widths)], *["place"] * (self.lookup != "none")]


def recipe(seed: int) -> Recipe:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 3))
    return Recipe(
        seed,
        tuple(int(width) for width in rng.integers(1, 6, count)),
        tuple(DTYPES[i] for i in rng.integers(0, len(DTYPES), count)),
        int(rng.integers(4, 12)),
        int(rng.integers(2, 6)),
        NOISES[rng.integers(len(NOISES))],
        MIXES[rng.integers(len(MIXES))],
        BUFFERS[rng.integers(len(BUFFERS))],
        STATES[rng.integers(len(STATES))],
        bool(rng.random() < 0.3),
        bool(rng.random() < 0.2),
        bool(rng.random() < 0.2),
        LOOKUPS[rng.integers(len(LOOKUPS))],
    )


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() * 0.5


class Generated(nn.Module):
    """(observations..., h if there is state) -> action, action_value, the next h."""

    def __init__(self, made: Recipe) -> None:
        super().__init__()
        torch.manual_seed(made.seed)
        self.made = made
        width = sum(made.widths) + (3 if made.state != "none" else 0) + (made.lookup != "none") * ROWS
        self.body = nn.Sequential(nn.Linear(width, made.hidden), nn.Tanh(), nn.Linear(made.hidden, made.actions))
        self.cell = nn.Linear(width, 3)
        self.table = nn.Embedding(ROWS, ROWS)
        self.offset: Tensor
        self.register_buffer("offset", torch.randn(width) * 0.1)
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        parts = [tensor.float() / (255 if tensor.dtype == torch.uint8 else 1) for tensor in inputs]
        if self.made.lookup != "none":
            place = len(self.made.widths)
            parts[place] = self._look_up(inputs[place])
        x = torch.cat(parts, -1)
        if self.made.in_place:
            inputs[0].mul_(1 if inputs[0].dtype != torch.float32 else 0.5)
        x = self._buffer(x)
        q = self._mix(self.body(x))
        action = self._noise(q)
        if self.made.state == "none":
            return action, q
        return action, q, torch.tanh(self.cell(x))

    def _look_up(self, place: Tensor) -> Tensor:
        if self.made.lookup == "one_hot":
            return functional.one_hot(place, ROWS).float()
        if self.made.lookup == "from one":
            return self.table(place - 1)
        return self.table(place // 2 if self.made.lookup == "halved" else place)

    def _buffer(self, x: Tensor) -> Tensor:
        if self.made.buffer == "frozen":
            return x - self.offset
        if self.made.buffer == "counts":
            self.count += 1
            return x + 0.01 * self.count
        if self.made.buffer == "averages":
            self.offset = 0.9 * self.offset + 0.1 * x.detach().mean(0)
            return x - self.offset
        if self.made.buffer == "attribute":
            self.calls += 1
            return x + 0.1 * (self.calls % 3)
        return x

    def _mix(self, q: Tensor) -> Tensor:
        if self.made.mix == "max":
            return q / q.abs().max()
        if self.made.mix == "mean":
            return q - q.mean()
        if self.made.mix == "centre":
            return q - q.mean(0)
        if self.made.mix == "softmax":
            return q.softmax(0)
        return q

    def _noise(self, q: Tensor) -> Tensor:
        if self.made.noise == "where":
            return torch.where(torch.rand(q.shape[0]) < 0.3, torch.randint(q.shape[-1], (q.shape[0],)), q.argmax(-1))
        if self.made.noise == "bernoulli":
            return torch.bernoulli(torch.sigmoid(q))
        if self.made.noise == "multinomial":
            return torch.multinomial(q.softmax(-1), 1).squeeze(-1)
        if self.made.noise == "normal":
            return q + 0.1 * torch.randn_like(q)
        return q.argmax(-1)


def policy(made: Recipe) -> PolicySource:
    names = made.names
    example = {n: torch.zeros(w).to(t) for n, w, t in zip(names, made.widths, made.dtypes, strict=False)}
    if made.lookup != "none":
        example["place"] = torch.tensor(1)
    inputs = list(names)
    outputs: list[Any] = ["action", "action_value"]
    if made.state != "none":
        inputs.append("h")
        outputs.append(("next", "h") if made.state == "next" else "h")
        example["h"] = torch.linspace(-1, 1, 3)
    module: Any = TensorDictModule(Generated(made).eval(), in_keys=inputs, out_keys=outputs)
    if made.overwrites:
        front = TensorDictModule(Scaled(), in_keys=names[:1], out_keys=names[:1])
        module = TensorDictSequential(front, module)
    return PolicySource(module, TensorDict(example))


def eager(source: PolicySource, made: Recipe, item: Arrays) -> Arrays:
    """The user's own module on one item, (1, *shape) each; for policies without noise."""
    names = {*made.names, "h"}
    given = {name: torch.from_numpy(array.copy()) for name, array in item.items() if name in names}
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        result = source.policy(TensorDict(given, batch_size=[1]))
    found = {name: result.get(name).numpy() for name in ("action", "action_value")}
    if made.state != "none":
        found["next_h"] = result.get(("next", "h") if made.state == "next" else "h").numpy()
    return found


def check(seed: int, runtimes: tuple[str, ...] = ("onnx",)) -> str:
    """ "served" or "refused". Raises AssertionError if the policy is served differently, or refused for no cause."""
    made = recipe(seed)
    with tempfile.TemporaryDirectory(prefix="generated-") as folder:
        try:
            artifact = export(
                policy(made), "generated", ModelStore(Path(folder)), origin="tests.generated", runtimes=runtimes
            ).artifact
        except ActserveError as error:
            assert made.hides_state, f"{made} was refused: {error.message}"
            hidden = {"counts": "count", "averages": "offset", "attribute": "calls"}[made.buffer]
            assert hidden in error.message, f"{made}: the reason does not name {hidden!r}: {error.message}"
            return "refused"
        assert not made.hides_state, f"{made} has hidden state and was published"
        for name in runtimes:
            _check_program(artifact, name, made)
    return "served"


def _check_program(artifact: Artifact, name: str, made: Recipe) -> None:
    signature = artifact.manifest.signature
    if made.lookup not in ("none", "halved"):
        (place,) = (spec for spec in signature.observations if spec.name == "place")
        first = int(made.lookup == "from one")
        assert (place.low, place.high) == (first, first + ROWS - 1), f"{made}: {place}"
    rng = np.random.default_rng(made.seed)
    source = policy(made)
    reference = capture(source).run_reference
    inputs = samples.collect(source, signature, ITEMS)
    expected = golden.in_batches(reference, inputs, 1)
    if made.noise == "none":
        alone = [eager(policy(made), made, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(ITEMS)]
        for output in alone[0]:
            own = np.concatenate([item[output] for item in alone])
            np.testing.assert_allclose(expected[output], own, rtol=1e-4, atol=1e-4, err_msg=f"{made}: {output}")
    runtime = load(name, artifact)
    size = min(8, signature.max_batch)
    for _ in range(3):
        order = rng.permutation(ITEMS)
        ours = golden.in_batches(runtime.run, {k: np.ascontiguousarray(v[order]) for k, v in inputs.items()}, size)
        agreement = golden.compare(signature, ours, {k: v[order] for k, v in expected.items()}, golden.Tolerance())
        assert agreement.holds, f"{made} on .{name}: {agreement}"
    if signature.state:
        state = {s.spec.name: s.initial_value(1) for s in signature.state}
        theirs = dict(state)
        observed = [spec.name for spec in signature.observations]
        for step in range(STEPS):
            seen = {key: inputs[key][step : step + 1] for key in observed}
            ours = runtime.run(_completed(signature, seen | state, step))
            eagerly = reference(_completed(signature, seen | theirs, step))
            np.testing.assert_allclose(ours[signature.action.name], eagerly[signature.action.name], 1e-4, 1e-4)
            state = {s.spec.name: ours[s.output] for s in signature.state}
            theirs = {s.spec.name: eagerly[s.output] for s in signature.state}
    runtime.close()


def _completed(signature: Signature, given: Arrays, seed: int) -> Arrays:
    """The inputs of a program for one item: `given`, and everything that the service adds."""
    inputs = complete(signature, given, 1, seed=seed).inputs
    return {spec.name: inputs[spec.name] for spec in signature.inputs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--runtimes", default="onnx")
    arguments = parser.parse_args()
    logging.getLogger("actserve").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    begun = time.monotonic()
    for seed in range(arguments.first, arguments.first + arguments.count):
        try:
            found[check(seed, tuple(arguments.runtimes.split(",")))] += 1
        except Exception as error:  # the run goes on, and ends with a count of failures
            found["failed"] += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        if seed % 20 == 0:
            print(f"{seed - arguments.first + 1} of {arguments.count}: {dict(found)}", file=sys.stderr, flush=True)
    print(f"{sum(found.values())} policies in {time.monotonic() - begun:.0f} s: {dict(found)}")
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
