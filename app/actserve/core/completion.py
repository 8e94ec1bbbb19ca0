"""Adds the inputs that a request leaves out: initial state, the reset flag, default parameters, and seeded noise.

Noise comes from a counter-based generator (Philox 4x64, Salmon et al. 2011) keyed by (seed, item). One seed gives one
item of a request the same numbers on every host, and in every batch.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from actserve.core.errors import InvalidRequest
from actserve.core.signature import EXPLORE, IS_INIT, Array, Arrays, Exploration, Noise, Signature

MAX_SEED = 2**63 - 1  # fits int64
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Completed:
    """Every input of a program, and the seed of its noise (None: the request is deterministic)."""

    inputs: Arrays
    seed: int | None


def complete(
    signature: Signature,
    tensors: Mapping[str, Array],
    size: int,
    exploration: Exploration | None = None,
    seed: int | None = None,
) -> Completed:
    """`tensors`, a valid request of `size` items -> every input of the program, each (size, *shape).

    Raises `InvalidRequest`.
    """
    exploration, seed = choose_exploration(signature, exploration, seed)
    inputs = dict(tensors)
    first_step = any(state.spec.name not in tensors for state in signature.state)
    for state in signature.state:
        if state.spec.name not in inputs:
            inputs[state.spec.name] = state.initial_value(size)
    if signature.is_init and IS_INIT.name not in inputs:
        inputs[IS_INIT.name] = np.full(size, first_step)
    for parameter in signature.parameters:
        inputs.setdefault(parameter.name, np.full(size, parameter.default, np.float32))
    if len(signature.exploration) > 1:
        inputs[EXPLORE.name] = np.full(size, exploration == "random")
    if seed is not None:
        inputs |= draw_noise(signature.noise, seed, size)
    else:
        inputs |= {noise.spec.name: noise.spec.zeros(size) for noise in signature.noise}
    return Completed(inputs, seed)


def blank_inputs(signature: Signature, size: int) -> Arrays:
    """Every input of a program for the first step of `size` episodes, each (size, *shape).

    Observations are zeros, or the valid values nearest to zero.
    """
    return complete(signature, {spec.name: spec.blank(size) for spec in signature.observations}, size).inputs


def choose_exploration(
    signature: Signature, exploration: Exploration | None, seed: int | None
) -> tuple[Exploration, int | None]:
    """The exploration mode and the seed of a request. Raises `InvalidRequest`.

    The default mode is the policy's first. Without a seed, a random one is chosen. If nothing is drawn, there is none.
    """
    exploration = exploration or signature.exploration[0]
    if exploration not in signature.exploration:
        raise InvalidRequest(
            f"expected an exploration of {' or '.join(signature.exploration)}; got {exploration!r}"[:200],
            expected=list(signature.exploration),
        )
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(f"expected a seed of 0 to 2**63 - 1; got {seed}")
    if not signature.draws(exploration):
        return exploration, None
    return exploration, secrets.randbelow(MAX_SEED) if seed is None else seed


def step_seed(seed: int, step: int) -> int:
    """The noise seed of one step (counted from 1) of an episode with `seed`, 0 to 2**63 - 1.

    It is SHA-256 over `seed` and `step`, eight little-endian bytes each. The digest's first eight bytes are read as a
    little-endian number, and its highest bit is cleared. So the seeds of neighbouring steps and episodes are
    unrelated, and any client can derive them.
    """
    digest = hashlib.sha256(seed.to_bytes(8, "little") + step.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little") & MAX_SEED


def draw_noise(noises: tuple[Noise, ...], seed: int, size: int, first_item: int = 0) -> Arrays:
    """The noise inputs of `size` items of a request, from `first_item` on, each (size, *shape) float32."""
    items = range(first_item, first_item + size)
    generators = [np.random.Generator(np.random.Philox(key=np.array([seed, item], np.uint64))) for item in items]
    return {noise.spec.name: np.stack([_draw_item(noise, generator) for generator in generators]) for noise in noises}


def _draw_item(noise: Noise, generator: np.random.Generator) -> Array:
    shape = noise.spec.shape
    if noise.distribution == "uniform":
        return np.asarray(generator.random(shape, np.float32))
    if noise.distribution == "normal":
        return np.asarray(generator.standard_normal(shape, np.float32))
    exponential = np.maximum(generator.standard_exponential(shape, np.float32), _TINY)  # log(0) is infinite
    return np.asarray(exponential if noise.distribution == "exponential" else -np.log(exponential), np.float32)
