"""The metrics of this process. All names in `/metrics` are here; `docs/observability.md` explains them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from actserve.core.errors import SessionsUnavailable
from actserve.engine.registry import Registry
from actserve.recording.recorder import Recorder
from actserve.server.memory import Memory
from actserve.server.sessions import Sessions
from actserve.telemetry.counts import OK
from actserve.telemetry.families import Families, Family, Merge
from actserve.telemetry.loop_lag import LoopLag

SECONDS = 1e-9  # meters count nanoseconds


def collect(
    registry: Registry,
    sessions: Sessions,
    rates: Mapping[str, float],
    lag: LoopLag,
    memory: Memory,
    recorder: Recorder | None = None,
) -> Families:
    """`rates`: actions a second, by policy."""
    families = [*_requests(registry), *_programs(registry), *_state(registry, sessions, rates), *_loop(lag, memory)]
    families += _process()
    families += [] if recorder is None else _recording(recorder)
    return {family.name: family for family in families}


def _counter(name: str, help_: str) -> Family:
    return Family(name, help_, "counter", Merge.TOTAL)


def _gauge(name: str, help_: str, merge: Merge = Merge.SUM) -> Family:
    return Family(name, help_, "gauge", merge)


def _histogram(name: str, help_: str) -> Family:
    return Family(name, help_, "histogram", Merge.TOTAL)


def _requests(registry: Registry) -> list[Family]:
    requests = _counter("actserve_requests", "Answered requests and stream messages, by status.")
    refused = _counter("actserve_refused", "Requests and stream messages answered with an error, by its code.")
    for (policy, transport, route), tally in registry.counts.tallies.items():
        labels = {"policy": policy, "transport": transport, "route": route}
        for code, count in {OK: tally.answered, **tally.codes}.items():
            if count:
                requests.add({**labels, "code": code}, count, "_total")
        for reason, count in tally.reasons.items():
            refused.add({**labels, "reason": reason}, count, "_total")
    return [requests, refused]


def _programs(registry: Registry) -> list[Family]:
    actions = _counter("actserve_actions", "Items that a policy acted on.")
    sizes = _histogram("actserve_batch_size", "Items of an inference call.")
    run = _histogram("actserve_inference_seconds", "Time of an inference call.")
    queue = _histogram("actserve_queue_seconds", "Time from the last byte of a request until its inference call.")
    limited = _counter("actserve_limited", "Items that the limits of a policy changed, by reason.")
    for program, meters in registry.counts.programs.items():
        labels = program._asdict()
        actions.add(labels, meters.sizes.total, "_total")
        sizes.add_histogram(labels, meters.sizes)
        run.add_histogram(labels, meters.run_ns, SECONDS)
        queue.add_histogram(labels, meters.queue_ns, SECONDS)
        for reason, items in meters.limited.items():
            limited.add({"policy": program.policy, "version": program.version, "reason": reason.label}, items, "_total")
    return [actions, sizes, run, queue, limited]


def _state(registry: Registry, sessions: Sessions, rates: Mapping[str, float]) -> list[Family]:
    info = _gauge("actserve_policy_info", "1 for each live program.", Merge.MAX)
    waiting = _gauge("actserve_waiting", "Items that wait or run.")
    for policy in registry.live:
        labels = policy.program._asdict()
        info.add(labels, 1)
        waiting.add(labels, policy.statistics().waiting)
    rate = _gauge("actserve_actions_per_second", "Actions a second, over the last ten seconds.")
    for name, value in rates.items():
        rate.add({"policy": name}, value)
    count = _gauge("actserve_sessions", "Sessions of all workers.", Merge.MAX)
    size = _gauge("actserve_session_bytes", "Size of the states and last answers of all sessions.", Merge.MAX)
    with suppress(SessionsUnavailable):  # the other metrics are still available
        statistics = sessions.statistics()
        count.add({}, statistics.sessions)
        size.add({}, statistics.bytes)
    swaps = _counter("actserve_swaps", "Swaps of the live version, in each worker.")
    shadows = _counter("actserve_shadow_items", "Items for a shadow, in each worker, by outcome.")
    for name in registry.names:
        swaps.add({"policy": name}, registry.swaps[name], "_total")
        for outcome, items in registry.shadow_outcomes(name).items():
            shadows.add({"policy": name, "outcome": outcome}, items, "_total")
    streams = _gauge("actserve_streams", "Open WebSocket streams.")
    streams.add({}, registry.counts.streams)
    return [info, waiting, rate, count, size, swaps, shadows, streams]


def _loop(lag: LoopLag, memory: Memory) -> list[Family]:
    lags = _histogram("actserve_loop_lag_seconds", "How much too late a timer of the event loop ran.")
    lags.add_histogram({}, lag.lag_ns, SECONDS)
    longest = _gauge("actserve_loop_lag_max_seconds", "The longest lag of the last minute or two.", Merge.MAX)
    longest.add({}, lag.longest_ns * SECONDS)
    held = _gauge("actserve_connection_bytes", "Memory that the connections of each worker hold.")
    held.add({"worker": os.getpid()}, memory.taken_bytes + memory.measured_bytes)
    return [lags, longest, held]


def _recording(recorder: Recorder) -> list[Family]:
    steps = _counter("actserve_recording_steps", "Steps since recording is on, by outcome: recorded, or why not.")
    for recorded in recorder.recorded:
        manifest = recorded.artifact.manifest
        labels = {"policy": manifest.name, "version": manifest.version}
        for outcome, count in recorded.counts().items():
            steps.add({**labels, "outcome": outcome}, count, "_total")
    written = _counter("actserve_recording_bytes", "Size of the complete files of the recording.")
    written.add({}, recorder.file_bytes, "_total")
    cpu = _counter("actserve_recording_cpu_seconds", "CPU time that recording took.")
    cpu.add({}, (recorder.budget.copying_ns + recorder.budget.writing_ns) * SECONDS, "_total")
    stopped = _gauge("actserve_recording_stopped", "Workers whose recording has stopped, by the reason.")
    if recorder.stopped is not None:
        stopped.add({"reason": recorder.stopped}, 1)
    return [steps, written, cpu, stopped]


def _process() -> list[Family]:
    """The process metrics of prometheus_client, for this worker."""
    from prometheus_client import PROCESS_COLLECTOR  # it is not needed to start

    families = []
    for metric in PROCESS_COLLECTOR.collect():
        family = Family(metric.name, metric.documentation, metric.type, Merge.SUM)
        for sample in metric.samples:
            family.add({"worker": os.getpid()}, sample.value, sample.name.removeprefix(metric.name))
        families.append(family)
    return families
