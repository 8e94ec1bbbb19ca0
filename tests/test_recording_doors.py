"""Every door is recorded, and replayed bit for bit: with resets, random exploration, retries and two versions."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from websockets.sync.client import connect

from actserve.client.remote_policy import RemotePolicy
from actserve.client.sequence import OipSequence
from actserve.client.stream import Stream
from actserve.core.errors import UsageError
from actserve.recording.reader import Recording
from actserve.server.protocols.robots.packed import of_vla_eval, pack, unpack
from tests import doors, streams
from tests.fake_policy import NAME, SIGNATURE, DigestRuntime
from tests.fastpath_service import NAME as TINY
from tests.fastpath_service import SCREENS, SumRuntime
from tests.oip import in_binary
from tests.recorded import recorded_remote, recording, replayed, steps_in
from tests.stream_service import Service, running

STEPS = 12


def take_all_ways(service: Service) -> Counter[str]:
    """Episodes through every door that keeps the state, and stateless requests -> the steps of each door."""
    for query in ("", "?exploration=random&seed=3"):
        with streams.opened(service, query) as ws:
            ws.recv(60)
            for x in range(STEPS):
                streams.ask(ws, json.dumps({"x": x, "is_init": x % 5 == 4}) if x % 2 else streams.raw(x))
    for exploration in (None, "random"):
        with RemotePolicy(service.url, NAME) as policy:
            options: Any = {"exploration": exploration, "seed": 9}
            with policy.session(**options) as session:
                for x in range(STEPS):
                    session.act({"x": np.array(x), "is_init": np.array(x in (0, 7))})
            with OipSequence(policy, **options) as sequence:
                for x in range(STEPS):
                    sequence.act(np.array(x))
            episode = policy.episode(**options)
            for x in range(STEPS):
                episode.act(np.array(x))
            policy.step({"x": np.arange(STEPS)}, exploration=exploration)
    # A sequence ends with its last observation, sent again.
    return Counter(stream=2 * STEPS, session=2 * STEPS, sequence=2 * (STEPS + 1), act=4 * STEPS)


@pytest.mark.parametrize("slow", [False, True])
def test_what_every_way_to_keep_the_state_does_is_replayed(tmp_path: Path, slow: bool) -> None:
    with recording(tmp_path) as recorder, running(slow=slow, recorder=recorder) as service:
        expected = take_all_ways(service)
    steps = steps_in(tmp_path, NAME)
    assert Counter(step.door for step in steps) == expected
    comparison, player = replayed(tmp_path, NAME, SIGNATURE, DigestRuntime(1).run)
    assert (comparison.steps, comparison.identical, player.skipped) == (len(steps), len(steps), 0)
    other, _ = replayed(tmp_path, NAME, SIGNATURE, DigestRuntime(2).run)
    assert other.same == 0
    assert other.first is not None
    assert other.first.time == min(step.time for step in steps)


def test_a_reset_begins_another_episode(tmp_path: Path) -> None:
    with recording(tmp_path) as recorder, running(recorder=recorder) as service, streams.opened(service) as ws:
        ws.recv(60)
        for x in range(6):
            streams.ask(ws, json.dumps({"x": x} | ({"is_init": True} if x == 3 else {})))
    steps = steps_in(tmp_path, NAME)
    first, second = dict.fromkeys(step.episode for step in steps)
    assert second == f"{first}.4"
    assert [(step.episode == first, step.step, step.follows) for step in steps] == [
        *((True, 1, 0), (True, 2, 1), (True, 3, 2)),
        *((False, 4, 0), (False, 5, 4), (False, 6, 5)),
    ]


def test_each_step_of_a_session_is_recorded_once(tmp_path: Path) -> None:
    """A retried step is answered from memory."""
    with recorded_remote(tmp_path) as (service, policy):
        session = policy.session(seed=1)
        for x in range(4):
            session.act(np.array(x))
            path = f"/policies/{NAME}/act"
            headers = {"X-Session": session.id, "X-Step": str(x + 1), "Content-Type": "application/octet-stream"}
            again = urllib3.request("POST", service.url + path, body=streams.raw(x), headers=headers)
            assert (again.status, again.headers["X-Replayed"]) == (200, "1")
    assert [(step.step, step.follows, int(step.tensors["observation.x"])) for step in steps_in(tmp_path, NAME)] == [
        (number + 1, number, number) for number in range(4)
    ]


def test_two_versions_each_replay_what_they_did(tmp_path: Path) -> None:
    """A session stays on its version, and the recording says which."""
    with recorded_remote(tmp_path) as (service, policy), policy.session(seed=1) as session:
        session.act(np.array(1))
        publish(service)
        session.act(np.array(2))
        policy.act(np.array(3))
    assert [(step.version, step.door) for step in steps_in(tmp_path, NAME)] == [
        (1, "session"), (1, "session"), (2, "act"),
    ]  # fmt: skip
    for version in (1, 2):
        comparison, _ = replayed(tmp_path, NAME, SIGNATURE, DigestRuntime(version).run, version)
        assert comparison.identical == comparison.steps == {1: 2, 2: 1}[version]


def publish(service: Service) -> None:
    """Make another version live, in the event loop of the service."""
    published: Future[int] = Future()
    loop = service.server.servers[0].get_loop()
    loop.call_soon_threadsafe(lambda: published.set_result(service.registry.publish()))
    published.result(60)


def test_a_session_that_another_worker_stepped_goes_on_with_its_state(tmp_path: Path) -> None:
    """Each worker records the steps that it takes, and the state where it did not take the step before."""
    with recorded_remote(tmp_path) as (service, policy), policy.session(seed=1) as session:
        session.act(np.array(1))
        recorded = service.registry.policies[1].recorder
        service.registry.policies[1].recorder = None  # as if another worker took the step
        session.act(np.array(2))
        service.registry.policies[1].recorder = recorded
        session.act(np.array(3))
        session.act(np.array(4))
    steps = steps_in(tmp_path, NAME)
    assert [(step.step, step.follows) for step in steps] == [(1, 0), (3, None), (4, 3)]
    comparison, player = replayed(tmp_path, NAME, SIGNATURE, DigestRuntime(1).run)
    assert (comparison.identical, player.skipped) == (3, 0)


def test_the_doors_of_all_protocols(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    items = doors.screens(3)
    with recording(folder) as recorder, doors.running(tmp_path, recorder=recorder) as service:
        for name, door in doors.ALL.items():
            given = items if name in doors.BATCHES else items[:1]
            assert door(service, given).status == "200", name
    steps = steps_in(folder, TINY)
    robots, acts = 3, 3 * len(doors.BATCHES) + 1  # json-numpy is stateless here
    assert Counter(step.door for step in steps) == Counter(act=acts, session=1, sequence=1, stream=2, robot=robots)
    comparison, _ = replayed(folder, TINY, SCREENS, SumRuntime(SCREENS).run)
    assert comparison.identical == comparison.steps == len(steps)


@pytest.mark.parametrize("excluded", [False, True])
def test_a_token_can_be_excluded(tmp_path: Path, excluded: bool) -> None:
    folder = tmp_path / "recording"
    names = ["robot"] if excluded else []
    with (
        recording(folder, excluded=names) as recorder,
        doors.running(tmp_path, tokens=True, recorder=recorder) as service,
    ):
        for name in ("fast path", "JSON", "session", "OIP sequence", "stream", "openpi", "gRPC"):
            assert doors.ALL[name](service, doors.screens(1)).status == "200", name
    steps = recorder.recorded[0].outcomes
    if excluded:
        assert not steps
        assert not list(folder.iterdir())
    else:
        assert steps == {"recorded": 7}
        assert {step.client for step in steps_in(folder, TINY)} == {"robot"}


def test_an_answer_is_the_same_with_and_without(tmp_path: Path) -> None:
    body, headers = in_binary({"pixels": doors.screens(2)})
    named = {name.replace("-", "_"): value for name, value in headers.items()}
    answers = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        folder.mkdir()
        recorded = nullcontext() if folder.name == "2" else recording(folder / "recording")
        with recorded as recorder, doors.running(folder, recorder=recorder) as service:
            answers.append(service.post(f"/v2/models/{TINY}/infer", body, "application/octet-stream", **named).data)
    assert answers[0] == answers[1]


def test_feedback_is_stored_with_the_step_that_it_is_about(tmp_path: Path) -> None:
    with recorded_remote(tmp_path) as (service, policy):
        with policy.session(seed=1) as session:
            for x in range(3):
                session.act(np.array(x))
                session.tell(reward=x / 2, done=x == 2)
        app: Any = service.server.config.app
        assert app.state.registry.recorder.recorded[0].outcomes == {"recorded": 3}
    assert [(step.previous_reward, step.previous_done) for step in steps_in(tmp_path, NAME)] == [
        (None, None), (0.0, False), (0.5, False),
    ]  # fmt: skip
    found = Recording(tmp_path).of(NAME).transitions()
    assert (found.reward.tolist(), found.done.tolist()) == ([0.0, 0.5, 1.0], [False, False, True])


def feedback_in(folder: Path, policy: str = NAME) -> tuple[list[float], list[bool]]:
    found = Recording(folder).of(policy).transitions()
    return found.reward.tolist(), found.done.tolist()


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("query", ["", "?exploration=random&seed=3"])  # with and without the arena
def test_a_stream_tells_the_result_of_a_step_with_a_text_message(tmp_path: Path, slow: bool, query: str) -> None:
    with (
        recording(tmp_path) as recorder,
        running(slow=slow, recorder=recorder) as service,
        streams.opened(service, query) as ws,
    ):
        assert json.loads(ws.recv(60))["recorded"] is True
        ws.send('{"result": {"reward": 9.0}}')  # there was no step
        for x in range(4):
            streams.ask(ws, streams.raw(x) if x % 2 else json.dumps({"x": x}))
            ws.send(json.dumps({"result": {"reward": x / 2}}))
            ws.send(json.dumps({"result": {"reward": 1, "done": x == 3}}))  # both count
        refused = streams.ask(ws, '{"result": {"reward": "much"}}')
        assert (refused["status"], refused["step"]) == (422, 5)
        assert refused["error"]["message"].startswith("expected a result with reward, a number, and done; reward:")
    assert [step.previous_reward for step in steps_in(tmp_path, NAME)] == [None, 1.0, 1.5, 2.0]
    assert feedback_in(tmp_path) == ([1.0, 1.5, 2.0, 2.5], [False, False, False, True])


def test_a_flood_of_results_is_charged_to_the_token(tmp_path: Path) -> None:
    """One for each step is free."""
    with doors.running(tmp_path, tokens=True) as service:
        url = f"ws://127.0.0.1:{service.port}/policies/{TINY}/stream"
        with connect(url, compression=None, proxy=None, additional_headers=service.headers, max_size=None) as ws:
            ws.recv(60)
            left = service.left
            for number in range(3):
                ws.send(doors.screens(1)[0].tobytes())
                ws.recv(60)
                ws.send('{"result": {"reward": 1}}')
                ws.ping().wait(60)
                assert left - service.left == number + 1
            for _ in range(int(service.left)):
                ws.send('{"result": {"reward": 1}}')
            ws.send('{"result": {"reward": 2}}')
            answer = json.loads(ws.recv(60))
    assert (answer["status"], answer["step"]) == (429, 4)


def test_the_client_tells_the_results_of_a_stream(tmp_path: Path) -> None:
    """An episode that begins within the stream has rewards of its own."""
    with recording(tmp_path) as recorder, running(recorder=recorder) as service, Stream(service.url) as stream:
        for x in range(6):
            stream.act({"x": np.array(x), "is_init": np.array(x == 3)})
            stream.tell(x / 2, done=x % 3 == 2)
        stream.send({"x": np.array(1)})
        with pytest.raises(UsageError, match="receive the replies to the 1 messages"):
            stream.tell(1.0)
        stream.receive()
        with pytest.raises(UsageError, match="expected a finite reward; got nan"):
            stream.tell(np.nan)
    reward, done = feedback_in(tmp_path)
    np.testing.assert_array_equal(reward, [0, 0.5, 1, 1.5, 2, 2.5, np.nan])
    assert done == [False, False, True, False, False, True, False]


def test_without_a_recording_a_result_is_ignored(tmp_path: Path) -> None:
    with running() as service, streams.opened(service) as ws:
        assert json.loads(ws.recv(60))["recorded"] is False
        ws.send('{"result": {"reward": 1.0, "done": true}}')
        assert streams.ask(ws, streams.raw(1))[0] == 1
    with running() as service, Stream(service.url) as stream:
        stream.act(np.array(1))
        stream.tell(1.0)
        assert stream.act(np.array(2)) is not None
        assert stream.steps == 2


@pytest.mark.parametrize(
    ("metrics", "reward", "done"),
    [({"success": True}, 1.0, True), ({"success": 0.0}, 0.0, False), ({"success": "yes"}, None, False)],
)
def test_a_robot_tells_its_success(tmp_path: Path, metrics: Any, reward: float | None, done: bool) -> None:
    folder = tmp_path / "recording"
    observation = {"type": "observation", "payload": {"pixels": doors.screens(1)[0]}}
    end = {"type": "episode_end", "payload": {"metrics": metrics, "steps": 2, "elapsed_sec": 0.1}}
    begin = {"type": "episode_start", "payload": {"name": "task"}}
    with recording(folder) as recorder, doors.running(tmp_path, recorder=recorder) as service:
        url = f"ws://127.0.0.1:{service.port}/policies/{TINY}/vla-eval"
        with connect(url, compression=None, proxy=None, max_size=None) as socket:
            for message in (observation, observation, end, begin, observation):
                socket.send(pack({**message, "seq": 1}, of_vla_eval))
                if message is observation:
                    answer = socket.recv(60)
                    assert isinstance(answer, bytes)
                    assert unpack(answer)["type"] == "action"
    rewards, dones = feedback_in(folder, TINY)
    told = [value for value in rewards if not np.isnan(value)]
    assert (told, sum(dones)) == ([] if reward is None else [reward], done)


@pytest.mark.parametrize("header", [{"X-Reward": "much"}, {"X-Reward": "nan"}, {"X-Done": "maybe"}])
def test_feedback_that_is_none_is_refused(tmp_path: Path, header: dict[str, str]) -> None:
    with recorded_remote(tmp_path) as (service, policy):
        session = policy.session()
        session.act(np.array(1))
        headers = {"X-Session": session.id, "Content-Type": "application/octet-stream", **header}
        path = f"{service.url}/policies/{NAME}/act"
        refused = urllib3.request("POST", path, body=streams.raw(2), headers=headers)
        assert (refused.status, next(iter(header)) in refused.json()["error"]["message"]) == (422, True)
