"""Policy: one artifact being served, with a verified and warm runtime behind a batcher."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np

from actserve.core.completion import complete
from actserve.core.errors import RuntimeFailure, RuntimeRefused, StoreError
from actserve.core.settings import Settings
from actserve.core.signature import Arrays, Exploration
from actserve.engine import threads
from actserve.engine.arena import BATCHES, Arena
from actserve.engine.batch import Answer
from actserve.engine.batcher import Batcher, BatcherStatistics
from actserve.engine.malloc import trim
from actserve.engine.recorders import PolicyRecorder, StepRecorder
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.base import Runtime
from actserve.engine.threads import ElasticRuntime
from actserve.engine.tuning import Tuning
from actserve.engine.tuning.tuned import Tuned
from actserve.store.artifact import Artifact
from actserve.telemetry import call
from actserve.telemetry.counts import ProgramLabels

log = logging.getLogger("actserve")

# A call of a program takes at most so long, or `HANG_FACTOR` times as long as when it was measured.
HANG_NS = 30 * 10**9
HANG_FACTOR = 20


@dataclass(frozen=True)
class Acted:
    """A policy's answer. New state has the name of the input that it replaces."""

    outputs: Arrays  # and new state, each (size, *shape)
    seed: int | None  # of the noise; None: nothing was random
    queue_ns: int  # waiting for the runtime
    run_ns: int  # in the runtime
    recorder: StepRecorder | None = None  # to be committed if the step counts; None: it is not recorded


class Policy:
    """A served policy. Made by `Policy.load`; `start` and `close` belong to the event loop."""

    def __init__(
        self,
        artifact: Artifact,
        runtime: Runtime | ElasticRuntime,
        choice: preflight.Choice,
        tuning: Tuning,
        settings: Settings,
    ) -> None:
        self.artifact = artifact
        self.name, self.version = artifact.manifest.name, artifact.manifest.version
        self.signature = artifact.manifest.signature
        self.choice = choice
        self.recorder: PolicyRecorder | None = None  # None: nothing is recorded
        self._runtime = runtime
        self.tuning = tuning
        arena = Arena(self.signature, tuning.batch) if Arena.suits(self.signature) else None
        max_wait_ns = int(settings.max_wait_ms * 1e6)
        self.batcher = Batcher(
            runtime.run,
            tuning.batch,
            min(settings.max_waiting, max(BATCHES * tuning.batch, max_wait_ns // tuning.best_ns)),
            max_wait_ns=max_wait_ns,
            quick=tuning.quick,
            arena=arena,
            limited=self.signature.limits is not None,
        )

    @classmethod
    def load(cls, artifact: Artifact, settings: Settings, narrower: Sequence[Artifact] = ()) -> Policy:
        """Choose a runtime, open the program, run the golden samples through it (which also warms it).

        `narrower` are the same policy in narrower precisions: the fastest program acts. Blocking; to be called off the
        event loop. Raises `StoreError`, `RuntimeRefused` or `RuntimeFailure`.
        """
        opened = _open(artifact, settings)
        for other in narrower:
            opened = _faster(opened, artifact, other, settings)
        log.info("%s is served by .%s (%s)", artifact.label, opened.choice.runtime, opened.choice.reason)
        if not opened.tuning.quick:
            trim()  # the golden samples of large policies take much memory
        return cls(artifact, opened.runtime, opened.choice, opened.tuning, settings)

    def start(self) -> None:
        self.batcher.start()

    async def act(
        self,
        tensors: Arrays,
        size: int,
        exploration: Exploration | None = None,
        seed: int | None = None,
        patience_ns: int = 0,
        recorder: StepRecorder | None = None,
    ) -> Acted:
        """Act on `size` items of a valid request, each tensor (size, *shape).

        `patience_ns` is how long the request may wait; 0 is for ever. `recorder` records it, if the caller commits it.
        Raises as `Batcher.submit`.
        """
        completed = complete(self.signature, tensors, size, exploration, seed)
        if recorder is not None:
            recorder.seed = completed.seed
        since_ns = perf_counter_ns()
        answer = await self._run(completed.inputs, size, patience_ns, recorder)
        call.record_act(since_ns, answer.queue_ns, answer.run_ns)
        results = answer.outputs
        for state in self.signature.state:
            results[state.spec.name] = results.pop(state.output)
        return Acted(results, completed.seed, answer.queue_ns, answer.run_ns, recorder)

    def state_after(self, acted: Acted) -> Arrays:
        """The new state for the next request, each (size, *shape): a copy, so that the batch's arrays are freed."""
        return {state.spec.name: acted.outputs[state.spec.name].copy() for state in self.signature.state}

    async def _run(self, inputs: Arrays, size: int, patience_ns: int, recorder: StepRecorder | None) -> Answer:
        step = self.tuning.batch
        if size <= step:
            return await self.batcher.submit(inputs, size, patience_ns, recorder)
        slices = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        # One slice after the other, so that a large batch takes turns with other requests and never fills the queue.
        parts = []
        for s in slices:
            part = {name: array[s] for name, array in inputs.items()}
            parts.append(await self.batcher.submit(part, s.stop - s.start, patience_ns, recorder))
            await asyncio.sleep(0)  # a quick program has run already: let other requests run
        outputs = {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs}
        return Answer(outputs, sum(part.queue_ns for part in parts), sum(part.run_ns for part in parts))

    @property
    def program(self) -> ProgramLabels:
        return ProgramLabels(self.name, self.version, self.choice.runtime)

    def check_program(self, elapsed_ns: int) -> None:
        """See `Batcher.check_program`."""
        slowest_ns = max(size * ns for size, ns in self.tuning.item_ns.items())
        self.batcher.check_program(max(HANG_NS, HANG_FACTOR * slowest_ns), elapsed_ns)

    def statistics(self) -> BatcherStatistics:
        return self.batcher.statistics()

    async def close(self) -> None:
        """Answer the queued requests, then free the program."""
        await self.closing()()

    def closing(self) -> Callable[[], Awaitable[None]]:
        """A function that does what `close` does, without a reference to the policy."""
        return functools.partial(_close, self.batcher, self._runtime)

    def describe(self) -> dict[str, Any]:
        """JSON-able: the version that is served, its runtime, the reason for that runtime, and its limits if any."""
        limits = self.signature.limits
        return {
            "name": self.name,
            "version": self.version,
            "runtime": self.choice.runtime,
            "reason": self.choice.reason,
            **({} if limits is None else {"limits": asdict(limits)}),
        }


@dataclass(frozen=True)
class _Opened:
    """A verified and measured program."""

    runtime: Runtime | ElasticRuntime
    choice: preflight.Choice
    tuning: Tuning


def _open(artifact: Artifact, settings: Settings) -> _Opened:
    """The program that `settings.runtime` wants. Raises as `Policy.load`."""
    log.info("loading %s", artifact.label)
    failed: dict[str, str] = {}
    tuned = Tuned.load(artifact) if settings.threads in (None, 1) else None
    while True:
        fastest = tuned.fastest if tuned else None
        choice = preflight.choose(settings.runtime, artifact.manifest, preflight.this_host(), failed, fastest)
        measured = tuned.programs.get(choice.runtime) if tuned else None
        try:
            runtime, tuning = threads.load(choice.runtime, artifact, settings, measured)
        except RuntimeFailure as error:
            if settings.runtime != "auto":
                raise
            log.warning("%s", error.message)
            failed[choice.runtime] = error.message
            continue
        return _Opened(runtime, choice, tuning)


def _faster(best: _Opened, artifact: Artifact, other: Artifact, settings: Settings) -> _Opened:
    """The faster one of `best` and the program of `other`, which is narrower; the slower one is closed."""
    try:
        opened = _open(other, settings)
    except (StoreError, RuntimeRefused, RuntimeFailure) as error:
        log.warning("%s is not used for %s: %s", other.label, artifact.label, error.message)
        return best
    ratio = opened.tuning.best_ns / best.tuning.best_ns
    if ratio >= 1:
        log.info("%s is not used for %s: it takes %.2f of the time", other.label, artifact.label, ratio)
        opened.runtime.close()
        return best
    best.runtime.close()
    reason = f"{other.label}, as --precision any allows: it takes {ratio:.2f} of the time of {best.choice.reason}"
    return _Opened(opened.runtime, preflight.Choice(opened.choice.runtime, reason), opened.tuning)


async def _close(batcher: Batcher, runtime: Runtime | ElasticRuntime) -> None:
    await batcher.close()
    runtime.close()
