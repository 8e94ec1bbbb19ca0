"""A short run of what `python -m tests.benchmarks.fuzz` does for minutes: the same cases each time."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests import fastpath_service, fuzzing, stream_service
from tests.fake_policy import NAME
from tests.fastpath_service import FAST, ITEM_BYTES, PLAIN
from tests.fuzzing import Report

SLOW_MACHINE = 60.0  # times: a second may pass here for no fault of ours


def check(report: Report) -> None:
    assert not report.errors, report
    assert not report.crashes, report
    assert report.slowest_s < SLOW_MACHINE * fuzzing.SOON_S, report


def test_decoders(tmp_path: Path) -> None:
    report = Report()
    fuzzing.throw_at_all(fuzzing.targets(tmp_path), 19_000, random.Random(0), report)
    check(report)
    assert report.cases == 19_000


def test_what_is_good_is_taken(tmp_path: Path) -> None:
    """Else the mutations of it would all be refused at the door."""
    for target, goods in fuzzing.targets(tmp_path).values():
        for good in goods[:1]:
            target(good)


@pytest.mark.parametrize("http", [FAST, PLAIN])
def test_sockets(http: str) -> None:
    report, goods = Report(), fuzzing.requests_to(fastpath_service.NAME, bytes(ITEM_BYTES))
    watching = fuzzing.watched(report) if http == FAST else nullcontext()  # uvicorn's own logs resets as errors
    with watching, fastpath_service.running(http) as service:
        fuzzing.throw_over_sockets(http, service.port, goods, 300, random.Random(1), report)
    check(report)
    assert report.answers > 100


def test_the_openapi_document() -> None:
    report = Report()
    with fuzzing.watched(report), stream_service.running() as service:
        port = int(service.url.rpartition(":")[2])
        fuzzing.throw_over_sockets("routes", port, fuzzing.requests_to(NAME, bytes(8)), 300, random.Random(2), report)
        fuzzing.throw_by_schema(service.url, 3, 0, report, wrong=False)
    check(report)
    assert report.parts["schemathesis"] > 40


def test_harm_is_seen() -> None:
    report = Report()
    fuzzing.throw_at("broken", lambda data: data.decode("ascii"), [b"abc"], 100, random.Random(0), report)
    assert report.crashes
    assert not report.harmless
