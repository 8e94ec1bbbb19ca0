"""`actserve.client.stream`, against the service and against servers that are none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from actserve.client import stream as client
from actserve.client.stream import Stream
from actserve.core.errors import InvalidTensor, ServiceError, ServiceUnreachable, UsageError
from tests.fake_policy import Alone, seen
from tests.stream_service import Service, running

HELLO = """{"policy": "p", "version": 1, "runtime": "onnx", "offsets": {"action": 16}, "environment": null,
"exploration": "deterministic", "seed": null, "window": 8, "max_message_bytes": 9, "idle_s": 1, "a new field": 0,
"signature": {"max_batch": 1, "observations": [{"name": "x", "dtype": "float32", "shape": [2]},
{"name": "y", "dtype": "bool", "shape": []}], "outputs": [{"name": "action", "dtype": "float32", "shape": [2]}]}}"""
BOTH = {"x": np.array([1, 2], np.float32), "y": np.array(True)}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as up:
        yield up


@contextmanager
def saying(handler: Callable[[ServerConnection], None]) -> Iterator[str]:
    """A WebSocket server that does whatever `handler` does with a connection."""
    with serve(handler, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def test_a_stream_goes_through_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with running(uds=path) as service, Stream(service.url, uds=path) as stream:
        assert stream.act(np.array(1)) == Alone(1, 0, None).take(seen(1))["action"][0]


def test_nothing_is_sent_that_the_signature_refuses(service: Service) -> None:
    with Stream(service.url) as stream:
        wrongs: list[tuple[Any, str]] = [
            (np.array(1.0), r"expected int64\[B, \]; got float64\[1\]"),
            (np.array(1000), "at most 999"),
            ({"y": np.array(1)}, "one of the inputs x, is_init"),
            ({"is_init": np.array(True)}, "expected int64"),
        ]
        for wrong, message in wrongs:
            with pytest.raises(InvalidTensor, match=message):
                stream.act(wrong)
        assert stream.unanswered == 0
        assert stream.act(np.array(1)) == Alone(1, 0, None).take(seen(1))["action"][0]


def test_a_client_can_neither_get_too_far_ahead_nor_take_a_reply_for_another(service: Service) -> None:
    with Stream(service.url) as stream:
        with pytest.raises(UsageError, match="nothing to receive"):
            stream.receive()
        for _ in range(stream.hello.window):
            stream.send(np.array(1))
        with pytest.raises(UsageError, match="8 messages are unanswered, the limit"):
            stream.send(np.array(1))
        with pytest.raises(UsageError, match="receive the replies"):
            stream.act(np.array(1))
        assert [stream.receive().step for _ in range(8)] == list(range(1, 9))
        assert stream.act(np.array(1)) == stream.outputs["action"]


def test_several_observations_go_by_name_and_an_action_may_be_an_array() -> None:
    heard: list[str | bytes] = []

    def handler(ws: ServerConnection) -> None:
        ws.send(HELLO)
        heard.append(ws.recv())
        ws.send('{"action": [0.5, "Infinity"], "step": 1, "queue_us": 1, "run_us": 2}')
        ws.recv()

    with saying(handler) as url, Stream(url, "p q", 3, outputs=["a", "b"], exploration="random", seed=7) as stream:
        with pytest.raises(UsageError, match="p takes x, y: give them by name"):
            stream.act(BOTH["x"])
        np.testing.assert_array_equal(stream.act(BOTH), np.array([0.5, np.inf], np.float32), strict=True)
        stream.send(BOTH)
    assert heard == [
        '{"x":{"dtype":"float32","shape":[2],"b64":"AACAPwAAAEA="},"y":{"dtype":"bool","shape":[],"b64":"AQ=="}}'
    ]


def test_where_a_stream_is_asked_for() -> None:
    paths: list[str] = []

    def handler(ws: ServerConnection) -> None:
        assert ws.request is not None
        paths.append(ws.request.path)
        ws.send(HELLO)

    with saying(handler) as url:
        with Stream(url):
            pass
        with Stream(f"{url}/below/", "p q", 3, outputs=["a", "b"], exploration="random", seed=0):
            pass
    assert paths == ["/stream", "/below/policies/p%20q/versions/3/stream?outputs=a%2Cb&exploration=random&seed=0"]


def test_what_cannot_be_asked_for() -> None:
    for url in ("ftp://127.0.0.1", "127.0.0.1:8000", "http://"):
        with pytest.raises(UsageError, match="expected a URL"):
            Stream(url)
    with pytest.raises(UsageError, match="`version` requires `policy`"):
        Stream("http://127.0.0.1", version=3)


def test_a_refusal_is_the_services_own(service: Service) -> None:
    with (
        pytest.raises(ServiceError, match="no policy named 'chess'; known: digest") as refused,
        Stream(service.url, "chess"),
    ):
        pass
    assert (refused.value.status, refused.value.reason) == (404, "unknown_policy")
    with pytest.raises(ServiceError, match="403 http_error"), Stream(f"{service.url}/elsewhere"):
        pass


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ServiceUnreachable, match="no answer from ws://"), Stream(url):
            pass


GARBLED = ["", "[]", '{"action": [1, 2]}', '{"error": 1}', b"1234", b""]


@pytest.mark.parametrize("reply", GARBLED)
def test_an_answer_that_is_none_is_an_error(reply: str | bytes) -> None:
    def handler(ws: ServerConnection) -> None:
        ws.send(HELLO)
        for _ in ws:
            ws.send(reply)

    with saying(handler) as url, Stream(url) as stream, pytest.raises(ServiceError):
        stream.act(BOTH)


def test_a_hello_that_is_none_is_an_error() -> None:
    expected = pytest.raises(ServiceError, match="200 unintelligible: expected a hello; got good day")
    with saying(lambda ws: ws.send("good day")) as url, expected, Stream(url):
        pass


def test_a_stream_that_ends_says_why() -> None:
    def handler(ws: ServerConnection) -> None:
        ws.send(HELLO)
        ws.recv()
        ws.close(1012, "service restart")

    with saying(handler) as url, Stream(url) as stream:
        for _ in range(2):
            with pytest.raises(ServiceUnreachable, match="is over: 1012 service restart") as over:
                stream.act(BOTH)
            assert over.value.detail["close_code"] == 1012


def test_a_connection_that_breaks_is_an_error() -> None:
    def handler(ws: ServerConnection) -> None:
        ws.send(HELLO)
        ws.recv()
        ws.socket.shutdown(socket.SHUT_RDWR)

    with saying(handler) as url, Stream(url) as stream:
        with pytest.raises(ServiceUnreachable, match="the connection broke") as over:
            stream.act(BOTH)
        assert over.value.detail["close_code"] is None


def test_an_answer_that_does_not_come_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(ws: ServerConnection) -> None:
        ws.send(HELLO)
        for _ in ws:
            pass

    with saying(handler) as url, Stream(url) as stream:
        monkeypatch.setattr(client, "ANSWER_TIMEOUT_S", 0.1)
        with pytest.raises(ServiceUnreachable, match="no answer from ws://"):
            stream.act(BOTH)
        with pytest.raises(ServiceUnreachable, match="is over"):
            stream.act(BOTH)
