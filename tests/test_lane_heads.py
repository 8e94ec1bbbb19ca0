"""The lane's reader of heads takes only what it and uvicorn's parser read alike."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actserve.server.fastpath.heads import MAX_BYTES, REMEMBERED, BodySize, HeadParser, RequestHead, may_become_a_head
from tests.lane_service import ITEM_BYTES, request

DOORS = {b"/act": "default", b"/policies/tiny/act": "tiny"}
HEAD = request(b"", length=str(ITEM_BYTES))
TOKENS = (
    b"Content-Length: 12", b"Content-Length", b"Content-Type: application/octet-stream", b"Transfer-Encoding: chunked",
    b"Host: here", b"Accept: */*", b"Connection: close", b"Connection: keep-alive", b"Expect: 100-continue", b"POST",
    b"HTTP/1.1", b"HTTP/1.0", b"/act", b"/policies/tiny/act", b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"12",
    b"+12", b"0", b"1", b"x", b"\xe9", b"?", b"%", b",", b"User-Agent: x",
    b"Content-Encoding: zstd", b"Content-Encoding: gzip", b"Content-Length: 24", b"X-Deadline-Ms: 5",
)  # fmt: skip


def heads() -> HeadParser[str]:
    return HeadParser(DOORS, dict.fromkeys(DOORS, BodySize(ITEM_BYTES, 2)))


class Parsed:
    """What uvicorn's parser makes of a head."""

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
    assert DOORS[parsed.url] == taken.door
    names = [name for name, _ in parsed.headers]
    assert len(set(names)) == len(names)
    found = dict(parsed.headers)
    assert int(found[b"content-length"]) == taken.body_bytes
    if b"content-encoding" in found:
        assert (found[b"content-encoding"], taken.items) == (b"zstd", 0)
    else:
        assert (taken.items, taken.body_bytes) in ((1, ITEM_BYTES), (2, 2 * ITEM_BYTES))
    assert taken.patience_ns == int(found.get(b"x-deadline-ms", 0)) * 1_000_000
    assert found[b"content-type"] == b"application/octet-stream"
    assert not {b"transfer-encoding", b"expect", b"upgrade"} & set(names)


@given(mutated(), st.integers(1, 200))
@settings(max_examples=1000)
def test_the_beginning_of_what_is_taken_may_become_it(head: bytes, length: int) -> None:
    if head.find(b"\r\n\r\n") == len(head) - 4 and heads().find(head) is not None:
        assert may_become_a_head(head[: min(length, len(head) - 1)])


def test_a_head_is_read_once_and_not_too_many_are_remembered() -> None:
    known = heads()
    for index in range(3 * REMEMBERED):
        assert known.find(request(b"", length="12", headers=[f"User-Agent: {index}"])) == RequestHead(
            "default", 0, ITEM_BYTES, 1
        )
        assert len(known._known) <= REMEMBERED


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
