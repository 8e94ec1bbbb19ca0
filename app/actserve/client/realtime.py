"""Realtime: acts at a fixed rate with a policy that answers late.

A policy that plans chunks of actions is asked early, in a thread of its own, while the actions of the last chunk are
taken. Its answer is used from the present control period on; the actions for periods that have passed are left out.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np

from actserve.client.remote_policy import Episode, RemotePolicy
from actserve.core.errors import ServiceError, ServiceUnreachable, UsageError
from actserve.core.plan import Plan
from actserve.core.robot import Robot
from actserve.core.signature import INFERENCE_DELAY, PREV_CHUNK, Array, Exploration

log = logging.getLogger("actserve")

RECENT = 50  # answers, of which the slowest says how early to ask
SPARE_TICKS = 2  # asked earlier than the slowest of these would need
KEPT = 1 << 17  # values of a report: 40 minutes at 50 Hz
RETRY_AFTER_S = 0.1  # if the service did not answer
FIRST_WITHIN_S = 30.0

Observation = Array | Mapping[str, Array]


@dataclass
class Report:
    """What happened. Times are in milliseconds."""

    ticks: int = 0
    starved: int = 0  # ticks without a planned action
    starved_at: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT))  # the last of them
    answers: int = 0
    failures: int = 0  # requests without an answer
    least_left: int | None = None  # planned actions that were left when a chunk came, at least
    late_ms: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))  # of the last ticks behind their times
    answer_ms: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def __str__(self) -> str:
        late, answers = (_percentiles(values) for values in (self.late_ms, self.answer_ms))
        return (
            f"{self.ticks:,} ticks, {self.starved} without a planned action; late by {late} ms; "
            f"{self.answers:,} answers after {answers} ms, {self.failures} failures; "
            f"at least {self.least_left} actions were left when a chunk came"
        )


class Realtime:
    """One episode at a fixed rate, with a policy whose signature says that it plans a `Chunk`.

        with Realtime(url, "arm", period_s=0.02) as loop:
            for _ in loop:
                robot.command(loop.act(robot.observe()))

    `period_s` is by default what the policy was exported with. While there is no planned action, `act` repeats the last
    one, or gives `safe_action`, and counts the period as starved. If the policy reads the last observations, (steps,
    *shape), give `act` the newest one, (*shape). Raises `UsageError` for a policy without chunks. Further arguments are
    as for `RemotePolicy`.
    """

    def __init__(
        self,
        url: str,
        policy: str | None = None,
        *,
        period_s: float | None = None,
        safe_action: Array | None = None,
        exploration: Exploration | None = None,
        seed: int | None = None,
        uds: str | None = None,
        token: str | None = None,
        robot: Robot | None = None,
    ) -> None:
        self._remote = RemotePolicy(url, policy, uds, token, robot)
        self._safe_action, self._exploration, self._seed = safe_action, exploration, seed
        self._wanted_period_s = period_s
        self.report = Report()
        self._tick = -1
        self._lock = threading.Lock()  # guards the plan and what follows
        self._came = threading.Condition(self._lock)
        self._asks = False  # whether an answer is awaited
        self._recent_s: list[float] = []
        self._error: Exception | None = None
        self._last: Array | None = None  # the action of the last period
        self._waited = False  # for the first chunk: the next period begins when it came
        self._histories: dict[str, deque[Array]] = {}
        self._requests: queue.SimpleQueue[tuple[int, Observation] | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self._remote.__enter__()
        try:
            self._prepare()
        except BaseException:
            self._remote.__exit__(None, None, None)
            raise
        self._thread = threading.Thread(target=self._ask_forever, name="actserve-realtime", daemon=True)
        self._thread.start()
        return self

    def _prepare(self) -> None:
        signature = self._remote.signature
        if signature.chunk is None:
            raise UsageError(f"{self._remote.name} gives one action at a time; expected a policy that plans chunks")
        if signature.slows_chunks:
            raise UsageError(
                f"{self._remote.name} limits the change between two actions, and a loop that holds its rate leaves out "
                "some: use a Stream with chunk='step'"
            )
        known = self._remote.robot.control_period_s if self._remote.robot else None
        period_s = self._wanted_period_s or signature.chunk.period_s or known
        if period_s is None:
            raise UsageError(f"{self._remote.name} does not say its control period: give period_s")
        self.period_s = period_s
        self._horizon = signature.planned.shape[0]
        self._plan = Plan(signature.chunk, self._horizon)
        self._inputs = {spec.name: spec for spec in signature.observations}
        outputs = [signature.chunk.output]
        self._episode: Episode = self._remote.episode(outputs, exploration=self._exploration, seed=self._seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._requests.put(None)
        self._thread.join(self.period_s + 1.0)  # of an answer that never comes, the thread ends with the process
        self._remote.__exit__(None, None, None)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the control periods, each at its time. A period that took too long delays the next ones."""
        begins_s = time.monotonic()
        while True:
            self._tick += 1
            late_s = time.monotonic() - begins_s
            self.report.late_ms.append(1000 * late_s)
            self.report.ticks += 1
            yield self._tick
            now_s = time.monotonic()
            begins_s = now_s if self._waited else max(begins_s + self.period_s, now_s - self.period_s)
            self._waited = False
            time.sleep(max(0.0, begins_s - time.monotonic()))

    def act(self, observation: Observation) -> Array:
        """The action for this control period, (*shape). Waits for the first chunk only.

        Raises the error of the first request, and later those that asking again does not help: an observation that the
        policy does not take, or a token that was revoked.
        """
        with self._lock:
            if self._error is not None and not _passes(self._error):
                raise self._error
            tick = max(self._tick, 0)
            given = self._named(observation)
            self._remember(given)
            if not self._asks and self._is_time(tick):
                self._asks = True
                self._requests.put((tick, self._complete(given, tick)))
            if self._last is None:
                self._wait_for_first()
            action = self._plan.action(tick)
            self._last = action if action is not None else self._starve(tick)
            return self._last

    def _is_time(self, tick: int) -> bool:
        """Whether to ask now: so early that the answer comes once `execute` actions are taken, or before the end."""
        ahead = self._delay_ticks() + SPARE_TICKS
        return self._plan.taken(tick) + ahead >= self._plan.chunk.execute or self._plan.left(tick) <= ahead

    def _delay_ticks(self) -> int:
        return math.ceil(max(self._recent_s, default=0.0) / self.period_s)

    def _named(self, observation: Observation) -> dict[str, Array]:
        if isinstance(observation, Mapping):
            return dict(observation)
        names = [name for name in self._inputs if name not in (PREV_CHUNK, INFERENCE_DELAY)]
        if len(names) > 1:
            raise UsageError(f"{self._remote.name} takes {', '.join(names)}: give them by name")
        return {names[0]: observation}

    def _remember(self, given: Mapping[str, Array]) -> None:
        """Keep the last observations of those inputs that have some of them, (steps, *shape)."""
        for name, value in given.items():
            spec = self._inputs.get(name)
            if spec is None or len(spec.shape) != np.ndim(value) + 1:
                continue
            history = self._histories.setdefault(name, deque(maxlen=spec.shape[0]))
            history.extend([np.array(value)] * max(1, spec.shape[0] - len(history)))

    def _complete(self, given: Mapping[str, Array], tick: int) -> Observation:
        """The observation with those before it, and with what real-time chunking reads, if the policy does."""
        given = {**given, **{name: np.stack(history) for name, history in self._histories.items()}}
        if PREV_CHUNK in self._inputs:
            given[PREV_CHUNK] = self._plan.left_over(tick, self._inputs[PREV_CHUNK].zeros(1)[0])
        if INFERENCE_DELAY in self._inputs:
            given[INFERENCE_DELAY] = np.asarray(self._delay_ticks(), self._inputs[INFERENCE_DELAY].numpy_dtype)
        return given

    def _wait_for_first(self) -> None:
        self._waited = True
        if not self._came.wait_for(lambda: self._plan.left(0) > 0 or self._error is not None, FIRST_WITHIN_S):
            raise ServiceUnreachable(f"no first chunk after {FIRST_WITHIN_S:.0f} s", url=self._remote.url)
        if self._plan.left(0) <= 0 and self._error is not None:
            raise self._error

    def _starve(self, tick: int) -> Array:
        report = self.report
        if not report.starved:
            slowest_ms = 1000 * max(self._recent_s, default=0.0)
            chunk_ms = 1000 * self.period_s * self._horizon
            reason = f" ({self._error})" if self._error else ""
            log.warning(
                "no action is planned for control period %d: answers take up to %.0f ms, and a chunk lasts %.0f ms%s",
                tick, slowest_ms, chunk_ms, reason,
            )  # fmt: skip
        report.starved += 1
        report.starved_at.append(tick)
        assert self._last is not None
        return self._last if self._safe_action is None else self._safe_action

    def _ask_forever(self) -> None:
        while (request := self._requests.get()) is not None:
            tick, observation = request
            begun_s = time.monotonic()
            try:
                self._episode.act(observation)
                chunk = self._episode.outputs[self._plan.chunk.output]
            except Exception as error:
                self._failed(error)
                if not _passes(error):
                    return
                time.sleep(RETRY_AFTER_S)
            else:
                self._planned(tick, chunk, time.monotonic() - begun_s)
            with self._lock:
                self._asks = False

    def _planned(self, tick: int, chunk: Array, taken_s: float) -> None:
        with self._lock:
            left = self._plan.left(self._tick + 1)
            self._plan.add(tick, chunk)
            self._recent_s = [*self._recent_s[-RECENT:], taken_s]
            self._error = None
            report = self.report
            report.answers += 1
            report.answer_ms.append(1000 * taken_s)
            if report.answers > 1:
                report.least_left = left if report.least_left is None else min(left, report.least_left)
            self._came.notify_all()

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._error = error
            self.report.failures += 1
            self._came.notify_all()


def _passes(error: Exception) -> bool:
    """Whether the service may answer when it is asked again."""
    if isinstance(error, ServiceError):
        return error.status >= 500 or error.status in (408, 429)
    return isinstance(error, ServiceUnreachable)


def _percentiles(values: Any) -> str:
    if not values:
        return "no time"
    p50, p99, most = np.percentile(values, [50, 99, 100])
    return f"p50 {p50:.2f}, p99 {p99:.2f}, at most {most:.2f}"
