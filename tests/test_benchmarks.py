"""The cost benchmark: that it counts rightly, believes no answer, and leaves nothing behind."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import hosts, overload, plot, report, soak
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.cost import measure
from tests.benchmarks.load import Load
from tests.benchmarks.questions import Screens, http_answer, posts, several, stream, stream_answer
from tests.benchmarks.server import DoesNotServe, cores, cpu_s, running, tree

SCREENS = Screens(np.arange(32 * 4, dtype=np.uint8).reshape(32, 2, 2), [index % 5 for index in range(32)])

# Spends time in a thread that ends, and in itself; then waits, with a child that has spent time too.
SPENDER = """
import subprocess, sys, threading, time
def spend(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until: pass
thread = threading.Thread(target=spend, args=(0.1,)); thread.start(); thread.join()
spend(0.05)
child = "import time\\nwhile time.process_time() < 0.15: pass\\nprint(time.process_time(), flush=True); input()"
other = subprocess.Popen([sys.executable, "-S", "-c", child], stdin=0, stdout=subprocess.PIPE, text=True)
print(time.process_time() + float(other.stdout.readline()), flush=True)
other.wait()
"""


def test_the_cost_of_a_server_is_that_of_all_its_processes() -> None:
    command = [sys.executable, "-S", "-c", SPENDER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        spent_s = float(process.stdout.readline())
        pids = tree(process.pid)
        assert len(pids) == 2
        assert spent_s > 0.3
        # Each of the four parts is at least 0.05 s. Time that is used after the sum increases it.
        assert spent_s - 0.03 < cpu_s(pids) < 2 * spent_s
        process.communicate("\n")
    assert tree(process.pid) == set()
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_s(pids)


class Fake(http.server.BaseHTTPRequestHandler):
    """Answers a 2 x 2 screen of `SCREENS` with its action; two screens it mistakes, and every third it refuses."""

    protocol_version = "HTTP/1.1"
    asked = 0
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        screen = body[0] // 4
        Fake.asked += 1
        refused = Fake.refuses and Fake.asked % 3 == 0
        answer = b'{"action": %d}' % (screen % 5 + (screen in (7, 9)))
        self.send_response(503 if refused else 200)
        self.send_header("Content-Length", str(len(answer)))
        if refused:
            self.send_header("Connection", "close")
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def fake(refuses: bool) -> Iterator[tuple[str, int]]:
    Fake.asked, Fake.refuses = 0, refuses
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield "127.0.0.1", server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_no_answer_is_believed() -> None:
    with fake(refuses=False) as address, Load(address, posts()(SCREENS), 4) as load:
        tally = load.closed(0.3)
    assert Fake.asked == tally.sent == len(tally.good) + tally.errors.total()
    assert {kind.partition(":")[0] for kind in tally.errors} == {"question 7", "question 9"}
    assert tally.in_time <= len(tally.good)


def test_an_open_loop_asks_at_its_own_rate_whatever_is_refused() -> None:
    with fake(refuses=True) as address, Load(address, posts()(SCREENS), 64) as load:
        tally = load.open(rate=200, seconds=1)
    assert tally.sent + tally.late + tally.crowded == pytest.approx(200, abs=60)  # four deviations of a Poisson process
    assert Fake.asked == tally.sent == len(tally.good) + len(tally.refused) + tally.errors.total()
    assert len(tally.refused) == tally.sent // 3


def test_an_overload_is_told_in_a_line() -> None:
    with fake(refuses=True) as address, Load(address, posts()(SCREENS), 64) as load:
        found = overload.step(load, 100, 0.5)
    assert 0 < found["refused_a_second"] < found["sent_a_second"]
    assert found["goodput"] + found["refused_a_second"] <= found["sent_a_second"] * 1.001
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert len(overload.line([found], 50)) == len(overload.HEADER)
    assert overload.line([found], 50)[:3] == ["do not", "2.0", "100"]


def test_a_client_that_obeys_asks_nothing_until_its_time_is_over() -> None:
    with fake(refuses=True) as address, Load(address, posts()(SCREENS), 2) as load:
        tally = load.obeying(rate=300, seconds=0.5)
        # A third of the requests is refused for a second, so both clients soon rest until the end.
        assert len(tally.refused) == tally.sent // 3 == 2
        assert tally.held_back > 0
        assert load.closed(0.1).sent > 0


def test_answers_are_read_when_they_are_complete() -> None:
    whole = b'HTTP/1.1 200 OK\r\nCONTENT-LENGTH: 12\r\n\r\n{"action":3}'
    chunked = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"act\r\n7\r\nion":3}\r\n0\r\n\r\n'
    message = b"\x82\x18" + bytes(16) + b"\x03" + bytes(7)
    for split, data, body in ((http_answer, whole, b'{"action":3}'), (http_answer, chunked, b'{"action":3}'),
                              (stream_answer, message, b"\x03" + bytes(7))):  # fmt: skip
        assert split(data) == (200, body)
        assert all(split(data[:length]) is None for length in range(len(data)))
    with pytest.raises(ValueError, match="expected a length"):
        http_answer(b"HTTP/1.1 200 OK\r\n\r\n")


def test_each_way_asks_for_the_same_actions() -> None:
    assert several(2)(SCREENS).actions[31] == [1, 0]
    assert several(2)(SCREENS).requests[31].endswith(bytes([124, 125, 126, 127, 0, 1, 2, 3]))
    streamed = stream(SCREENS)
    assert streamed.is_right(3, b"\x03" + bytes(7))
    assert not streamed.is_right(3, b"\x04" + bytes(7))
    assert not streamed.is_right(3, b"")
    assert posts()(SCREENS).is_right(3, b'{"action":3}')
    assert not posts()(SCREENS).is_right(3, b"oops")


def test_a_server_is_measured_and_gone_after(tmp_path: Path) -> None:
    (floor,) = (contender for contender in CONTENDERS if contender.name == "uvicorn")
    questions = floor.way(SCREENS)
    with floor.start(tmp_path, tmp_path, cores()[0]) as server:
        assert server.first_answer_s(questions) > 0
        cell = measure(server, questions, "uvicorn", 2, 0.2, cores())
    assert not any(cell.errors.values())
    assert cell.cpu_us > 1
    assert cell.rate == pytest.approx(cell.actions / 0.2, abs=2 / 0.2)  # two may be answered after the end
    assert 0 < cell.pss_mb <= cell.rss_mb
    assert server.pids() == set()


def test_who_ends_at_once_is_told_of_with_its_log() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such luck')"]
    with (
        pytest.raises(DoesNotServe, match="no such luck"),
        running(command, ("127.0.0.1", 1), cores()[:1], {}) as server,
    ):
        server.first_answer_s(posts()(SCREENS))


def cell(name: str, cpu_us: float, connections: int = 1, rate: float = 1000.0, errors: int = 0) -> dict[str, Any]:
    figures = {
        "p50_ms": 0.5,
        "p99_ms": 0.9,
        "p999_ms": 1.5,
        "rss_mb": 90.0,
        "pss_mb": 80.0,
        "generator": 0.3,
        "others": 0,
    }
    found = {"contender": name, "connections": connections, "cpu_us": cpu_us, "rate": rate}
    return found | figures | {"errors": {"status 500": errors}}


def found(*cells: dict[str, Any]) -> dict[str, Any]:
    programs = {name: {"1": {"cpu_us": us, "p50_us": us}} for name, us in (("tutorial", 200.0), ("pong", 150.0))}
    names = {cell["contender"] for cell in cells}
    return {
        "settings": {"connections": [1], "rounds": 1, "seconds": 1.0},
        "bare": [programs],
        "cells": [*cells],
        "starts_s": {name: [0.5, 0.7, 0.6] for name in names},
    }


OURS = [cell("actserve", cpu_us) for cpu_us in (110.0, 90.0, 100.0)]
OTHERS = [cell("uvicorn", 10.0), cell("fastapi", 200.0, rate=400.0), cell("mosec", 150.0, rate=300.0)]


def test_rows_are_medians_with_their_range() -> None:
    rows = report.rows(found(*OURS, *OTHERS))
    assert [row.name for row in rows] == ["uvicorn", "fastapi", "mosec", "actserve"]
    assert (rows[3].cpu_us, rows[3].cpu_us_range) == (100.0, (90.0, 110.0))


def test_ours_is_held_against_t_and_against_the_best_peer_that_does_inference() -> None:
    document = found(*OURS, *OTHERS)
    assert list(report.ratios(document, report.rows(document), 200.0)) == [
        ["actserve: CPU an action ÷ T", "0.50"],
        ["actserve: CPU an action ÷ the cheapest peer's", "0.67"],
        ["actserve: actions a second ÷ the fastest peer's", "2.50"],
        ["actserve: p50 less a bare call at batch 1, ms", "0.35"],
    ]


def test_one_error_in_one_round_makes_a_row_invalid() -> None:
    document = found(*OURS, *OTHERS, cell("mosec", 150.0, errors=3))
    (table,) = (lines for title, _, lines in report.tables(document) if title == "1 connection")
    lines = {line[0]: line for line in table}
    assert lines["mosec: INVALID"][1] == "status 500: 3"
    assert lines["actserve"][1:4] == ["100 (90–110)", "0.50", "0.50"]  # FastAPI is the best peer now
    assert {len(line) for line in table} == {len(report.HEADER)}


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    plot.draw(report.rows(found(*OURS, *OTHERS)), 200.0, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_trend_is_what_changed_once_it_had_settled() -> None:
    def stretch(minutes: float, rss_mb: float, files: int) -> soak.Stretch:
        return soak.Stretch(minutes, 1000, 0, 0, 1.0, 2.0, rss_mb, rss_mb / 2, files, 170)

    growing = [stretch(minutes, 90 + (100 if minutes == 0 else 2 * minutes), 30) for minutes in range(20)]
    found = soak.trends(growing)
    assert found["rss_mb"] == pytest.approx(2 * 17)
    assert found["files"] == pytest.approx(0, abs=1e-9)
    assert found["p99_ms"] == pytest.approx(0, abs=1e-9)


def test_a_poll_of_a_remote_store_is_one_request_and_one_for_each_policy() -> None:
    """docs/scale.md calculates with it."""
    assert [hosts.requests_of_a_poll(policies) for policies in (1, 5)] == [2, 6]
