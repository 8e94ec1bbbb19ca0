from __future__ import annotations

import itertools
import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actserve.server.metrics.summary import quantile
from actserve.telemetry.call import Call, current
from actserve.telemetry.counts import ACT, Counts, ProgramLabels
from actserve.telemetry.counts_file import CountsFile
from actserve.telemetry.families import Families, Family, Merge, from_jsonable, merged, to_jsonable
from actserve.telemetry.logs import HumanFormatter, JsonFormatter
from actserve.telemetry.meters import SIZES, TIMES_NS, Histogram, Meters


@dataclass
class Request:
    size: int
    entered_ns: int


@given(st.lists(st.integers(0, 2**40)))
def test_a_histogram_has_every_value_in_its_bucket(values: list[int]) -> None:
    histogram = Histogram(TIMES_NS)
    for value in values:
        histogram.add(value)
    bounds = [-1, *TIMES_NS, 2**50]
    expected = [sum(low < value <= high for value in values) for low, high in itertools.pairwise(bounds)]
    assert histogram.counts == expected
    assert histogram.total == sum(values)


def test_meters_take_a_batch_at_a_time() -> None:
    meters = Meters()
    meters.add_batch([Request(1, 1_000_000), Request(3, 970_000)], 1_010_000, 300_000)
    assert (meters.sizes.total, meters.sizes.counts[SIZES.index(4)]) == (4, 1)
    assert (meters.run_ns.total, sum(meters.run_ns.counts)) == (300_000, 1)
    assert meters.queue_ns.total == 10_000 + 40_000
    assert meters.queue_ns.counts[:3] == [1, 1, 0]


def test_a_program_that_is_loaded_again_goes_on_counting() -> None:
    counts = Counts()
    counts.meters(ProgramLabels("pong", 1, "onnx")).sizes.add(2)
    counts.meters(ProgramLabels("pong", 1, "onnx")).sizes.add(3)
    assert counts.programs[ProgramLabels("pong", 1, "onnx")].sizes.total == 5
    assert counts.tally("pong", "http", "/act") is counts.tally("pong", "http", ACT)


@pytest.mark.parametrize("given", ["a", "4bf92f35-77b3:1", "A" * 128])
def test_a_sane_request_id_is_kept(given: str) -> None:
    assert Call.of(given).id == given


@pytest.mark.parametrize("given", [None, "", "a b", "a\nb", '"', "-x", "A" * 129, "é", "a\x00"])
def test_any_other_is_replaced(given: str | None) -> None:
    one, other = Call.of(given), Call.of(given)
    assert one.id != given
    assert len(one.id) == 16
    assert one.id != other.id


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "actserve", "levelname": "INFO", "msg": message, **extra})
    made.created = 0.0
    return made


def test_a_json_line_is_one_object_and_knows_its_request() -> None:
    try:
        raise ValueError("no\nluck")
    except ValueError:
        failed = record("it\nfailed", exc_info=sys.exc_info(), policy="pong")
    lines = JsonFormatter().format(record("hello")), JsonFormatter().format(failed)
    assert all("\n" not in line for line in lines)
    plain, told = map(json.loads, lines)
    assert plain == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "INFO",
        "logger": "actserve",
        "message": "hello",
    }
    assert (told["message"], told["policy"]) == ("it\nfailed", "pong")
    assert "ValueError: no\nluck" in told["exception"]

    token = current.set(Call("id-1", trace="ab"))
    try:
        told = json.loads(JsonFormatter().format(record("hello")))
        assert (told["request"], told["trace"]) == ("id-1", "ab")
        assert HumanFormatter().format(record("hello")).endswith("INFO actserve: hello [id-1]")
    finally:
        current.reset(token)
    assert HumanFormatter().format(record("hello")).endswith("INFO actserve: hello")


BUCKETS = {0.1: 0.0, 0.2: 10.0, 0.4: 10.0, 0.8: 20.0, math.inf: 20.0}


@pytest.mark.parametrize(("q", "expected"), [(0.25, 0.15), (0.5, 0.2), (0.75, 0.6), (1.0, 0.8)])
def test_a_quantile_is_interpolated_in_its_bucket(q: float, expected: float) -> None:
    assert quantile(BUCKETS, q) == pytest.approx(expected)


def test_quantiles_at_the_ends() -> None:
    assert quantile({1.0: 0.0, math.inf: 0.0}, 0.5) is None
    assert quantile({1.0: 0.0, math.inf: 3.0}, 0.5) == 1.0


def families(count: float, waiting: float = 0, sessions: float = 0) -> Families:
    total = Family("requests", "How many.", "counter", Merge.TOTAL)
    total.add({"policy": "pong"}, count, "_total")
    now = Family("waiting", "Now.", "gauge", Merge.SUM)
    now.add({}, waiting)
    same = Family("sessions", "Of all.", "gauge", Merge.MAX)
    same.add({}, sessions)
    return {family.name: family for family in (total, now, same)}


def values(found: Families) -> dict[str, float]:
    return {name: value for family in found.values() for (name, _), value in family.samples.items()}


def test_of_those_gone_only_what_they_counted_stays() -> None:
    found = merged([families(1, 2, 5), families(10, 3, 4)], [families(100, 50, 90)])
    assert values(found) == {"requests_total": 111, "waiting": 5, "sessions": 5}


def test_families_survive_the_file() -> None:
    one = families(1.5, 2, 3)
    assert from_jsonable(json.loads(json.dumps(to_jsonable(one)))) == one


def test_workers_add_up_and_the_ended_are_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actserve.telemetry.counts_file.FRESH_S", 3600.0)  # a slow host is not a stuck worker
    path = tmp_path / "counts.sqlite"
    mine, other = CountsFile(path), CountsFile(path)
    for shared in (mine, other):
        shared.open()
    mine.write(families(1, 1, 7))
    other.write(families(10, 1, 7))
    assert values(mine.read()) == {"requests_total": 11, "waiting": 2, "sessions": 7}
    mine.write(families(2, 0, 7))
    assert values(other.read()) == {"requests_total": 12, "waiting": 1, "sessions": 7}

    code = (
        "from pathlib import Path; from tests.test_telemetry import CountsFile, families; "
        f"s = CountsFile(Path({str(path)!r}));"
        "s.open(); s.write(families(100, 100, 100))"
    )
    for ended in (1, 2):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
        assert values(mine.read()) == {"requests_total": 12 + 100 * ended, "waiting": 1, "sessions": 7}
    CountsFile(path).open()  # which puts them together
    assert values(mine.read()) == {"requests_total": 212, "waiting": 1, "sessions": 7}
    assert os.listdir(tmp_path) == ["counts.sqlite"]


def test_a_worker_that_is_stuck_counts_and_gauges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, mine = CountsFile(tmp_path / "counts.sqlite"), CountsFile(tmp_path / "counts.sqlite")
    stuck.open()
    monkeypatch.setattr("time.time", lambda: 1000.0)
    stuck.write(families(10, 10))
    monkeypatch.setattr("time.time", lambda: 1006.0)
    mine.write(families(1, 1))
    assert values(mine.read()) == {"requests_total": 11, "waiting": 1, "sessions": 0}
