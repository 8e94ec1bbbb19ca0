"""Content-Encoding: a compressed body -> the body, bounded while it expands."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import Protocol

from actserve.core.errors import BodyTooLarge, MalformedBody, UnsupportedContentEncoding
from actserve.wire.payload import Body

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_WINDOW_LOG = 23  # 8 MiB, the most that a body may make its reader keep (RFC 9659)


class _Stream(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: Body, max_length: int, /) -> bytes: ...


_STREAMS: dict[str, Callable[[], _Stream]] = {
    "zstd": lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}),
    "gzip": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    "deflate": zlib.decompressobj,  # the zlib format (RFC 9110, 8.4.1.2), which tritonclient can send
}


def expand(body: Body, content_encoding: str, limit_bytes: int) -> Body:
    """`body` as it was before it was compressed: one frame, member or stream; "" and "identity" leave it as it came.

    Raises `BodyTooLarge` as soon as it has more than `limit_bytes`, `MalformedBody` for what is not whole or has
    something after it, `UnsupportedContentEncoding` for other codings and for several.
    """
    coding = content_encoding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in _STREAMS:
        raise UnsupportedContentEncoding(content_encoding, [*_STREAMS, "identity"])
    stream = _STREAMS[coding]()
    try:
        expanded = stream.decompress(body, limit_bytes + 1)
    except (zlib.error, zstd.ZstdError) as error:
        raise MalformedBody(f"expected {coding}; got something else: {error}"[:300]) from None
    if len(expanded) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    if not stream.eof:
        raise MalformedBody(f"expected {coding} to its end; it stops after {len(body):,} bytes")
    if stream.unused_data:
        raise MalformedBody(f"expected {coding} and nothing after it; got {len(stream.unused_data):,} bytes more")
    return bytearray(expanded)  # writable, so that no runtime has to copy it
