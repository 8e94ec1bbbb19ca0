"""The loop that acts at a fixed rate, with a policy that answers late, fails, or hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from actserve.client import realtime
from actserve.client.realtime import Realtime
from actserve.core.errors import ServiceError, ServiceUnreachable, UsageError
from actserve.core.signature import INFERENCE_DELAY, PREV_CHUNK, Chunk, Signature, TensorSpec

HORIZON, PERIOD_S = 20, 0.01
TIME = TensorSpec("time", "float32", ())
SIGNATURE = Signature(
    observations=(TIME,),
    outputs=(TensorSpec("actions", "float32", (HORIZON,)),),
    max_batch=1,
    chunk=Chunk("actions", 10, PERIOD_S),
)


class Clock:
    """In place of a `RemotePolicy`: plans the times after the observed one, `after_s` later."""

    signature = SIGNATURE
    robot = None
    name, url = "clock", "http://here"

    def __init__(self) -> None:
        self.after_s = 0.0
        self.error: Exception | None = None
        self.seen: list[Any] = []
        self.outputs: dict[str, Any] = {}
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def episode(self, outputs: list[str], **_: Any) -> Clock:
        assert outputs == ["actions"]
        return self

    def act(self, observation: Any) -> None:
        assert isinstance(observation, dict)
        self.seen.append(observation)
        time.sleep(self.after_s)
        self.may_answer.wait(10)
        if self.error is not None:
            raise self.error
        now = np.max(observation["time"])
        self.outputs = {"actions": np.arange(HORIZON, dtype=np.float32) + now}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(realtime, "RemotePolicy", lambda *_: made)
    monkeypatch.setattr(realtime, "RETRY_AFTER_S", 0.001)
    yield made
    made.may_answer.set()


def observed(tick: int) -> Any:
    return np.float32(tick)


def test_each_tick_has_the_action_that_was_planned_for_it(clock: Clock) -> None:
    clock.after_s = 3 * PERIOD_S
    with Realtime("http://here") as loop:
        for tick in loop:
            assert float(loop.act(observed(tick))) == tick, "a late plan begins at the present tick"
            if loop.report.answers > 5:
                break
    assert loop.report.starved == 0
    assert len(clock.seen) < loop.report.ticks, "asked once for several ticks"
    assert loop.report.least_left is not None
    assert loop.report.least_left > 0
    assert "0 without a planned action" in str(loop.report)


def test_without_an_answer_the_last_action_is_held_and_the_next_answer_goes_on(clock: Clock) -> None:
    actions: dict[int, float] = {}
    with Realtime("http://here", period_s=0.001) as loop:
        for tick in loop:
            actions[tick] = float(loop.act(observed(tick)))
            if tick == 3:
                clock.may_answer.clear()
            if loop.report.starved > 5:
                clock.may_answer.set()
            if loop.report.starved and actions[tick] == tick:
                break
    held = list(loop.report.starved_at)
    assert {actions[tick] for tick in held} == {actions[held[0] - 1]}
    assert actions[held[0] - 1] == held[0] - 1, "the last one that was planned"


def test_while_the_service_fails_the_safe_action_is_given(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    safe = np.array(-1.0, np.float32)
    with Realtime("http://here", period_s=0.001, safe_action=safe) as loop:
        for tick in loop:
            action = float(loop.act(observed(tick)))
            if tick == 3:
                clock.error = ServiceUnreachable("it is gone", url="http://here")
            if loop.report.starved == 10:
                clock.error = None
            if loop.report.starved > 5 and action == tick:
                break
            assert action == tick or (action == -1 and tick in loop.report.starved_at)
    assert loop.report.failures > 0
    assert sum("it is gone" in record.message for record in caplog.records) == 1, "told once"


@pytest.mark.parametrize("error", [ServiceError(401, "unauthorized", "revoked"), TypeError("no array")])
def test_what_asking_again_does_not_help_is_raised(clock: Clock, error: Exception) -> None:
    def act_on(loop: Realtime) -> None:
        for tick in loop:
            loop.act(observed(tick))
            clock.error = error

    with Realtime("http://here", period_s=0.001) as loop:
        with pytest.raises(type(error)):
            act_on(loop)
        assert loop.report.failures == 1


def test_the_first_chunk_is_waited_for_and_its_error_is_raised(clock: Clock) -> None:
    clock.error = ServiceUnreachable("it is gone", url="http://here")
    with Realtime("http://here") as loop, pytest.raises(ServiceUnreachable, match="it is gone"):
        loop.act(observed(0))


def test_the_wait_for_the_first_chunk_is_no_delay_of_the_ticks(clock: Clock) -> None:
    clock.after_s = 0.3
    with Realtime("http://here", period_s=0.25) as loop:
        for tick in loop:
            loop.act(observed(tick))
            if tick == 2:
                break
    assert max(loop.report.late_ms) < 200, "or 50 ms of the first 300 would be late"


def test_real_time_chunking_gets_what_is_left_and_the_delay(clock: Clock) -> None:
    clock.signature = Signature(
        observations=(TIME, TensorSpec(PREV_CHUNK, "float32", (HORIZON,)), TensorSpec(INFERENCE_DELAY, "int64", ())),
        outputs=SIGNATURE.outputs,
        max_batch=1,
        chunk=SIGNATURE.chunk,
    )
    clock.after_s = 2.5 * PERIOD_S
    with Realtime("http://here") as loop:
        for tick in loop:
            loop.act(observed(tick))
            if loop.report.answers == 2:
                break
    first, second = clock.seen[:2]
    assert first[PREV_CHUNK].tolist() == [0] * HORIZON
    assert int(first[INFERENCE_DELAY]) == 0
    asked = int(second["time"])
    assert second[PREV_CHUNK].tolist() == [*range(asked, HORIZON), *[0] * asked]
    assert int(second[INFERENCE_DELAY]) >= 3


def test_a_policy_that_reads_the_last_observations_gets_those_of_the_last_periods(clock: Clock) -> None:
    last = TensorSpec("time", "float32", (3,))
    clock.signature = Signature((last,), SIGNATURE.outputs, 1, chunk=SIGNATURE.chunk)
    with Realtime("http://here") as loop:
        for tick in loop:
            assert float(loop.act(observed(tick))) == tick
            if loop.report.answers == 2:
                break
    first, second = (seen["time"].tolist() for seen in clock.seen[:2])
    assert first == [0, 0, 0]
    assert second == [second[-1] - 2, second[-1] - 1, second[-1]]


def test_what_is_no_loop_is_refused(clock: Clock) -> None:
    chunk = Chunk("actions", 10)
    clock.signature = Signature(SIGNATURE.observations, SIGNATURE.outputs, 1, chunk=chunk)
    with pytest.raises(UsageError, match="clock does not say its control period: give period_s"), Realtime("here"):
        pass
    clock.signature = Signature(SIGNATURE.observations, SIGNATURE.outputs, 1)
    with pytest.raises(UsageError, match="one action at a time; expected a policy that plans chunks"), Realtime("here"):
        pass
