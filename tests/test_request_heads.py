"""A head takes the fast path only if our parser and uvicorn's read it alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actserve.server.fastpath.request_heads import (
    CACHED,
    MAX_BYTES,
    HeadParser,
    RequestHead,
    may_become_a_head,
)
from tests.fastpath_service import ITEM_BYTES, request


class Endpoint:
    item_bytes = ITEM_BYTES


@dataclass(frozen=True)
class _FakeCodec:
    """Raw bodies, or such in zstd, without a query."""

    resource: FakeResource
    in_place: bool
    endpoint: Any = Endpoint
    max_items: int = 2

    def read(self, *_: object) -> Any:
        raise NotImplementedError

    answer = refusal = read


@dataclass(frozen=True)
class FakeResource:
    name: str

    def codec(self, fields: dict[bytes, bytes], query: bytes) -> Any:
        content_type, coding = fields.pop(b"content-type", None), fields.pop(b"content-encoding", None)
        understood = content_type == b"application/octet-stream" and coding in (None, b"zstd") and not query
        return FakeCodec(self, coding is None) if understood and fields.pop(b"accept", b"*/*") == b"*/*" else None


FakeCodec: Any = _FakeCodec
RESOURCES: dict[bytes, Any] = {b"/act": FakeResource("default"), b"/policies/tiny/act": FakeResource("tiny")}
HEAD = request(b"", length=str(ITEM_BYTES))
TOKENS = (
    b"Content-Length: 12", b"Content-Length", b"Content-Type: application/octet-stream", b"Transfer-Encoding: chunked",
    b"Host: here", b"Accept: */*", b"Connection: close", b"Connection: keep-alive", b"Expect: 100-continue", b"POST",
    b"HTTP/1.1", b"HTTP/1.0", b"/act", b"/policies/tiny/act", b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"12",
    b"+12", b"0", b"1", b"x", b"\xe9", b"?", b"%", b",", b"User-Agent: x",
    b"Content-Encoding: zstd", b"Content-Encoding: gzip", b"Content-Length: 24", b"X-Deadline-Ms: 5",
    b"X-Session: a", b"X-Step: 3", b"x-step:1", b"X-Request-Id: a", b"traceparent: 0",
)  # fmt: skip


def heads() -> HeadParser:
    return HeadParser(RESOURCES)


class Parsed:
    """The head as uvicorn's parser reads it."""

    def __init__(self, head: bytes) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.url = b""
        self.complete = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(head)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.complete = True


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good head with a few pieces put in, taken out or changed."""
    head = HEAD
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(head)))
        stop = min(len(head), start + draw(st.integers(0, 6)))
        head = head[:start] + draw(st.sampled_from(TOKENS) | st.binary(max_size=3)) + head[stop:]
    return head


@given(mutated())
@settings(max_examples=3000)
def test_what_is_taken_means_the_same_to_both(head: bytes) -> None:
    if head.find(b"\r\n\r\n") != len(head) - 4:  # the lane hands over what ends there, once
        return
    taken = heads().find(head)
    if taken is None:
        return
    parsed = Parsed(head)
    assert parsed.complete
    assert parsed.parser.get_method() == b"POST"
    assert parsed.parser.get_http_version() == "1.1"
    assert parsed.parser.should_keep_alive()
    assert not parsed.parser.should_upgrade()
    assert taken.codec == FakeCodec(RESOURCES[parsed.url], b"content-encoding" not in dict(parsed.headers))
    names = [name for name, _ in parsed.headers if name != b"user-agent"]
    assert len(set(names)) == len(names)
    found = dict(parsed.headers)
    assert int(found[b"content-length"]) == taken.body_bytes
    if b"content-encoding" in found:
        assert (found[b"content-encoding"], taken.items) == (b"zstd", 0)
    else:
        assert (taken.items, taken.body_bytes) in ((1, ITEM_BYTES), (2, 2 * ITEM_BYTES))
    assert taken.patience_ns == int(found.get(b"x-deadline-ms", 0)) * 1_000_000
    assert found[b"content-type"] == b"application/octet-stream"
    assert taken.session == (found[b"x-session"].decode() if b"x-session" in found else None)
    assert taken.step == (int(found[b"x-step"]) if b"x-step" in found else None)
    assert taken.request_id == found.get(b"x-request-id")
    assert not {b"transfer-encoding", b"expect", b"upgrade"} & set(names)


@given(mutated(), st.integers(1, 200))
@settings(max_examples=1000)
def test_the_beginning_of_what_is_taken_may_become_it(head: bytes, length: int) -> None:
    if head.find(b"\r\n\r\n") == len(head) - 4 and heads().find(head) is not None:
        assert may_become_a_head(head[: min(length, len(head) - 1)])


def test_a_head_is_read_once_and_not_too_many_are_remembered() -> None:
    known = heads()
    for index in range(3 * CACHED):
        assert known.find(request(b"", length="12", headers=[f"User-Agent: {index}"])) == RequestHead(
            FakeCodec(RESOURCES[b"/act"], True), 0, ITEM_BYTES, 1
        )
        assert len(known._cache) <= CACHED


@pytest.mark.parametrize(
    ("beginning", "may"),
    [
        (b"P", True), (b"POST /", True), (b"GET", False), (b"POST / HTTP/1.1\r", True), (b"POST /\n", False),
        (b"POST / HTTP/1.1\r\nHost: a\r\n\r", True), (b"POST / HTTP/1.1\r\nHost: \x00", False), (b"", True),
        (b"POST /" + b"x" * MAX_BYTES, False), (b"\r\nPOST", False),
    ],
)  # fmt: skip
def test_beginnings(beginning: bytes, may: bool) -> None:
    assert may_become_a_head(beginning) == may


HARMLESS = [
    "X-Forwarded-For: 10.0.0.1, 10.0.0.2", "X-Real-IP: 10.0.0.1", "Forwarded: for=10.0.0.1;proto=https",
    "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate: a=1", "baggage: user=1",
    "X-Request-Id: abc-1", "User-Agent: x", "Accept-Encoding: gzip, br", "Cookie: a=1; b=2", "Via: 1.1 proxy",
]  # fmt: skip


@pytest.mark.parametrize("header", HARMLESS)
def test_headers_that_proxies_add_keep_a_request_on_the_fast_path(header: str) -> None:
    found = heads().find(request(b"", length=str(ITEM_BYTES), headers=[header]))
    assert found is not None
    assert (found.items, found.request_id) == (1, b"abc-1" if "Request-Id" in header else None)


def test_all_of_them_together_do_too() -> None:
    assert heads().find(request(b"", length=str(ITEM_BYTES), headers=HARMLESS * 2)) is None, "X-Request-Id twice"
    together = [*HARMLESS, *(header for header in HARMLESS if "Request-Id" not in header)]
    assert heads().find(request(b"", length=str(ITEM_BYTES), headers=together)) is not None


@pytest.mark.parametrize(
    ("traced", "header", "fast"),
    [
        (True, "X-Request-Id: a", False),
        (True, "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        (True, "tracestate: a=1", False),
        (True, "User-Agent: x", True),
        (False, "X-Request-Id: not an id", False),
    ],
)
def test_what_is_traced_goes_to_the_routes(traced: bool, header: str, fast: bool) -> None:
    parser = HeadParser(RESOURCES, traced=traced)
    head = request(b"", length=str(ITEM_BYTES), headers=[header])
    assert (parser.find(head) is not None) is fast


def test_requests_with_ids_have_one_entry_in_the_cache() -> None:
    parser = HeadParser(RESOURCES)
    for number in range(1, 100):
        headers = [f"X-Request-Id: r{number}", f"traceparent: 00-{number:032x}-00f067aa0ba902b7-01"]
        found = parser.find(request(b"", length="12", headers=headers))
        assert found is not None
        assert found.request_id == b"r%d" % number
    assert len(parser._cache) == 1


def test_the_head_of_a_session_is_read_once_if_it_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parser, read = HeadParser(RESOURCES), list[Any]()
    with_session = HeadParser._with

    def remember(*found: Any) -> RequestHead | None:
        read.append(found)
        return with_session(parser, *found)

    monkeypatch.setattr(parser, "_with", remember)
    for _ in range(3):
        for session in ("abc=", "def="):
            found = parser.find(request(b"", length="12", headers=[f"X-Session: {session}"]))
            assert found is not None
            assert (found.session, found.step, found.items) == (session, None, 1)
    assert len(read) == 2


def test_the_heads_of_many_sessions_are_not_all_remembered() -> None:
    parser = HeadParser(RESOURCES)
    for session in range(3 * CACHED):
        found = parser.find(request(b"", length="12", headers=[f"X-Session: {session}"]))
        assert found is not None
        assert found.session == str(session)
        assert len(parser._cache) <= CACHED


def test_the_steps_of_a_session_have_one_entry_in_the_cache() -> None:
    parser = HeadParser(RESOURCES)
    for step in range(1, 3 * CACHED):
        found = parser.find(request(b"", length="12", headers=["X-Session: abc=", f"X-Step: {step}"]))
        assert found is not None
        assert (found.session, found.step, found.items) == ("abc=", step, 1)
    assert len(parser._cache) == 1


@pytest.mark.parametrize(
    "headers",
    [
        ["X-Step: 1"], ["X-Session: a", "X-Step: 0"], ["X-Session: a", "X-Step: +1"], ["X-Session: a", "X-Step:"],
        ["X-Session: a", "X-Session: a"], ["X-Session: a", "x-session: b"], ["X-Session: a "], ["X-Session: \x7f"],
        ["X-Session: a", "X-Step: 1", "X-Step: 1"], ["X-Session: a", "X-Step: 1000000000000000000"],
    ],
)  # fmt: skip
def test_steps_that_only_the_routes_understand(headers: list[str]) -> None:
    assert HeadParser(RESOURCES).find(request(b"", length="12", headers=headers)) is None


def test_bodies_beyond_the_limits_go_to_the_routes() -> None:
    two = request(b"", length=str(2 * ITEM_BYTES))
    assert HeadParser(RESOURCES).find(two) is not None
    assert HeadParser(RESOURCES, lambda body_bytes, _items: body_bytes < 2 * ITEM_BYTES).find(two) is None
    assert HeadParser(RESOURCES, lambda _body_bytes, items: items < 2).find(two) is None
