"""Compares the programs of an artifact with the policy that was exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.data import Bounded, Unbounded
from torchrl.envs import Compose, InitTracker, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import GRUModule, LSTMModule
from torchrl.modules.utils import get_primers_from_module

from actserve.core.completion import complete
from actserve.core.errors import one_line
from actserve.core.signature import Arrays, Signature
from actserve.engine import golden
from actserve.store.artifact import Artifact
from actserve_export.publish import RUNTIMES
from actserve_export.sources.keys import key_name
from actserve_export.sources.policy_source import PolicySource
from tests.replay import ReplayEnv

ROWS, STEPS, DRAWS = 5, 24, 2000
NO_OBSERVATIONS = {"action", "done", "next", "reward", "terminated", "truncated"}
ENDS = (9, 10)  # steps of the replayed environment at which an episode ends
DIFFERENCE = 1e-4
DISTANCE = 2.3 * (2 / DRAWS) ** 0.5  # Kolmogorov-Smirnov, beyond which one column in 20,000 would be by chance


class Differs(Exception):
    """A served result is not the original's."""


Steps = list[tuple[Arrays, dict[str, Any]]]  # inputs without state, and the original's results by name


def compare(source: PolicySource, artifact: Artifact) -> str:
    """Raises `Differs`. Returns what was compared."""
    signature = artifact.manifest.signature
    programs = {runtime: golden.load(runtime, artifact, 1) for runtime in RUNTIMES}
    notes = []
    try:
        steps = _original(source, signature, seed=0)
    except RuntimeError as error:  # of a distribution that has no mean
        return f"the original has no deterministic actions: {one_line(error)}"
    if _same(steps, _original(source, signature, seed=1)):
        for runtime, program in programs.items():
            _follow(runtime, program, signature, steps)
        notes.append(f"{len(steps)} steps")
    else:
        notes.append("the original draws for deterministic actions")
    if "random" in signature.exploration and not _transforms(source):
        wanted = _drawn(source, signature, steps[0][0])
        for runtime, program in programs.items():
            _same_distribution(runtime, program, signature, steps[0][0], wanted)
        notes.append(f"{DRAWS} draws")
    return ", ".join(notes)


def _transforms(source: PolicySource) -> Any:
    """The transforms of an environment in front of the policy, or None."""
    first = source.policy[0] if type(source.policy) is TensorDictSequential else None
    return first if isinstance(first, Compose) or getattr(first, "parent", None) is not None else None


def _original(source: PolicySource, signature: Signature, seed: int) -> Steps:
    """The original's own steps. Observations are the same for every `seed`."""
    torch.manual_seed(seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return _played(source, signature) if _transforms(source) else _stepped(source, signature)


def _stepped(source: PolicySource, signature: Signature) -> Steps:
    """`ROWS` episodes at once; state goes from ("next", key) to key, as `step_mdp` does it."""
    rng = np.random.default_rng(0)
    rows = min(ROWS, signature.max_batch)
    steps: Steps = []
    held = source.example.expand(rows, *source.example.shape).clone()
    for step in range(STEPS if signature.state else 3):
        given = _observations(signature, rng, rows)
        for key in held.keys(include_nested=True, leaves_only=True):
            if key_name(key) in given:
                held.set(key, torch.from_numpy(given[key_name(key)]).to(held.get(key).dtype))
        if signature.is_init:
            given["is_init"] = np.full(rows, step == 0)
            held.set("is_init", torch.full((rows, 1), step == 0))
        held = source.policy(held)
        steps.append((given, _by_name(held, signature)))
        nexts = held.pop("next", None)
        if nexts is not None:
            held.update(nexts)
    return steps


def _observations(signature: Signature, rng: np.random.Generator, rows: int) -> Arrays:
    given = {}
    for spec in signature.observations:
        given[spec.name] = spec.sample(rng, rows)
        if "mask" in spec.name:
            given[spec.name][..., 0] = True
        if "covariance" in spec.name:
            root = rng.standard_normal((rows, *spec.shape))
            given[spec.name] = (root @ root.swapaxes(-1, -2) / 10).astype(spec.numpy_dtype)
    return given


def _by_name(result: TensorDict, signature: Signature) -> dict[str, Any]:
    found = {}
    for key in result.keys(include_nested=True, leaves_only=True):
        name = key_name(key)
        if name in signature.output_names:
            value = result.get(key)
            found[name] = value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy().copy()
    return found


def _played(source: PolicySource, signature: Signature) -> Steps:
    """One environment behind the policy's transforms."""
    transform, actor = source.policy[0], source.policy[1:]
    base = _base(transform.parent)
    if not isinstance(base, ReplayEnv):
        names = set(source.example.keys()) - NO_OBSERVATIONS  # a transform may take away what the policy does not read
        specs = {name: _spec(source.example[name]) for name in names}
        base = ReplayEnv(specs, Bounded(-1, 1, (2,)))
    parts = transform if isinstance(transform, Compose) else [transform]
    environment = TransformedEnv(base, Compose(*(part.clone() for part in parts), InitTracker()))
    if any(isinstance(module, (GRUModule, LSTMModule)) for module in actor.modules()):
        environment.append_transform(get_primers_from_module(actor))
    base.ends, base.recording.steps[:] = ENDS, []
    base.generator.manual_seed(0)
    steps: Steps = []
    tensordict = environment.reset()
    for _ in range(STEPS):
        tensordict = actor(tensordict)
        result = _by_name(tensordict, signature)
        seen = base.recording.steps[-1]
        given = {
            spec.name: np.asarray(seen.observation.get(spec.name, seen.reward)).astype(spec.numpy_dtype)[None]
            for spec in signature.observations
        }
        if signature.is_init:
            given["is_init"] = np.array([seen.is_init])
        steps.append((given, {name: value[None] for name, value in result.items()}))
        tensordict = tensordict.set("action", tensordict.get("action", torch.zeros(2)))
        _, tensordict = environment.step_and_maybe_reset(tensordict)
    return steps


def _base(environment: Any) -> Any:
    """The environment below all transforms, or None."""
    while isinstance(environment, TransformedEnv):
        environment = environment.base_env
    return environment


def _spec(value: torch.Tensor) -> Any:
    if value.dtype is torch.uint8:
        return Bounded(0, 255, tuple(value.shape), dtype=torch.uint8)
    return Unbounded(tuple(value.shape), dtype=value.dtype)


def _same(one: Steps, other: Steps) -> bool:
    return all(np.allclose(a[1][name], b[1][name], atol=1e-6) for a, b in zip(one, other, strict=True) for name in a[1])


def _follow(runtime: str, program: Any, signature: Signature, steps: Steps) -> None:
    """Each step's results in a batch, and those of its first item alone."""
    state: Arrays = {}
    alone: Arrays = {}
    for number, (given, wanted) in enumerate(steps):
        size = len(next(iter(given.values())))
        results = program.run(complete(signature, given | state, size, "deterministic").inputs)
        first = {name: values[:1] for name, values in given.items()}
        singly = program.run(complete(signature, first | alone, 1, "deterministic").inputs)
        state = {part.spec.name: results[part.output] for part in signature.state}
        alone = {part.spec.name: singly[part.output] for part in signature.state}
        for name, expected in wanted.items():
            for served, of, how in ((results[name], expected, "batch"), (singly[name], expected[:1], "alone")):
                _near(served, of, f"{runtime}, step {number}, {name}, {how}")


def _near(served: Any, wanted: Any, where: str) -> None:
    wanted = np.asarray(wanted).reshape(served.shape)
    if served.dtype.kind in "iub" or wanted.dtype.kind in "iub":
        close = served == wanted
    else:
        close = np.isclose(served, wanted, DIFFERENCE, DIFFERENCE, equal_nan=True)
    if not close.all():
        raise Differs(f"{where}: {served[~close].ravel()[:4]} for {wanted[~close].ravel()[:4]}")


def _drawn(source: PolicySource, signature: Signature, given: Arrays) -> Any:
    """(DRAWS, columns): the original's random actions on one observation."""
    torch.manual_seed(5)
    held = source.example.expand(DRAWS, *source.example.shape).clone()
    for key in held.keys(include_nested=True, leaves_only=True):
        if key_name(key) in given:
            first = torch.from_numpy(given[key_name(key)][:1]).to(held.get(key).dtype)
            held.set(key, first.expand(DRAWS, *first.shape[1:]).clone())
    if signature.is_init:
        held.set("is_init", torch.ones(DRAWS, 1, dtype=torch.bool))
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        result = _by_name(source.policy(held), signature)
    return result[signature.output_names[0]].reshape(DRAWS, -1).astype(float)


def _same_distribution(runtime: str, program: Any, signature: Signature, given: Arrays, wanted: Any) -> None:
    drawn = []
    size = min(signature.max_batch, DRAWS)
    first = {name: values[:1].repeat(size, 0) for name, values in given.items()}
    for seed in range(-(-DRAWS // size)):
        results = program.run(complete(signature, first, size, "random", seed).inputs)
        drawn.append(results[signature.output_names[0]].reshape(size, -1).astype(float))
    served = np.concatenate(drawn)[:DRAWS]
    for column in range(wanted.shape[1]):
        distance = _distance(served[:, column], wanted[:, column])
        if distance > DISTANCE:
            raise Differs(f"{runtime}: column {column} of random actions, distance {distance:.3f}")


def _distance(one: Any, other: Any) -> float:
    """The largest difference of two empirical distribution functions. Rounding is no difference."""
    one, other = np.round(one, 5), np.round(other, 5)
    at = np.unique(np.concatenate([one, other]))
    both = [np.searchsorted(np.sort(values), at, "right") / len(values) for values in (one, other)]
    return float(np.abs(both[0] - both[1]).max())
