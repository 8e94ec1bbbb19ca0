"""The WebSocket of a game, on the whole service with the policies that ship."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import urllib3
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from actserve.atari.emulator import AtariGame
from actserve.core.signature import Array
from tests.page_service import Service, running
from tests.test_atari import LEFT, PONG
from tests.waiting import until

FAST = {"speed": 0}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as up:
        yield up
        until(lambda: not game_threads())


def game_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("game")]


def opened(service: Service, **query: object) -> Any:
    url = f"ws://{service.address}/games?{urlencode(query)}"
    return connect(url, compression=None, proxy=None)


def hello(ws: ClientConnection) -> Any:
    return json.loads(ws.recv(60))


def picture(ws: ClientConnection, within_s: float = 60) -> tuple[Any, Array]:
    """(head, screen)"""
    message = ws.recv(within_s)
    assert isinstance(message, bytes), message
    (size,) = struct.unpack_from("<I", message)
    return json.loads(message[4 : 4 + size]), np.asarray(Image.open(io.BytesIO(message[4 + size :])))


def tell(ws: ClientConnection, **command: object) -> None:
    ws.send(json.dumps(command))


def refusal(service: Service, **query: Any) -> tuple[str, int]:
    """(the error's code, the close code)"""
    with opened(service, **query) as ws:
        last, code = ending(ws)
    return json.loads(last)["error"]["code"], code


def ending(ws: ClientConnection) -> tuple[bytes | str, int]:
    """(the last message, the close code)"""
    last: bytes | str = b""
    try:
        while True:
            last = ws.recv(60)
    except ConnectionClosed as closed:
        assert closed.rcvd is not None
        return last, closed.rcvd.code


def acted(service: Service, screen: Array) -> int:
    """The action for a screen, by the HTTP route."""
    raw = {"Content-Type": "application/octet-stream"}
    answer = urllib3.request("POST", f"{service.url}/policies/pong/act", body=screen.tobytes(), headers=raw)
    return int(answer.json()["action"])


def test_a_game_moves_and_is_told_as_the_policy_saw_it(service: Service) -> None:
    with opened(service, policy="pong", version=1, seed=7) as ws:
        said = hello(ws)
        assert (said["policy"], said["version"], said["runtime"], said["seed"]) == ("pong", 1, "onnx", 7)
        assert said["values"] == "action_value"
        assert said["environment"]["actions"][2] == {"meaning": "RIGHT", "code": 3}
        reference = AtariGame(PONG, 7)
        number = 0
        while number < 30:
            head, screen = picture(ws)
            for _ in range(number + 1, head["step"]):  # not shown, because this client was slow
                reference.act(acted(service, reference.screen()))
            number = head["step"]
            assert np.array_equal(screen, reference.screen())
            assert head["taken"] == head["proposed"] == np.argmax(head["values"])
            assert head["run_us"][0] > 0
            assert head["items"] >= head["batches"] >= number
            reference.act(head["taken"])


def test_it_is_played_in_the_consoles_own_time(service: Service) -> None:
    with opened(service) as ws:
        hello(ws)
        picture(ws)
        begun = time.monotonic()
        for _ in range(15):
            picture(ws)
        assert time.monotonic() - begun > 0.7  # 15 steps of 4 frames, at 60 frames a second


def test_a_recurrent_policy_scores_and_the_game_ends(service: Service) -> None:
    with opened(service, policy="pong-lstm", seed=2) as ws:
        assert hello(ws)["policy"] == "pong-lstm"
        tell(ws, **FAST)
        rewards: list[float] = []
        told = steps = 0
        while True:
            head, _ = picture(ws)
            rewards += head["rewards"]
            told += len(head["run_us"])
            steps += 1
            if sum(rewards) >= 2:
                break
        assert head["score"] == sum(rewards)
        assert told == head["step"] > steps  # a screen does not show them all, and no time is lost


def test_the_keyboard_takes_over(service: Service) -> None:
    with opened(service) as ws:
        hello(ws)
        tell(ws, held=LEFT)
        heads = [picture(ws)[0] for _ in range(25)]
        assert {head["taken"] for head in heads[3:]} == {LEFT}
        assert len({head["proposed"] for head in heads}) > 1
        tell(ws, held=None)
        heads = [picture(ws)[0] for _ in range(8)]
        assert heads[-1]["taken"] == heads[-1]["proposed"]


def test_a_browser_acts_and_gets_every_screen(service: Service) -> None:
    """It takes what the service would take, but for two steps; the game is the one that is played so."""
    with opened(service, seed=5, acts="browser", policy="pong-lstm") as ws:
        hello(ws)
        reference = AtariGame(PONG, 5)
        for step in range(1, 41):
            head, screen = picture(ws)
            assert (head["step"], head["taken"]) == (step, None)
            np.testing.assert_array_equal(screen, reference.screen())
            action = LEFT if step in (7, 8) else head["proposed"]
            tell(ws, held=action, step=step - 1, **FAST)  # an old step's action is not taken
            tell(ws, held=action, step=step, **FAST)
            reward = reference.act(action)
        head, _ = picture(ws)
        assert head["rewards"] == [reward] * (reward != 0)
        assert head["score"] == reference.score


def test_a_game_that_a_browser_plays_ends(service: Service) -> None:
    with opened(service, seed=5, acts="browser") as ws:
        hello(ws)
        while not (head := picture(ws)[0])["over"]:
            tell(ws, held=0, step=head["step"], **FAST)
        assert head["taken"] == 0
        assert head["score"] == -21
        with pytest.raises(ConnectionClosed, match="1000"):
            ws.recv(60)


def test_a_pause_stands_still(service: Service) -> None:
    with opened(service) as ws:
        hello(ws)
        head, _ = picture(ws)
        tell(ws, paused=True)
        with suppress(TimeoutError):
            while True:
                head, _ = picture(ws, 0.7)
        tell(ws)
        assert picture(ws)[0]["step"] == head["step"] + 1


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"policy": "chess"}, "unknown_policy"),
        ({"policy": "pong", "version": 9}, "unknown_version"),
        ({"policy": "pong", "runtime": "pt2"}, "runtime_refused"),
        ({"policy": "pong", "runtime": "tpu"}, "invalid_request"),
        ({"policy": "pong", "exploration": "random"}, "invalid_request"),
        ({"policy": "pong", "exploration": "wild"}, "malformed_body"),
        ({"policy": "pong", "seed": "-1"}, "malformed_body"),
        ({"policy": "pong", "acts": "nobody"}, "invalid_request"),
    ],
)
def test_what_cannot_be_played_is_refused(service: Service, query: Any, code: str) -> None:
    assert refusal(service, **query) == (code, 1008)
    assert service.game_slots.taken == 0


@pytest.mark.parametrize("command", ["no json", '{"held": 6}', '{"held": -1}', '{"speed": 99}', '{"hold": 1}', "[]"])
def test_what_is_no_command_ends_the_game(service: Service, command: str) -> None:
    with opened(service) as ws:
        hello(ws)
        ws.send(command)
        last, code = ending(ws)
    assert json.loads(last)["error"]["code"] == "invalid_request"
    assert code == 1008


def test_there_are_so_many_games_and_no_more(service: Service) -> None:
    with ExitStack() as games:
        first, *_ = [games.enter_context(opened(service)) for _ in range(4)]
        until(lambda: service.game_slots.taken == 4)
        told = json.loads(urllib3.request("GET", f"{service.url}/games").data)
        assert told == {"playable": True, "reason": None, "most": 4, "playing": 4}
        assert refusal(service) == ("too_many_games", 1013)
        first.close()
        until(lambda: service.game_slots.taken == 3)
        with opened(service) as ws:
            hello(ws)
    until(lambda: service.game_slots.taken == 0 and not game_threads())


def test_a_long_pause_ends_the_game() -> None:
    with running(session_idle_s=0.3) as service, opened(service) as ws:
        hello(ws)
        tell(ws, paused=True)
        assert ending(ws)[1] == 1001


def test_a_restart_closes_the_game_cleanly() -> None:
    with running() as service, opened(service) as ws:
        hello(ws)
        picture(ws)
        service.server.should_exit = True
        assert ending(ws)[1] == 1012
    until(lambda: not game_threads())


def test_games_can_be_turned_off() -> None:
    with running(max_games=0) as service:
        told = json.loads(urllib3.request("GET", f"{service.url}/games").data)
        assert told["playable"] is False
        assert "turned off" in told["reason"]
        assert refusal(service) == ("invalid_request", 1008)
