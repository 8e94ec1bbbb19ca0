"""One contract, two lanes: whatever bytes come, in whatever pieces, the answers are the same to the last byte."""

from __future__ import annotations

import base64
import gzip
import io
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from backports import zstd
from safetensors.numpy import save

from actserve.core.settings import Settings
from actserve.core.signature import Array
from actserve.telemetry.counts import ACT
from tests.fastpath_service import (
    FAST,
    ITEM_BYTES,
    NAME,
    PLAIN,
    Service,
    exchange,
    overloaded,
    request,
    running,
    take_rows,
)
from tests.waiting import until

BODY = bytes(range(ITEM_BYTES))
RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER: on, for no time
GET = b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n"
LAST = b"GET /healthz HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"  # what the service closes after
CHUNKED = (
    b"POST /act HTTP/1.1\r\nHost: h\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"c\r\n" + BODY + b"\r\n0\r\n\r\n"
)


@pytest.fixture(scope="module")
def lane() -> Iterator[Service]:
    with running(FAST) as up:
        yield up


@pytest.fixture(scope="module")
def plain() -> Iterator[Service]:
    with running(PLAIN) as up:
        yield up


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def zstd_request(body: bytes) -> bytes:
    return request(zstd.compress(body), headers=["Content-Encoding: zstd"])


def typed(body: bytes, content_type: str, *headers: str) -> bytes:
    """A request with a body of this type."""
    raw = request(body, headers=headers)
    return raw.replace(b"application/octet-stream", content_type.encode(), 1)


def npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


RAW = "Content-Type: application/octet-stream"
JSON = "application/json"
ITEM = np.frombuffer(BODY, np.uint8).reshape(4, 3)
LISTS = str(ITEM.tolist()).encode()
EXCHANGES: dict[str, list[bytes]] = {
    "one": [request(BODY)],
    "by name": [request(BODY, f"/policies/{NAME}/act")],
    "by version": [request(BODY, f"/policies/{NAME}/versions/1/act")],
    "unknown": [request(BODY, "/policies/other/act")],
    "escaped path": [request(BODY, f"/policies/{NAME[0]}%69ny/act")],
    "query": [request(BODY, "/act?outputs=action,value")],
    "empty query": [request(BODY, "/act?")],
    "absolute": [request(BODY, "http://here/act")],
    "three in a row": [request(BODY) * 3],
    "lane, route, lane": [request(BODY) + GET + request(BODY[::-1])],
    "route, lane": [GET, request(BODY)],
    "refused, lane": [request(BODY[:5]) + request(BODY)],
    "not found, lane": [request(BODY, "/nothing") + request(BODY)],
    "two items": [request(BODY * 2)],
    "eight items, one": [request(BODY * 3 + BODY[::-1] * 5) + request(BODY)],
    "nine items": [request(BODY * 9)],
    "zstd": [zstd_request(BODY), zstd_request(BODY[::-1]) * 2 + request(BODY)],
    "zstd of two items": [zstd_request(BODY * 2) + request(BODY)],
    "zstd of too little": [zstd_request(BODY[:5]) + request(BODY)],
    "zstd of nothing": [zstd_request(b"") + request(BODY)],
    "zstd of much": [zstd_request(bytes(1 << 20))],
    "not zstd": [request(BODY, headers=["Content-Encoding: zstd"]) + request(BODY)],
    "zstd cut short": [request(zstd.compress(BODY)[:-3], headers=["Content-Encoding: zstd"])],
    "zstd and more": [request(zstd.compress(BODY) + b"more", headers=["Content-Encoding: zstd"])],
    "gzip": [request(gzip.compress(BODY), headers=["Content-Encoding: gzip"])],
    "other coding": [request(BODY, headers=["Content-Encoding: br"])],
    "no item": [request(b"")],
    "too short for its length": [request(BODY[:5], length="12")],
    "more than its length": [request(BODY + b"more")],
    "chunked": [CHUNKED],
    "chunked, lane": [CHUNKED + request(BODY)],
    "both lengths": [request(BODY, headers=["Transfer-Encoding: chunked"])],
    "length twice": [request(BODY, headers=["Content-Length: 12"])],
    "lengths that differ": [request(BODY, headers=["Content-Length: 5"])],
    "signed length": [request(BODY, length="+12")],
    "padded length": [request(BODY, length="012")],
    "spaced length": [request(BODY, length="  12")],
    "length with a space behind it": [request(BODY, length="12 ")],
    "list of lengths": [request(BODY, length="12, 12")],
    "hex length": [request(BODY, length="0xc")],
    "huge length": [request(BODY, length="99999999999999999999999")],
    "closing": [request(BODY, headers=["Connection: close"])],
    "keep-alive": [request(BODY, headers=["Connection: keep-alive"])],
    "HTTP/1.0": [request(BODY).replace(b"HTTP/1.1", b"HTTP/1.0")],
    "HTTP/1.0 kept": [request(BODY, headers=["Connection: keep-alive"]).replace(b"HTTP/1.1", b"HTTP/1.0")],
    "HTTP/2": [request(BODY).replace(b"HTTP/1.1", b"HTTP/2.0")],
    "no version": [request(BODY).replace(b" HTTP/1.1", b"")],
    "other method": [request(BODY).replace(b"POST", b"PUT")],
    "lower-case method": [request(BODY).replace(b"POST", b"post")],
    "no host": [request(BODY).replace(b"Host: here\r\n", b"")],
    "two hosts": [request(BODY, headers=["Host: there"])],
    "no type": [request(BODY).replace(RAW.encode() + b"\r\n", b"")],
    "type with a parameter": [request(BODY).replace(RAW.encode(), RAW.encode() + b"; charset=x")],
    "type in capitals": [request(BODY).replace(b"octet-stream", b"Octet-Stream")],
    "two types": [request(BODY, headers=["Content-Type: application/json"])],
    "JSON": [
        head("POST /act HTTP/1.1", "Host: h", "Content-Type: application/json", "Content-Length: 11") + b'{"pixels":1}'
    ],
    "names in capitals": [request(BODY).replace(b"Content-Length", b"CONTENT-LENGTH")],
    "accepts all": [request(BODY, headers=["Accept: */*"])],
    "accepts JSON": [request(BODY, headers=["Accept: application/json"])],
    "accepts raw": [request(BODY, headers=["Accept: application/octet-stream"])],
    "accepts nothing we have": [request(BODY, headers=["Accept: text/html"])],
    "expects": [request(BODY, headers=["Expect: 100-continue"])],
    "compressed": [request(BODY, headers=["Content-Encoding: zstd"])],
    "a step": [request(BODY, headers=["X-Step: 1"])],
    "space before the colon": [request(BODY, headers=["Accept : */*"])],
    "folded": [request(BODY, headers=["Accept:", " */*"])],
    "no colon": [request(BODY, headers=["nonsense"])],
    "no name": [request(BODY, headers=[": x"])],
    "NUL": [request(BODY, headers=["User-Agent: a\0b"])],
    "bare CR": [request(BODY, headers=["User-Agent: a\rContent-Length: 5"])],
    "bare LF": [request(BODY, headers=["User-Agent: a\nContent-Length: 5"])],
    "LF alone": [request(BODY).replace(b"\r\n", b"\n")],
    "a high byte": [request(BODY, headers=["User-Agent: é"])],
    "empty line first": [b"\r\n" + request(BODY)],
    "empty line between": [request(BODY) + b"\r\n" + request(BODY)],
    "many headers": [request(BODY, headers=[f"Accept-Language: {'x' * 5000}"])],
    "a head without end": [b"POST /act HTTP/1.1\r\n" + b"A: b\r\n" * 9000],
    "nonsense": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20],
    "outputs": [request(BODY, "/act?outputs=value,action") + request(BODY * 3, "/act?outputs=value")],
    "unknown output": [request(BODY, "/act?outputs=reward") + request(BODY)],
    "outputs twice": [request(BODY, "/act?outputs=value&outputs=action")],
    "exploration": [request(BODY, "/act?exploration=deterministic")],
    "one output in raw": [request(BODY, "/act?outputs=value", ["Accept: application/octet-stream"])],
    "two outputs in raw": [request(BODY, "/act?outputs=value,action", ["Accept: application/octet-stream"])],
    "outputs in safetensors": [request(BODY * 2, "/act?outputs=value", ["Accept: application/safetensors"])],
    "lists": [typed(b'{"pixels":%s}' % LISTS, JSON) + request(BODY)],
    "lists of two items": [typed(b'{"pixels":[%s,%s]}' % (LISTS, LISTS), JSON) + request(BODY)],
    "lists of a batch of one": [typed(b'{"pixels":[%s]}' % LISTS, JSON)],
    "lists of nine items": [typed(b'{"pixels":[%s]}' % b",".join([LISTS] * 9), JSON)],
    "JSON with a seed": [typed(b'{"pixels":%s,"seed":3}' % LISTS, JSON) + request(BODY)],
    "JSON with an unknown input": [typed(b'{"pixels":%s,"more":3}' % LISTS, JSON) + request(BODY)],
    "JSON out of range": [typed(b'{"pixels":%s}' % LISTS.replace(b"11", b"256"), JSON) + request(BODY)],
    "JSON cut short": [typed(b'{"pixels":', JSON) + request(BODY)],
    "JSON of one that the program chokes on": [typed(b'{"pixels":%s}' % LISTS.replace(b"[0", b"[255"), JSON)],
    "JSON, then its end": [typed(b'{"pixels":%s}' % LISTS, JSON), typed(b'{"pixels":%s}' % LISTS, JSON) * 3],
    "JSON in gzip": [typed(gzip.compress(b'{"pixels":%s}' % LISTS, mtime=0), JSON, "Content-Encoding: gzip")],
    "JSON with a charset": [typed(b'{"pixels":%s}' % LISTS, f"{JSON}; charset=utf-8")],
    "base64": [typed(b'{"pixels":{"dtype":"uint8","shape":[4,3],"b64":"%s"}}' % base64.b64encode(BODY), JSON)],
    "safetensors": [typed(save({"pixels": ITEM}), "application/safetensors") + request(BODY)],
    "safetensors of three": [typed(save({"pixels": np.stack([ITEM] * 3)}), "application/safetensors")],
    "safetensors of another shape": [typed(save({"pixels": ITEM.T.copy()}), "application/safetensors")],
    "npy": [typed(npy(ITEM), "application/x-npy") + typed(npy(np.stack([ITEM, ITEM])), "application/x-npy")],
    "npy called raw": [request(npy(ITEM))],
    "another dtype": [typed(BODY, "application/octet-stream; dtype=float32") + request(BODY)],
    "its dtype": [typed(BODY, "application/octet-stream; dtype=uint8") + request(BODY)],
    "unknown type": [typed(BODY, "text/plain") + request(BODY)],
    "large": [typed(b'{"pixels":%s}%s' % (LISTS, b" " * 70_000), JSON) + request(BODY)],
    "an unknown session": [request(BODY, headers=["X-Session: abc", "X-Step: 1"]) + request(BODY)],
    "an item that the program chokes on": [request(b"\xff" * ITEM_BYTES) + request(BODY)],
}


@pytest.mark.parametrize("pieces", EXCHANGES.values(), ids=EXCHANGES.keys())
def test_both_lanes_answer_alike(lane: Service, plain: Service, pieces: list[bytes]) -> None:
    with ThreadPoolExecutor(2) as both:  # each waits until nothing more comes
        found, expected = both.map(exchange, (lane, plain), (pieces, pieces))
    assert found == expected


TAKEN = {
    "one", "by name", "three in a row", "keep-alive", "names in capitals", "accepts all", "accepts JSON",
    "spaced length", "two items", "eight items, one", "zstd", "by version", "query", "outputs", "one output in raw",
    "outputs in safetensors", "lists", "lists of two items", "lists of a batch of one", "JSON, then its end",
    "JSON in gzip", "JSON with a charset", "base64", "safetensors", "safetensors of three", "npy", "its dtype", "gzip",
    "zstd of two items", "accepts raw", "type with a parameter", "type in capitals", "large",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_what_the_lane_takes_never_comes_to_the_routes(lane: Service, name: str) -> None:
    before = len(lane.requests)
    assert exchange(lane, EXCHANGES[name]).startswith(b"HTTP/1.1 200 OK\r\n")
    assert len(lane.requests) == before


@pytest.mark.parametrize(
    "name",
    [
        *("one", "three in a row", "lane, route, lane", "refused, lane", "chunked, lane", "zstd", "lists"),
        *("JSON with a seed", "safetensors of three", "zstd and more"),
    ],
)
def test_pieces_make_no_difference(lane: Service, plain: Service, name: str) -> None:
    data = b"".join(EXCHANGES[name]) + LAST
    expected = exchange(plain, [data])
    for cut in range(1, len(data), 7):
        assert exchange(lane, [data[:cut], data[cut:]], 0.002) == expected, cut
    assert exchange(lane, [data[index : index + 1] for index in range(len(data))]) == expected


def test_a_batch_is_all_that_waits(lane: Service) -> None:
    runtime = lane.registry.runtime
    connections = [lane.connect() for _ in range(6)]
    for connection in connections:  # they are all accepted before it matters
        connection.sendall(request(BODY))
        assert b"200 OK" in connection.recv(1000)
    runtime.gate.clear()
    for index, connection in enumerate(connections):
        connection.sendall(request(bytes([index]) + BODY[1:]))
    time.sleep(0.1)
    runtime.gate.set()
    answers = [connection.recv(1000) for connection in connections]
    expected = [(index + sum(BODY[1:])) % 5 for index in range(6)]
    assert [int(answer.partition(b'"action":')[2][:1]) for answer in answers] == expected
    assert max(runtime.sizes[-6:]) > 1
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("sent", [0, 3, 60, len(request(BODY)) - 5, len(request(BODY))])
def test_a_client_that_goes_leaves_no_row_taken(lane: Service, sent: int) -> None:
    arena = lane.policy.batcher.arena
    assert arena is not None
    free = arena.free
    lane.registry.runtime.gate.clear()
    connection = lane.connect()
    connection.sendall(request(BODY)[:sent])
    time.sleep(0.05)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()
    time.sleep(0.05)
    lane.registry.runtime.gate.set()
    until(lambda: arena.free == free and lane.policy.statistics().waiting == 0)
    assert b"200 OK" in exchange(lane, [request(BODY)])


def test_clients_that_go_while_they_are_answered_are_no_errors(lane: Service, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(300):
        with lane.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.sendall(GET * 8)
            time.sleep(number % 30 / 10_000)
    assert b"200 OK" in exchange(lane, [GET])
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_where_no_row_is_free_the_next_one_is_waited_for(lane: Service) -> None:
    arena = lane.policy.batcher.arena
    assert arena is not None
    taken = take_rows(arena)
    connections = [lane.connect() for _ in range(4)]
    for connection in connections:
        connection.sendall(request(BODY) * 2)
    until(lambda: len(arena.waiting) == 4)
    gone = connections.pop(1)
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    gone.close()
    arena.release(taken.pop())
    for connection in connections:
        answer = b""
        while answer.count(b"200 OK") < 2:
            answer += connection.recv(1000)
        assert answer.count(b'{"action":1}') == 2
        connection.close()
    for row in taken:
        arena.release(row)


def test_a_compressed_observation_needs_no_row() -> None:
    with running(FAST) as service:
        arena = service.policy.batcher.arena
        assert arena is not None
        taken = take_rows(arena)
        assert b"200 OK" in exchange(service, [zstd_request(BODY)])
        for row in taken:
            arena.release(row)


def test_who_sends_slowly_takes_nobodys_place(lane: Service) -> None:
    """More clients than there are rows hold their bodies back; others are answered, and so are they in the end."""
    arena = lane.policy.batcher.arena
    assert arena is not None
    slow = [lane.connect() for _ in range(2 * arena.free)]
    for index, connection in enumerate(slow):
        connection.sendall(request(bytes([index]) + BODY[1:])[:-2])
    until(lambda: not arena.free)
    for _ in range(5):
        assert b"200 OK" in exchange(lane, [request(BODY)])
    for connection in slow:
        connection.sendall(BODY[-2:])
    for index, connection in enumerate(slow):
        assert connection.recv(1000).endswith(b'{"action":%d}' % ((index + sum(BODY[1:])) % 5))
        connection.close()
    until(lambda: not arena.coming and lane.policy.statistics().waiting == 0)


STOPS = {
    b"": b"",
    b"PO": b"408 Request Timeout",
    request(BODY)[:-2]: b"408 Request Timeout",
    request(BODY): b"200 OK",
    GET: b"200 OK",
    request(BODY) + b"POST /act HTT": b"408 Request Timeout",
    request(BODY, headers=["X-Else: 1"])[:-2]: b"408 Request Timeout",
    GET + b"G": b"200 OK",
}


def test_who_sends_no_more_is_let_go() -> None:
    with running(FAST, Settings(request_timeout_s=1), timeout_keep_alive=1) as impatient:

        def heard(sent: bytes) -> tuple[bytes, float]:
            """The bytes of the answer until the service closes, and the seconds until then."""
            with impatient.connect() as connection:
                connection.sendall(sent)
                began, answer = time.monotonic(), b""
                while data := connection.recv(1000):
                    answer += data
                return answer, time.monotonic() - began

        with ThreadPoolExecutor(len(STOPS)) as all_at_once:
            found = dict(zip(STOPS, all_at_once.map(heard, STOPS), strict=True))
    for sent, told in STOPS.items():
        answer, waited_s = found[sent]
        assert told in answer, sent
        assert 0.9 < waited_s < 20, sent


@pytest.mark.parametrize("http", [FAST, PLAIN])
def test_a_deadline_is_kept_before_anything_runs(http: str) -> None:
    with running(http, slow=True) as service:
        runtime = service.registry.runtime
        hurried = request(BODY, headers=["X-Deadline-Ms: 50"])
        assert b"200 OK" in exchange(service, [hurried])
        runtime.gate.clear()
        with service.connect() as first, service.connect() as second:
            first.sendall(request(BODY))
            until(lambda: service.policy.statistics().waiting == 1)
            second.sendall(hurried)
            time.sleep(0.2)
            runtime.gate.set()
            assert b"200 OK" in first.recv(1000)
            answer = b""
            while b'"too_late"' not in answer:
                answer += second.recv(1000)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert sum(runtime.sizes) == 2
        assert b"422 " in exchange(service, [request(BODY, headers=["X-Deadline-Ms: soon"])])


@pytest.mark.parametrize("kind", ["raw", "JSON"])
def test_a_refused_body_is_forgotten_and_the_connection_goes_on(kind: str) -> None:
    asked = request(BODY) if kind == "raw" else typed(b'{"pixels":%s}' % LISTS, JSON)
    with running(FAST, Settings(max_waiting=1)) as service, service.connect() as refused:
        with overloaded(service):
            refused.sendall(asked[:-3])
            assert refused.recv(1000).startswith(b"HTTP/1.1 503 ")
            refused.sendall(asked[-3:] + asked * 300)  # all of them refused
            answer = b""
            while answer.count(b'"limit":1}}}') < 300:
                answer += refused.recv(1 << 16)
        refused.sendall(asked)
        assert b"200 OK" in refused.recv(1000)


def test_a_full_queue_is_refused_alike() -> None:
    answers = []
    for http in (FAST, PLAIN):
        with running(http, Settings(max_waiting=2), slow=True) as service:
            service.registry.runtime.gate.clear()
            first, second, third = (service.connect() for _ in range(3))
            for connection in (first, second, third):
                connection.sendall(request(BODY))
                time.sleep(0.1)
            answers.append(third.recv(1000))
            service.registry.runtime.gate.set()
            assert b"200 OK" in first.recv(1000)
            assert b"200 OK" in second.recv(1000)
            for connection in (first, second, third):
                connection.close()
    assert answers[0] == answers[1]
    assert answers[0].startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in answers[0]


def test_a_connection_that_the_lane_takes_nothing_from_stays_as_long_as_it_is_used() -> None:
    with running(FAST, timeout_keep_alive=1) as service, service.connect() as connection:
        for _ in range(8):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"alive"}'):
                answer += connection.recv(1000) or b"closed"
                assert b"closed" not in answer
            time.sleep(0.4)


@pytest.mark.parametrize("http", [FAST, PLAIN])
def test_what_was_taken_in_is_answered_before_the_service_goes(http: str) -> None:
    with running(http, slow=True) as service:
        service.registry.runtime.gate.clear()
        busy, idle = service.connect(), service.connect()
        idle.sendall(request(BODY)[:20])
        busy.sendall(request(BODY))
        time.sleep(0.1)
        service.server.handle_exit(signal.SIGTERM, None)
        threading.Timer(0.5, service.registry.runtime.gate.set).start()
        answer = b""
        while data := busy.recv(1000):
            answer += data
        assert b"200 OK" in answer
        assert b"connection: close" in answer
        assert idle.recv(1000) == b""
        busy.close()
        idle.close()


def test_the_lane_counts_what_it_answers_and_what_it_refuses() -> None:
    with running(FAST, Settings(max_waiting=1, request_timeout_s=1)) as service:
        assert exchange(service, [request(BODY) * 3 + request(BODY, f"/policies/{NAME}/act")]).count(b"200 OK") == 4
        exchange(service, [request(b"\xff" * ITEM_BYTES)])
        with overloaded(service):
            assert b" 503 " in exchange(service, [request(BODY)])
        with service.connect() as slow:
            slow.sendall(request(BODY)[:-1])
            assert b" 408 " in slow.recv(1000)
        counts = service.registry.counts
        tally = counts.tally(NAME, "fastpath", ACT)
        assert tally.answered == 5
        assert tally.codes == {"500": 1, "503": 1}
        assert tally.reasons == {"runtime_failure": 1, "overloaded": 1}
        assert counts.tally("", "fastpath", "").reasons == {"too_slow": 1}
        meters = counts.meters(service.policy.program)
        assert meters.sizes.total == sum(meters.queue_ns.counts) == 5
        assert sum(meters.run_ns.counts) == sum(meters.sizes.counts) <= 5


def test_while_requests_are_logged_the_routes_answer_all() -> None:
    with running(FAST, Settings(access_log=True)) as service:
        assert exchange(service, [request(BODY)]).startswith(b"HTTP/1.1 200 OK\r\n")
        assert service.requests == ["POST /act"]


def test_a_slow_upload_is_no_time_in_the_queue() -> None:
    with running(FAST) as service:
        sent = request(BODY)
        assert b"200 OK" in exchange(service, [sent[:-4], sent[-4:]], 0.3)
        meters = service.registry.counts.meters(service.policy.program)
        assert 0 < meters.queue_ns.total < 200_000_000
