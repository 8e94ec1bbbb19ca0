"""Content-Encoding: decompresses a body, with a bound on its size."""

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

_WINDOW_LOG = 23  # 8 MiB, the largest window that a decoder must support (RFC 9659)


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: Body, max_length: int, /) -> bytes: ...


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    "zstd": lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}),
    "gzip": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    "deflate": zlib.decompressobj,  # the zlib format (RFC 9110, 8.4.1.2), which tritonclient can send
}


def expand(body: Body, content_encoding: str, limit_bytes: int) -> Body:
    """Decompress `body`, which is one frame, member or stream; "" and "identity" mean not compressed.

    Raises `BodyTooLarge` as soon as the result exceeds `limit_bytes`, `MalformedBody` for truncated, damaged or
    trailing data, and `UnsupportedContentEncoding` for other codings and for several.
    """
    coding = content_encoding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in _DECOMPRESSORS:
        raise UnsupportedContentEncoding(content_encoding, [*_DECOMPRESSORS, "identity"])
    decompressor = _DECOMPRESSORS[coding]()
    try:
        expanded = decompressor.decompress(body, limit_bytes + 1)
    except (zlib.error, zstd.ZstdError) as error:
        raise MalformedBody(f"expected {coding}; got something else: {error}"[:300]) from None
    if len(expanded) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    if not decompressor.eof:
        raise MalformedBody(f"expected complete {coding} data; it stops after {len(body):,} bytes")
    if unused := decompressor.unused_data:
        raise MalformedBody(f"expected {coding} and nothing after it; got {len(unused):,} bytes more")
    return bytearray(expanded)  # writable, so that runtimes need no copy
