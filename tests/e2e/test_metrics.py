"""The metrics of two worker processes, as a scraper sees them."""

from __future__ import annotations

import http.client
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actserve.cli.tools import local_service as local
from actserve.cli.tools.local_service import LocalService
from tests.shipped import SHIPPED
from tests.waiting import until

SCREEN = bytes(100_800)
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def service() -> Iterator[LocalService]:
    with local.serve(SHIPPED, "--workers", "2", "--runtime", "onnx", "--policy", "pong") as running:
        yield running


def connected(service: LocalService) -> http.client.HTTPConnection:
    address = urlsplit(service.url)
    assert address.hostname is not None
    return http.client.HTTPConnection(address.hostname, address.port, timeout=120)


def scrape(service: LocalService) -> dict[str, float]:
    """Counters and gauges, each with all its labels added up; and `workers`."""
    with closing(connected(service)) as connection:  # a new one: any worker may have it
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    found: dict[str, float] = {}
    workers = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
            workers.add(sample.labels.get("worker"))
    return found | {"workers": len(workers - {None})}


def act(service: LocalService, times: int) -> int:
    """On one connection; how many answers were 200."""
    done = 0
    with closing(connected(service)) as connection:
        for _ in range(times):
            connection.request("POST", "/act", SCREEN, RAW)
            answer = connection.getresponse()
            answer.read()
            done += answer.status == 200
    return done


def until_there_are_two(service: LocalService) -> dict[str, float]:
    until(lambda: scrape(service)["workers"] == 2)
    return scrape(service)


def test_any_worker_answers_for_all_and_nothing_is_counted_back(service: LocalService) -> None:
    until_there_are_two(service)
    done = 0
    seen = []
    for _ in range(20):
        done += act(service, 5)
        seen.append(scrape(service)["actserve_actions_total"])
        seen.append(scrape(service)["actserve_actions_total"])
    assert done == 100
    assert seen == sorted(seen)
    until(lambda: scrape(service)["actserve_actions_total"] == 100)  # each writes once a second
    after = scrape(service)
    assert after["actserve_actions_total"] == after["actserve_queue_seconds_count"] == 100
    assert after["actserve_policy_info"] == 2  # pong and pong-lstm, however many workers have them

    os.kill(service.workers[0], signal.SIGKILL)
    again = until_there_are_two(service)
    assert again["actserve_actions_total"] == 100
