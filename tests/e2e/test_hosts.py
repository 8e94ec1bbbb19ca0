"""Two hosts behind nginx, configured as in docs/scale.md: sessions find their host, and survive the other's end.

The hosts are two services on this machine with nothing in common: each has its own store and its own session file.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import urllib3

from actserve.cli.tools import local_service as local
from actserve.cli.tools.local_service import LocalService, free_port
from actserve.client.remote_policy import RemotePolicy, RemoteSession
from actserve.client.sequence import OipSequence
from actserve.client.stream import Stream
from actserve.core.errors import ServiceError, ServiceUnreachable
from actserve.server.sessions.ids import home_of
from tests.proxy import needs_nginx, nginx
from tests.shipped import ship
from tests.waiting import until

pytestmark = needs_nginx

NAME = "pong-lstm"
DOCUMENTED = {1: "10.0.0.1:8000", 2: "10.0.0.2:8000"}  # by home
SESSIONS = 8
SCREENS = np.random.default_rng(1).integers(0, 256, (6, 210, 160, 3), np.uint8)


@dataclass(frozen=True)
class Host:
    """A host of its own: `start` serves its store on its port, with its session file."""

    home: int
    folder: Path
    port: int

    def start(self) -> AbstractContextManager[LocalService]:
        numbered = {"ACTSERVE_SESSIONS": str(self.folder / "sessions"), "ACTSERVE_SESSION_HOME": str(self.home)}
        options = ("--runtime", "onnx", "--workers", "2")
        return local.serve(self.folder / "store", *options, environment={**os.environ, **numbered}, port=self.port)


@pytest.fixture
def hosts(tmp_path: Path) -> list[Host]:
    made = [Host(home, tmp_path / str(home), free_port()) for home in DOCUMENTED]
    for host in made:
        ship(host.folder / "store")
    return made


@pytest.fixture
def balanced(hosts: list[Host], tmp_path: Path) -> Iterator[tuple[str, list[LocalService]]]:
    """The address of nginx, and the services behind it."""
    with ExitStack() as stack:
        services = [stack.enter_context(host.start()) for host in hosts]
        addresses = {DOCUMENTED[host.home]: f"127.0.0.1:{host.port}" for host in hosts}
        url, _ = stack.enter_context(nginx(tmp_path, "scale.md", addresses))
        yield url, services


def test_sessions_find_their_host_and_outlive_the_end_of_another(
    balanced: tuple[str, list[LocalService]], hosts: list[Host]
) -> None:
    url, services = balanced
    with ExitStack() as stack:
        policies = [stack.enter_context(RemotePolicy(url, NAME)) for _ in range(SESSIONS)]
        sessions = [policy.session() for policy in policies]
        assert {home_of(session.id) for session in sessions} == {1, 2}
        streams = [stack.enter_context(Stream(url, NAME)) for _ in range(SESSIONS)]
        sequences = [OipSequence(policy) for policy in policies]
        carried = policies[0].episode()
        expected = [int(carried.act(screen)) for screen in SCREENS]

        first, second = expected[:2]
        episodes: list[RemoteSession | Stream | OipSequence] = [*sessions, *streams, *sequences]
        for episode in episodes:
            assert [int(episode.act(screen)) for screen in SCREENS[:2]] == [first, second]
        for session in sessions:  # by another connection, which nginx gives to any host
            answer = urllib3.request("GET", f"{url}/policies/{NAME}/sessions/{session.id}")
            assert (answer.status, answer.json()["step"]) == (200, 2)

        end_at_once(services[1])
        alive = [session for session in sessions if home_of(session.id) == 1]
        lost = [session for session in sessions if home_of(session.id) == 2]
        assert [int(session.act(SCREENS[2])) for session in alive] == [expected[2]] * len(alive)
        assert [refusal(session) for session in lost] == [(503, "session_elsewhere")] * len(lost)
        assert {goes_on(stream, expected[2]) for stream in streams} == {True, False}
        assert [home_of(policy.session().id) for policy in policies] == [1] * SESSIONS

        stack.enter_context(hosts[1].start())
        until(lambda: taken(lost[0], 2))
        for session in sessions:
            taken_before = session.steps
            assert [int(session.act(screen)) for screen in SCREENS[taken_before:]] == expected[taken_before:]
            session.end()
            assert urllib3.request("GET", f"{url}/policies/{NAME}/sessions/{session.id}").status == 410


def end_at_once(service: LocalService) -> None:
    """As a host does that loses its power."""
    for pid in (service.pid, *service.workers):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not accepts(service.url))


def accepts(url: str) -> bool:
    try:
        return urllib3.request("GET", f"{url}/healthz", retries=False, timeout=5).status > 0
    except urllib3.exceptions.HTTPError:
        return False


def refusal(session: RemoteSession) -> tuple[int, str]:
    with pytest.raises(ServiceError) as refused:
        session.act(SCREENS[2])
    return refused.value.status, refused.value.reason


def goes_on(stream: Stream, action: int) -> bool:
    """Whether the stream answers; it is over if its host is."""
    try:
        assert stream.act(SCREENS[2]) == action
    except ServiceUnreachable:
        return False
    return True


def taken(session: RemoteSession, index: int) -> bool:
    """Whether the session takes its next step; if not, nothing of it has changed."""
    try:
        session.act(SCREENS[index])
    except ServiceError as error:
        assert (error.status, error.reason) == (503, "session_elsewhere")
        return False
    return True
