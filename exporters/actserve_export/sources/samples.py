"""The samples of a certificate: values for every input of a program."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from actserve.core.completion import draw_noise
from actserve.core.signature import EXPLORE, IS_INIT, SMALL_INTEGERS, Array, Arrays, Signature, TensorSpec
from actserve_export.sources.interfaces import ExportSource

EPISODES_BEGIN = 0.1  # the share of items on the first step of an episode
BOUNDARY = 8  # two of every 8 random items are at the boundary: all lowest and all highest values


def collect(source: ExportSource, signature: Signature, count: int) -> Arrays:
    """`count` items of every input, each (count, *shape); the same every time.

    Observations are real if the source can observe, else random, with boundary values among them. State is the initial
    state where an episode begins, and random elsewhere.
    """
    rng = np.random.default_rng(0)
    inputs = observations(source, signature, count, rng)
    begins = rng.random(count) < EPISODES_BEGIN
    for state in signature.state:
        spec = _within_limits(state.spec, signature)
        values = spec.sample(rng, count)
        values[begins] = state.initial_value(1)
        unbounded = spec.low is None and spec.high is None
        counts = state.spec.numpy_dtype.kind == "i" and unbounded
        inputs[state.spec.name] = np.abs(np.maximum(values, -state.spec.limits[1])) if counts else values
    if signature.is_init:
        inputs[IS_INIT.name] = begins
    for parameter in signature.parameters:
        high = max(1.0, 2 * parameter.default)
        high = high if parameter.high is None else min(high, parameter.high)
        values = rng.uniform(parameter.low, high, count).astype(np.float32)
        values[: count // 2] = parameter.default
        inputs[parameter.name] = rng.permutation(values)
    if len(signature.exploration) > 1:
        inputs[EXPLORE.name] = rng.random(count) < 0.5
    return {spec.name: (inputs | draw_noise(signature.noise, 0, count))[spec.name] for spec in signature.inputs}


def _within_limits(spec: TensorSpec, signature: Signature) -> TensorSpec:
    """The previous action and its age with the bounds that the limits keep them in. Requests may have others."""
    for limit in signature.limits.outputs if signature.limits is not None else ():
        if spec.name == limit.previous and limit.allowed is not None:
            return replace(spec, low=float(min(limit.allowed)), high=float(max(limit.allowed)))
        if spec.name == limit.previous:
            return replace(spec, low=limit.low, high=limit.high)
        if spec.name == limit.age:
            return replace(spec, low=0.0, high=limit.dwell)
    return spec


def observations(source: ExportSource, signature: Signature, count: int, rng: np.random.Generator) -> Arrays:
    """(count, *shape) of each observation."""
    observed = source.observations(count)
    if observed is not None:
        return {spec.name: observed[spec.name] for spec in signature.observations}
    return {spec.name: _random(spec, source, count, rng) for spec in signature.observations}


def _random(spec: TensorSpec, source: ExportSource, count: int, rng: np.random.Generator) -> Array:
    if spec.low is not None or spec.high is not None:
        return _bounded(spec, source, count, rng)
    if spec.dtype in ("int32", "int64"):  # most likely an index: only values that the source knows are safe
        largest = max(1, source.largest_value(spec.name))
        return rng.integers(0, largest, (count, *spec.shape), spec.numpy_dtype, endpoint=True)
    values = spec.sample(rng, count)
    if source.is_covariance(spec.name):
        return (values @ values.swapaxes(-1, -2) / spec.shape[-1]).astype(spec.numpy_dtype)
    if spec.dtype == "bool" and "mask" in spec.name:
        values[..., 0] |= ~values.any(-1)  # a mask allows at least one action
    elif spec.dtype == "bool":
        values[::BOUNDARY], values[1::BOUNDARY] = False, True
    elif spec.dtype in SMALL_INTEGERS:
        values[::BOUNDARY], values[1::BOUNDARY] = spec.limits
    return values


def _bounded(spec: TensorSpec, source: ExportSource, count: int, rng: np.random.Generator) -> Array:
    """As `_random`, within the bounds; the elements without bounds are as if there were none."""
    free = np.broadcast_to(np.isinf(spec.each_low) & np.isinf(spec.each_high), spec.shape)
    values = spec.sample(rng, count)
    for index, bound in enumerate((spec.each_low, spec.each_high)):
        values[index::BOUNDARY] = np.where(np.isinf(bound), values[index::BOUNDARY], bound)
    if free.any():
        values = np.where(free, _random(replace(spec, low=None, high=None), source, count, rng), values)
    return values
