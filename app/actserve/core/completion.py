"""What a request leaves out: initial state, the reset flag, parameters' defaults, and randomness from a seed.

Randomness comes from a counter-based generator (Philox 4x64, Salmon et al. 2011) keyed by (seed, item): the same seed
gives the same numbers to the same item of a request, whatever else is in the batch and wherever it is run.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from actserve.core.errors import InvalidRequest
from actserve.core.signature import EXPLORE, IS_INIT, Array, Arrays, Exploration, Noise, Signature

MAX_SEED = 2**63 - 1  # what every JSON reader and int64 can hold
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Completed:
    """Every input of a program, and the seed that its noise came from (None: nothing random was asked for)."""

    inputs: Arrays
    seed: int | None


def complete(
    signature: Signature,
    tensors: Mapping[str, Array],
    size: int,
    exploration: Exploration | None = None,
    seed: int | None = None,
) -> Completed:
    """`tensors`, a valid request of `size` items -> everything that the program takes, each (size, *shape).

    Raises `InvalidRequest`.
    """
    exploration, seed = decide(signature, exploration, seed)
    inputs = dict(tensors)
    begins = any(state.spec.name not in tensors for state in signature.state)
    for state in signature.state:
        if state.spec.name not in inputs:
            inputs[state.spec.name] = np.full((size, *state.spec.shape), state.initial, state.spec.numpy_dtype)
    if signature.is_init and IS_INIT.name not in inputs:
        inputs[IS_INIT.name] = np.full(size, begins)
    for parameter in signature.parameters:
        inputs.setdefault(parameter.name, np.full(size, parameter.default, np.float32))
    if len(signature.exploration) > 1:
        inputs[EXPLORE.name] = np.full(size, exploration == "random")
    if seed is not None:
        inputs |= draw(signature.noise, seed, size)
    else:
        inputs |= {noise.spec.name: noise.spec.zeros(size) for noise in signature.noise}
    return Completed(inputs, seed)


def decide(signature: Signature, exploration: Exploration | None, seed: int | None) -> tuple[Exploration, int | None]:
    """How to act, by default deterministically if the policy can, and the seed of what is random in that: a fresh one
    if none was given, None if nothing is. Raises `InvalidRequest`."""
    exploration = exploration or signature.exploration[0]
    if exploration not in signature.exploration:
        raise InvalidRequest(
            f"expected an exploration of {' or '.join(signature.exploration)}; got {exploration!r}"[:200],
            expected=list(signature.exploration),
        )
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(f"expected a seed of 0 to 2**63 - 1; got {seed}")
    if not signature.noise or exploration != "random":
        return exploration, None
    return exploration, secrets.randbelow(MAX_SEED) if seed is None else seed


def step_seed(seed: int, step: int) -> int:
    """The seed of the noise of one step, counted from 1, of an episode with `seed`; both of 0 to 2**63 - 1.

    The first eight bytes of SHA-256 over the two, each as eight bytes, little-endian, the highest bit cleared: the
    seeds of neighbouring steps and episodes have nothing in common, and any client can derive them.
    """
    digest = hashlib.sha256(seed.to_bytes(8, "little") + step.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little") & MAX_SEED


def draw(noises: tuple[Noise, ...], seed: int, size: int) -> Arrays:
    """The noise inputs of `size` items, each (size, *shape) float32."""
    generators = [np.random.Generator(np.random.Philox(key=np.array([seed, item], np.uint64))) for item in range(size)]
    return {noise.spec.name: np.stack([_one(noise, generator) for generator in generators]) for noise in noises}


def _one(noise: Noise, generator: np.random.Generator) -> Array:
    shape = noise.spec.shape
    if noise.distribution == "uniform":
        return np.asarray(generator.random(shape, np.float32))
    if noise.distribution == "normal":
        return np.asarray(generator.standard_normal(shape, np.float32))
    exponential = np.maximum(generator.standard_exponential(shape, np.float32), _TINY)  # its logarithm must be finite
    return np.asarray(exponential if noise.distribution == "exponential" else -np.log(exponential), np.float32)
