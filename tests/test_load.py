from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load as load_tensors

from actserve.core.errors import ServiceUnreachable, UsageError
from actserve.loadtest import load_process
from actserve.loadtest.generator import load
from actserve.loadtest.load_statistics import LoadStatistics
from tests.fake_service import SIGNATURE, FakeService, act, running


@pytest.fixture
def service() -> Iterator[FakeService]:
    with running(FakeService()) as fake:
        yield fake


def test_a_closed_loop_counts_what_was_answered(service: FakeService) -> None:
    seen: list[tuple[float, int]] = []
    report = load(service.url, concurrency=4, duration_s=1.0, processes=1, on_progress=lambda s, n: seen.append((s, n)))
    assert report.requests == service.acts > 4
    in_time = report.rate * 1.0
    assert report.requests - 4 <= round(in_time) <= report.requests  # four may be answered after the end
    assert (report.errors, report.connections, report.policy) == ({}, 4, "fake")
    assert seen[-1][1] == report.requests
    assert [n for _, n in seen] == sorted(n for _, n in seen)
    latency = report.latency_ms
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p999"] <= latency["max"]
    assert 0 < report.client_cpu <= 1.1


def test_the_report_is_json(service: FakeService) -> None:
    closed = load(service.url, duration_s=0.1, processes=1).as_json()
    opened = load(service.url, rate=50, duration_s=0.1, processes=1).as_json()
    common = {"policy", "via", "requests", "rate", "errors", "latency_ms", "duration_s", "processes", "client_cpu"}
    assert set(closed) == {*common, "connections", "concurrency"}
    assert set(opened) == {*common, "connections", "target_rate"}
    assert closed["concurrency"] == 8
    assert json.loads(json.dumps(closed)) == closed


def test_latency_is_that_of_the_service(service: FakeService) -> None:
    service.stall_s = lambda _number: 0.03
    report = load(service.url, concurrency=2, duration_s=0.3, processes=1)
    assert 30 <= report.latency_ms["p50"] < 60
    assert report.requests <= 2 * 0.3 / 0.03 + 2


def test_every_observation_is_sent_and_differs(service: FakeService) -> None:
    load(service.url, rate=400, duration_s=0.1, processes=1)
    assert len(set(service.bodies)) == 32


def test_errors_are_counted_by_kind_and_have_no_latency(service: FakeService) -> None:
    turn = itertools.count()
    overloaded = (503, {"error": {"code": "overloaded", "message": "", "detail": {}}})
    service.act = lambda body: act(body) if next(turn) % 2 else overloaded
    report = load(service.url, concurrency=2, duration_s=0.2, processes=1)
    assert set(report.errors) == {"http_503:overloaded"}
    assert abs(report.errors["http_503:overloaded"] - report.requests) <= 2
    service.act = lambda _body: (500, b"oh")
    report = load(service.url, concurrency=2, duration_s=0.1, processes=1)
    assert (report.requests, report.rate, set(report.errors)) == (0, 0, {"http_500:unknown"})
    assert set(report.latency_ms.values()) == {0.0}


def test_an_answer_that_changes_is_found(service: FakeService) -> None:
    turn = itertools.count()
    service.act = lambda body: (200, {"action": 5}) if next(turn) == 40 else (200, {"action": 1})
    report = load(service.url, concurrency=1, duration_s=0.2, processes=1)
    assert report.errors == {"inconsistent": 1}


def test_several_observations_go_by_name(service: FakeService) -> None:
    service.signature = {**SIGNATURE, "observations": [{"name": n, "dtype": "float32", "shape": [2]} for n in "ab"]}
    service.act = lambda body: (200, {"action": len(load_tensors(body)["a"])})
    report = load(service.url, concurrency=1, duration_s=0.1, processes=1)
    assert report.errors == {}
    assert report.requests > 5


def test_an_open_loop_keeps_its_rate(service: FakeService) -> None:
    report = load(service.url, rate=400, duration_s=0.3, processes=1)
    assert report.requests == service.acts == 120
    assert 0 < report.rate <= 401  # late answers do not count
    assert report.errors == {}


def test_a_stall_shows_in_the_open_loop_and_hides_in_the_closed_one(service: FakeService) -> None:
    turn = itertools.count()

    def stall_everything_once(body: bytes) -> tuple[int, Any]:
        if next(turn) == 40:
            time.sleep(0.3)  # the whole service
        return act(body)

    service.act = stall_everything_once
    opened = load(service.url, rate=200, duration_s=0.8, processes=1)
    assert opened.requests == 160
    assert opened.latency_ms["p99"] > 200  # 60 requests fell due meanwhile
    turn = itertools.count()
    closed = load(service.url, concurrency=1, duration_s=0.6, processes=1)
    assert closed.latency_ms["max"] > 290
    assert closed.latency_ms["p50"] < 290  # one request of many: the omission that the open loop is for


def test_waiting_for_a_free_connection_counts(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actserve.loadtest.generator.MAX_CONNECTIONS", 2)
    service.stall_s = lambda number: 0.3 if number in (50, 51) else 0.0  # both connections
    report = load(service.url, rate=200, duration_s=0.6, processes=1)
    assert (report.requests, report.connections) == (120, 2)
    assert report.latency_ms["p90"] > 150  # 60 requests fell due meanwhile


def test_answers_after_the_end_count_but_not_for_the_rate(service: FakeService) -> None:
    service.stall_s = lambda number: 0.0 if number < 3 else 3.0
    report = load(service.url, concurrency=1, duration_s=2.0, processes=1)
    assert report.requests == service.acts
    assert report.rate == pytest.approx((report.requests - 1) / 2.0)


def test_what_is_not_answered_in_time_is_given_up_and_the_end_is_the_end(service: FakeService) -> None:
    service.stall_s = lambda _number: 60.0
    for how in ({"concurrency": 3}, {"rate": 30.0}):
        started = time.monotonic()
        report = load(service.url, duration_s=0.2, timeout_s=0.1, processes=1, **how)
        assert time.monotonic() - started < 30.0  # and not 60
        assert report.requests == 0
        assert set(report.errors) == {"timeout"}
        assert report.errors["timeout"] >= 3


def test_a_request_that_waits_when_the_time_ends_still_gets_its_connection(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actserve.loadtest.generator.MAX_CONNECTIONS", 1)
    service.says_close = True
    service.stall_s = lambda _number: 0.1
    report = load(service.url, rate=50, duration_s=0.08, timeout_s=2, processes=1)
    assert (report.requests, report.errors) == (4, {})


def test_a_dropped_connection_is_an_error_and_replaced(service: FakeService) -> None:
    turn = itertools.count(1)

    def fail_sometimes(body: bytes) -> tuple[int, Any]:
        if next(turn) % 20 == 0:
            raise ConnectionError
        return act(body)

    service.act = fail_sometimes
    for how in ({"concurrency": 2}, {"rate": 200.0}):
        report = load(service.url, duration_s=0.25, processes=1, **how)
        assert set(report.errors) == {"connection"}
        assert report.errors["connection"] == pytest.approx(report.requests / 19, rel=0.5, abs=2)


def test_a_service_that_closes_after_each_answer_is_no_error(service: FakeService) -> None:
    service.says_close = True
    for how in ({"concurrency": 2}, {"rate": 100.0}):
        report = load(service.url, duration_s=0.1, processes=1, **how)
        assert report.errors == {}
        assert report.requests >= 10


def test_a_service_that_goes_away_is_counted_not_raised() -> None:
    with running(FakeService()) as service:
        turn = itertools.count()

        def refuse(body: bytes) -> tuple[int, Any]:
            if next(turn) >= 20:
                service.closes_after = 0
                raise ConnectionError
            return act(body)

        service.act = refuse
        report = load(service.url, concurrency=2, duration_s=0.25, processes=1)
    assert report.requests == 20
    assert report.errors["connection"] >= 2


def test_several_processes_add_up(service: FakeService) -> None:
    progress: list[int] = []
    report = load(service.url, concurrency=3, duration_s=0.2, processes=2, on_progress=lambda _s, n: progress.append(n))
    assert (report.processes, report.connections, report.errors) == (2, 3, {})
    assert report.requests == service.acts
    assert progress[-1] == report.requests
    assert report.latency_ms["max"] > 0


def test_a_busy_pilot_asks_for_more_processes(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actserve.loadtest.generator.SATURATED_CPU_SHARE", 0.0)
    monkeypatch.setattr("actserve.loadtest.generator._cores", lambda: 2)
    monkeypatch.setattr(
        "actserve.loadtest.process_pool.run_jobs",
        lambda jobs, progress: [load_process.run_job(job, progress) for job in jobs],
    )
    assert load(service.url, concurrency=2, duration_s=0.1).processes == 2
    assert load(service.url, concurrency=1, duration_s=0.1).processes == 1  # a process without a connection is none


def test_one_process_is_enough_for_a_slow_service(service: FakeService) -> None:
    service.stall_s = lambda _number: 0.02
    assert load(service.url, concurrency=2, duration_s=0.1).processes == 1


def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    with running(FakeService(uds=str(tmp_path / "s"))) as service:
        report = load(service.url, uds=service.uds, concurrency=2, duration_s=0.1, processes=1)
    assert report.errors == {}
    assert report.requests > 10


def test_nobody_there_and_wrong_wishes() -> None:
    with pytest.raises(ServiceUnreachable):
        load("http://127.0.0.1:1", duration_s=0.1)
    with pytest.raises(UsageError, match="exclude each other"):
        load("http://127.0.0.1:1", concurrency=1, rate=1)
    for wish in ({"concurrency": 0}, {"rate": 0.0}, {"duration_s": -1}):
        with pytest.raises(UsageError, match="positive numbers"):
            load("http://127.0.0.1:1", **wish)


def test_tallies_add_up_and_notice_that_two_processes_were_told_different_things() -> None:
    one, two = LoadStatistics(), LoadStatistics()
    one.record_answer(0, 200, b'{"action":1}', 1000)
    one.record_answer(1, 200, b'{"torque":[0.5,1e-9]}', 3000)
    two.record_answer(0, 200, b'{"action":2}', 2000)
    two.record_answer(1, 200, b'{"torque":[0.50001,0.0]}', 4000)  # a continuous action's last digits may differ
    two.record_answer(1, 200, b'{"torque":[0.6,0.0]}', 4000)
    total = LoadStatistics()
    for statistics in (one, two):
        total.merge(LoadStatistics.from_json(json.loads(json.dumps(statistics.to_json()))))
    assert total.requests == 4
    assert total.errors == {"inconsistent": 2}
    assert total.latency_ms()["max"] == pytest.approx(4, rel=1e-3)
