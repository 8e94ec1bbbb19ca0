"""Frames a second of a `.pt2` program, by batch size, with and without pinned memory and CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from actserve.core.signature import Array
from actserve.engine.runtimes.aoti_package import call

Call = Callable[[], list[Array]]  # one batch -> the outputs, in host memory
MIN_CALLS = 3


@dataclass(frozen=True)
class Way:
    """How a batch gets to the program and back. All are the same code; on a CPU no memory is pinned."""

    name: str
    pinned: bool = False  # copied through page-locked host memory, which the GPU reads by itself
    graph: bool = False  # the program's kernels are recorded once and started by one call
    copied: bool = True  # False: the batch is in the device's memory already


SERVICE = "the service"
WAYS = (
    Way("program alone", copied=False),
    Way("kept buffers"),
    Way("pinned buffers", pinned=True),
    Way("program alone, graph", copied=False, graph=True),
    Way("pinned buffers, graph", pinned=True, graph=True),
)


def ways(device: str) -> list[Way]:
    """The ways that `device` has."""
    return [way for way in WAYS if device == "cuda" or not (way.pinned or way.graph)]


def as_the_service(package: Any, screens: Array, device: str) -> Call:
    return lambda: call(package, [screens], device)


def prepared(package: Any, screens: Array, device: str, way: Way) -> Call:
    """`screens` (n, *shape) -> a call that copies them, runs the program, and copies its outputs back."""
    given = torch.from_numpy(screens)
    host = torch.empty(given.shape, dtype=given.dtype, pin_memory=way.pinned)
    on_device = given.to(device, copy=True)
    run = _recorded(package, on_device) if way.graph else lambda: package.run([on_device])
    results = [torch.empty(out.shape, dtype=out.dtype, pin_memory=way.pinned) for out in run()]

    def one_call() -> list[Array]:
        if way.copied:
            host.copy_(given)  # as the batcher's arena would receive the bodies there
            on_device.copy_(host, non_blocking=way.pinned)
        for result, out in zip(results, run(), strict=True):
            result.copy_(out, non_blocking=way.pinned)
        finish(device)
        return [result.numpy() for result in results]

    return one_call


def _recorded(package: Any, on_device: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """The program on `on_device` as a CUDA graph. Its outputs stay where they are."""
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):  # before it is recorded, everything must have been allocated and loaded
        for _ in range(MIN_CALLS):
            package.run([on_device])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = package.run([on_device])

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return list(outputs)

    return replay


def finish(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(one_call: Callable[[], Any], seconds: float) -> float:
    """The median over `seconds`, after a call that does not count. `one_call` waits for the device."""
    one_call()
    durations: list[float] = []
    until = time.perf_counter() + seconds
    while len(durations) < MIN_CALLS or time.perf_counter() < until:
        begun = time.perf_counter()
        one_call()
        durations.append(time.perf_counter() - begun)
    return median(durations)


def tiled(screens: Array, size: int) -> Array:
    """`size` items (size, *shape), the first of them again where there are fewer."""
    return np.ascontiguousarray(np.take(screens, np.arange(size) % len(screens), axis=0))


def in_pieces(make: Callable[[Array], Call], screens: Array, largest: int) -> Call:
    """A call for a batch larger than the program takes: one call for each piece of at most `largest`."""
    calls = [make(screens[start : start + largest]) for start in range(0, len(screens), largest)]

    def all_of_them() -> list[Array]:
        parts = [[array.copy() for array in one_call()] if len(calls) > 1 else one_call() for one_call in calls]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    return all_of_them


def disagreement(outputs: Sequence[Array], expected: Sequence[Array], tolerance: float) -> str | None:
    """Why `outputs` are not what the policy gives; None: they are. Integers are equal, floats within `tolerance`."""
    for index, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
        if ours.dtype.kind != "f":
            wrong = int((ours != theirs).sum())
            if wrong:
                return f"{wrong} of {ours.size} entries of output {index} differ"
        elif not np.allclose(ours, theirs, rtol=tolerance, atol=tolerance):
            return f"output {index} differs by up to {np.abs(ours - theirs).max():.2g}"
    return None
