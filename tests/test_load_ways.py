"""`load` in each of its ways, against the whole service over policies of a few lines of numpy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from actserve.core.errors import ServiceError, UsageError
from actserve.core.signature import Array, Noise, Signature, State, TensorSpec
from actserve.engine.runtimes.base import Runtime
from actserve.loadtest.backends import BACKENDS
from actserve.loadtest.generator import load
from actserve.server.sessions import Sessions
from actserve.store.artifact import Artifact
from tests import fake_policy
from tests.fake_service import FakeService
from tests.fake_service import running as faking
from tests.stream_service import Service, running

WAYS = list(BACKENDS)
EPISODES = ["session", "stream", "oip"]
HOW: list[dict[str, Any]] = [{"concurrency": 3}, {"rate": 150.0}]
DURATIONS_S = (0.25, 1.0, 4.0, 16.0)  # a busy machine may need more for a few answers
STATELESS = Signature(
    observations=(TensorSpec("x", "int64", (), 0, 999),),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("value", "float32", (2,))),
    max_batch=16,
)
STATE = (State(TensorSpec("h", "int64", (3,)), "next_h", 5),)
NOISE = (Noise(TensorSpec("noise", "float32", ()), "uniform"),)
SIGNATURES = {
    "stateless": STATELESS,
    "recurrent": replace(STATELESS, state=STATE, is_init=True),
    "state that nothing resets": replace(STATELESS, state=STATE),
    "random": replace(STATELESS, noise=NOISE, exploration=("random",)),
    "random and recurrent": replace(STATELESS, state=STATE, is_init=True, noise=NOISE, exploration=("random",)),
    "several observations": replace(
        STATELESS,
        observations=(*STATELESS.observations, TensorSpec("y", "float32", (2, 2))),
        outputs=(TensorSpec("action", "float32", (2,)),),
        state=STATE,
        is_init=True,
    ),
}


class Chain(Runtime):
    """Every action depends on all that was seen in the episode, if there is state."""

    served: Signature
    before: Callable[[int], None] = lambda _batches: None  # each batch; told how many there were
    amnesia = False  # the first item's state is forgotten
    amiss = 0  # added to each observation

    def __init__(self) -> None:
        super().__init__(self.served)
        self.batches = 0

    @classmethod
    def load(cls, artifact: Artifact, threads: int, shared: Path | None = None) -> Chain:
        return cls()

    def _run(self, arrays: list[Array]) -> list[Array]:
        given = dict(zip([spec.name for spec in self.signature.inputs], arrays, strict=True))
        type(self).before(self.batches)
        x: Array = given["x"]
        self.batches += 1
        was = given.get("h", np.zeros((len(x), 3), np.int64))  # (B, 3)
        was = np.where(given.get("is_init", np.zeros(len(x), bool))[:, None], 5, was)
        if self.amnesia:
            was[0] = 0
        seen = x + self.amiss + (given.get("noise", np.zeros(len(x))) * 1e6).astype(np.int64)
        after = (was * 31 + seen[:, None]) % 1_000_003
        values = np.stack([after[:, 0], seen], axis=1).astype(np.float32)
        outputs = [values] if len(self.signature.outputs) == 1 else [after[:, 0], values]
        return [*outputs, after] if "h" in given else outputs

    def close(self) -> None:
        pass


class Held:
    """Sessions and sequences: how many were begun, and how many were left when a service ended."""

    begun = 0
    left: int | None = None


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    counts = Held()
    begin, close = Sessions.begin, Sessions.__exit__

    def count_begin(*args: Any, **options: Any) -> Any:
        session = begin(*args, **options)
        counts.begun += 1
        return session

    def count_left(sessions: Sessions, *error: Any) -> None:
        counts.left = sessions.statistics().sessions
        close(sessions, *error)

    monkeypatch.setattr(Sessions, "begin", count_begin)
    monkeypatch.setattr(Sessions, "__exit__", count_left)
    # The same is asked again soon, and a slow machine has time to end the pilot's sessions.
    monkeypatch.setattr("actserve.loadtest.backends.base.OBSERVATIONS", 4)
    monkeypatch.setattr("actserve.loadtest.generator.PILOT_S", 60.0)
    yield counts
    assert not counts.left


@contextmanager
def serving(kind: str, **options: Any) -> Iterator[tuple[Service, type[Chain]]]:
    class Served(Chain):
        served = SIGNATURES[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_policy, "SIGNATURE", SIGNATURES[kind])
        patch.setattr(fake_policy, "DigestRuntime", Served)
        with running(**options) as service:
            yield service, Served


def break_connections(service: Service) -> None:
    """All of them, without a word. In the event loop, where a quick program runs, at once: its answers come next."""

    def abort() -> None:
        for protocol in list(service.connections):
            protocol.transport.abort()

    loop = service.server.servers[0].get_loop()
    if asyncio._get_running_loop() is loop:
        abort()
    else:
        loop.call_soon_threadsafe(abort)


def run(service: Service, via: str, how: dict[str, Any] = HOW[0], **options: Any) -> Any:
    return load(service.url, via=via, **{"duration_s": 0.5, "timeout_s": 60.0, "processes": 1, **how, **options})


@pytest.mark.parametrize("kind", SIGNATURES)
def test_every_way_loads_every_policy_and_every_answer_is_the_same_each_time(kind: str) -> None:
    with serving(kind) as (service, _):
        for via, how in [(via, HOW[0]) for via in WAYS] + [(via, HOW[1]) for via in WAYS if kind == "recurrent"]:
            report = run(service, via, how)
            assert report.errors == {}, via
            assert report.requests > 4, via
            assert report.as_json()["via"] == via
            assert report.connections >= 3


@pytest.mark.parametrize("via", EPISODES)
@pytest.mark.parametrize("how", HOW, ids=["closed", "open"])
def test_lost_state_is_found(via: str, how: dict[str, Any]) -> None:
    with serving("recurrent") as (service, served):
        runtime = cast(Chain, service.registry.runtimes[1])
        for duration_s in DURATIONS_S:
            begin = runtime.batches
            served.before = lambda batches: setattr(served, "amnesia", batches == begin + 6)  # noqa: B023
            report = run(service, via, how, duration_s=duration_s)
            if report.errors:
                break
        assert set(report.errors) == {"inconsistent"}


def test_a_wrong_answer_to_a_stateless_policy_is_found() -> None:
    with serving("stateless") as (service, served):
        runtime = cast(Chain, service.registry.runtimes[1])
        for via in WAYS:
            begin = runtime.batches
            served.before = lambda batches: setattr(served, "amiss", int(batches == begin + 6))  # noqa: B023
            report = run(service, via, {"concurrency": 1})
            assert report.errors == {"inconsistent": 1}, via


@pytest.mark.parametrize("kind", ["stateless", "recurrent"])
def test_a_step_that_fails_is_counted_by_its_code_and_asked_again(kind: str) -> None:
    def fail_sometimes(_batches: int) -> None:
        if next(turn) in (5, 6, 12):
            raise ValueError

    with serving(kind) as (service, served):
        served.before = fail_sometimes
        for via in WAYS:
            code = "http_500" if via == "oip" else "http_500:runtime_failure"
            for how in HOW:
                turn = iter(range(1_000_000))
                # A sequence ends with a step. It must not be one that fails, on a slow machine either.
                report = run(service, via, how, duration_s=1.0 if via == "oip" else 0.5)
                assert set(report.errors) == {code}, via
                assert report.requests > 4


@pytest.mark.parametrize("via", WAYS)
@pytest.mark.parametrize("how", HOW, ids=["closed", "open"])
def test_a_broken_connection_is_an_error_and_replaced(via: str, how: dict[str, Any], held: Held) -> None:
    with serving("recurrent") as (service, served):
        runs = iter(range(1_000_000))

        def break_sometimes(_batches: int) -> None:
            if next(runs) in (5, 10, 15):
                break_connections(service)
                time.sleep(0.005)  # before the answers leave

        served.before = break_sometimes
        report = run(service, via, how)
        assert set(report.errors) == {"connection"}  # and no step was lost or taken twice
        assert report.requests > 4
        if via == "session":
            lost = (
                0 if how is HOW[0] else report.errors["connection"]
            )  # a beginning's answer may be lost in an open loop
            assert held.begun <= report.connections + lost


def test_what_is_not_answered_in_time_is_given_up(held: Held) -> None:
    with serving("recurrent", slow=True) as (service, _):
        gate = service.hold()
        for via in EPISODES:
            started = time.monotonic()
            report = run(service, via, duration_s=0.2, timeout_s=0.2)
            assert set(report.errors) == {"timeout"}
            assert time.monotonic() - started < 30  # the service is held up for ever
        gate.set()
    held.left = None  # there was no time to end the sequences, whose last steps were held up, too


def test_a_session_that_has_gone_is_counted_and_another_begun(held: Held) -> None:
    with serving("recurrent") as (service, served):
        loop = service.server.servers[0].get_loop()

        def replace_version() -> None:
            service.registry.publish()
            service.registry.withdraw(1)

        def replace_once(batches: int) -> None:
            if batches == 10 and service.registry.highest == 1:
                loop.call_soon_threadsafe(replace_version)

        served.before = replace_once
        report = run(service, "session", {"concurrency": 3}, duration_s=0.5)
        assert set(report.errors) <= {"http_410:session_expired", "http_503:not_serving"}
        assert report.errors["http_410:session_expired"] == 3
        assert held.begun == 6


def test_a_session_that_cannot_be_begun_later_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from actserve.core.errors import SessionsUnavailable

    begin = Sessions.begin
    left = iter(range(8))

    def begin_a_few(*args: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise SessionsUnavailable("full")
        return begin(*args, **options)

    monkeypatch.setattr(Sessions, "begin", begin_a_few)
    with serving("stateless") as (service, served):
        served.before = lambda _batches: time.sleep(0.03)
        report = run(service, "session", {"rate": 600.0}, duration_s=0.2)
        assert set(report.errors) == {"http_503:sessions_unavailable"}
        assert report.connections == 8
        with pytest.raises(ServiceError, match="503 sessions_unavailable: full"):
            run(service, "session")


def test_several_processes_speak_any_way_and_compare_their_answers() -> None:
    with serving("several observations") as (service, _):
        report = run(service, "oip", {"concurrency": 2}, processes=2)
        assert (report.errors, report.processes, report.connections) == ({}, 2, 2)
        assert report.requests > 4


def test_a_way_that_the_service_refuses_is_an_error_of_its_own() -> None:
    with faking(FakeService()) as fake:
        for via in ("session", "stream"):
            with pytest.raises(ServiceError, match="404 unknown_policy"):
                load(fake.url, via=via, duration_s=0.1, processes=1)
        with pytest.raises(ServiceError, match="404 unknown_policy: no policy for /policies/fake/sessions"):
            load(fake.url, via="session", concurrency=2, duration_s=0.1, processes=2)
        assert set(load(fake.url, via="oip", duration_s=0.1, processes=1).errors) == {"http_404:unknown_policy"}
    with pytest.raises(UsageError, match="http, session, stream, oip; got 'fax'"):
        load("http://127.0.0.1:1", via="fax")


def test_every_way_goes_through_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with serving("recurrent", uds=path) as (service, _):
        for via in WAYS:
            report = run(service, via, uds=path)
            assert report.errors == {}
            assert report.requests > 4
