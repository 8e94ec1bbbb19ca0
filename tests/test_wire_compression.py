from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from actserve import wire
from actserve.core.errors import BodyTooLarge, InvalidRequest, MalformedBody, UnsupportedContentEncoding

CODINGS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstd.compress, "deflate": zlib.compress}
LIMIT = 10_000


@pytest.fixture(params=list(CODINGS))
def coding(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("coding", list(CODINGS))
@given(body=st.binary(max_size=LIMIT), form=st.sampled_from([bytes, bytearray, memoryview]))
def test_what_was_compressed_comes_back(coding: str, body: bytes, form: type) -> None:
    assert wire.expand(form(CODINGS[coding](body)), coding, LIMIT) == body


@pytest.mark.parametrize("name", ["", "identity", " Identity "])
def test_what_was_not_compressed_stays(name: str) -> None:
    body = bytearray(b"abc")
    assert wire.expand(body, name, 3) is body


def test_names_are_read_as_headers_are(coding: str) -> None:
    assert wire.expand(CODINGS[coding](b"abc"), f" {coding.upper()} ", LIMIT) == b"abc"


@pytest.mark.parametrize("level", [1, 3, 19])
def test_zstd_of_every_level_that_keeps_to_the_window(level: int) -> None:
    body = bytes(16 << 20)
    assert wire.expand(zstd.compress(body, level), "zstd", len(body)) == body


def test_the_limit_is_on_what_it_expands_to(coding: str) -> None:
    assert len(wire.expand(CODINGS[coding](bytes(LIMIT)), coding, LIMIT)) == LIMIT
    with pytest.raises(BodyTooLarge, match="at most 10,000 bytes; got more"):
        wire.expand(CODINGS[coding](bytes(LIMIT + 1)), coding, LIMIT)


def test_a_bomb_is_not_expanded(coding: str) -> None:
    bomb = CODINGS[coding](bytes(200 << 20))
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        wire.expand(bomb, coding, 1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_frame_that_wants_a_large_window_is_refused() -> None:
    options: dict[int, int] = {
        zstd.CompressionParameter.window_log: 27,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    compressor = zstd.ZstdCompressor(options=options)
    body = compressor.compress(b"abc") + compressor.flush()
    with pytest.raises(MalformedBody, match=r"expected zstd; got something else: .*memory"):
        wire.expand(body, "zstd", LIMIT)


def test_the_end_must_be_there_and_nothing_after_it(coding: str) -> None:
    body = CODINGS[coding](bytes(range(256)))
    for length in range(len(body)):
        with pytest.raises(MalformedBody, match=f"complete {coding} data; it stops after"):
            wire.expand(body[:length], coding, LIMIT)
    for more in (b"\0", body):
        with pytest.raises(MalformedBody, match=f"nothing after it; got {len(more)} bytes more"):
            wire.expand(body + more, coding, LIMIT)


@pytest.mark.parametrize("other", [zlib.compress(b"abc")[2:], b"abc", b"\0" * 100])
def test_another_format_is_refused(coding: str, other: bytes) -> None:
    with pytest.raises(MalformedBody, match=f"expected {coding}"):
        wire.expand(other, coding, LIMIT)


def test_a_damaged_body_is_refused() -> None:
    body = bytearray(gzip.compress(bytes(1000)))
    body[-8] ^= 1  # the checksum
    with pytest.raises(MalformedBody, match="expected gzip; got something else"):
        wire.expand(body, "gzip", LIMIT)


@pytest.mark.parametrize("name", ["br", "x-gzip", "gzip, zstd", "gzip,gzip", "identity, gzip", "x" * 1000])
def test_other_codings_and_lists_are_refused(name: str) -> None:
    with pytest.raises(
        UnsupportedContentEncoding, match="one Content-Encoding, of zstd, gzip, deflate, identity"
    ) as caught:
        wire.expand(b"abc", name, LIMIT)
    assert len(caught.value.message) < 200


@given(
    st.binary(max_size=200),
    st.sampled_from(list(CODINGS)),
    st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=4)), max_size=3),
)
def test_any_bytes_expand_or_are_refused(body: bytes, coding: str, edits: list[tuple[int, bytes]]) -> None:
    content = CODINGS[coding](body) if edits else body
    for at, added in edits:
        content = content[:at] + added + content[at + len(added) :]
    try:
        expanded = wire.expand(content, coding, LIMIT)
    except InvalidRequest:
        return
    assert len(expanded) <= LIMIT
