"""Bad input by the thousand: what to throw, at what, and how to tell that it did harm.

A target takes bytes that a stranger sent. It may refuse them, by an `InvalidRequest` or another of our errors; whatever
else it raises is a crash.
"""

from __future__ import annotations

import gzip
import json
import logging
import random
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from backports import zstd

from actserve import wire
from actserve.core.errors import ActserveError
from actserve.core.signature import Arrays, Signature, TensorSpec
from actserve.engine.arena import Arena
from actserve.server.access.tokens import Access
from actserve.server.fastpath import websocket_frames as frames
from actserve.server.fastpath.act_codec import ActResource
from actserve.server.fastpath.codec import Resources
from actserve.server.fastpath.request_heads import HeadParser, may_become_a_head
from actserve.server.protocols.oip import http_infer
from actserve.server.protocols.oip.fast_infer import InferCodec
from actserve.server.protocols.robots.arrays import to_npy
from actserve.server.regions import Regions
from actserve.telemetry.counts import Tally
from actserve.wire.accept_header import quality
from actserve.wire.stream_messages import Hello, ReplyCodec
from tests.fake_policy import SIGNATURE
from tests.fastpath_service import ITEM_BYTES, request
from tests.fastpath_service import SIGNATURE as TINY
from tests.fuzzing_robots import robot_targets

LIMIT_BYTES = 1 << 16
SOON_S = 1.0  # no answer takes longer
SCREEN = Signature(
    observations=(TensorSpec("pixels", "uint8", (4, 3, 3)),),
    outputs=(TensorSpec("action", "int64", ()),),
    max_batch=8,
)
MIXED = Signature(
    observations=(TensorSpec("pixels", "uint8", (4, 3)), TensorSpec("speed", "float32", (2,), 0, 1)),
    outputs=(TensorSpec("action", "int64", ()), TensorSpec("value", "float32", (2,))),
    max_batch=8,
    is_init=True,
)
PIXELS = np.arange(12, dtype=np.uint8).reshape(1, 4, 3)
BITS = (
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 30, b"\\ud800", b"\x00",
    b"\xff", b"\xff" * 8, b"\x7f", b"\r\n", b"\n", b"\r", b" ", b"\t", b"..", b"/", b"%2e", b"%00", b"12", b"0", b"-",
    b"Content-Length: 12\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"Host: h\r\n",
    b"Connection: close\r\n", b"Upgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.0", b"GET ",
    b"POST /act", b"X-Session: ", b"X-Step: ", b"X-Deadline-Ms: ", b"?outputs=", b"?seed=", b"data_offsets", b"shape",
    b"dtype", b"b64", b"session", b"pixels", b"x", b"is_init", b"parameters", b"binary_data_size", b"sequence_id",
)  # fmt: skip

GUIDED = ("json", "safetensors", "png", "raw", "gzip", "deflate", "zstd", "oip", "head", "frame", "authorization")

Target = Callable[[bytes], object]


@dataclass
class Report:
    cases: int = 0
    answers: int = 0  # of a server
    errors: list[str] = field(default_factory=list)  # answers of 5xx
    crashes: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    parts: dict[str, int] = field(default_factory=dict)

    def took(self, part: str, seconds: float) -> None:
        self.cases += 1
        self.parts[part] = self.parts.get(part, 0) + 1
        self.slowest_s = max(self.slowest_s, seconds)

    @property
    def harmless(self) -> bool:
        return not self.errors and not self.crashes and self.slowest_s <= SOON_S

    def __str__(self) -> str:
        told = [*self.errors[:10], *self.crashes[:10]]
        return "\n".join(
            [
                *(f"  {part}: {count:,}" for part, count in self.parts.items()),
                f"{self.cases:,} cases, {self.answers:,} answers of a server: {len(self.errors)} of 5xx, "
                f"{len(self.crashes)} crashes, the slowest {self.slowest_s * 1000:.0f} ms",
                *told,
            ]
        )


def _endpoint(signature: Signature) -> Any:
    """An endpoint as far as codecs read requests with it."""
    policy, arena = SimpleNamespace(signature=signature), Arena(signature, 4)
    return SimpleNamespace(item_bytes=arena.item_bytes, max_items=4, policy=policy, arena=arena)


def targets(folder: Path) -> dict[str, tuple[Target, list[bytes]]]:
    """By name: what takes bytes, and bytes that it takes. `folder`: for a file of tokens."""
    (folder / "tokens").write_text("")
    access = Access(folder / "tokens")
    endpoint, digest = _endpoint(TINY), _endpoint(SIGNATURE)
    regions = Regions(folder / "regions")
    find_region = partial(regions.find, None)
    resources: Resources = {b"/act": ActResource(endpoint, Tally(), LIMIT_BYTES)}
    heads, guarded = HeadParser(resources), HeadParser(resources, find_token=access.find)
    replies = ReplyCodec(MIXED.outputs)

    def decoded(content_type: str, signature: Signature) -> Target:
        return lambda data: wire.decode(content_type, bytearray(data), signature)

    def expanded(coding: str) -> Target:
        return lambda data: wire.expand(data, coding, LIMIT_BYTES)

    def head(data: bytes) -> None:
        may_become_a_head(data)
        heads.find(data)
        guarded.find(data)

    def oip(data: bytes) -> None:
        size, _, content = data.partition(b"|")
        json_bytes = size.decode("latin-1") or None
        InferCodec(digest, Tally(), regions, json_bytes, "").read(content, None)
        http_infer.read(content, json_bytes, find_region).tensors(SIGNATURE)

    tensors: Arrays = {"pixels": PIXELS, "speed": np.array([[0.5, 1]], np.float32)}
    document = {"pixels": PIXELS.tolist(), "speed": [[0.5, 1]], "is_init": [True], "seed": 3}
    b64 = {"pixels": {"dtype": "uint8", "shape": [4, 3], "b64": "AAAAAAAAAAAAAAAA"}, "speed": [0, 1], "session": "a"}
    inputs = [{"name": "x", "datatype": "INT64", "shape": [1], "data": [3]}]
    binary = [{"name": "x", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}}]
    oip_binary = json.dumps({"inputs": binary, "parameters": {"sequence_id": 7}}).encode()
    plain = bytes(range(200)) * 3
    hello = Hello("p", 1, "onnx", MIXED, replies.offsets, None, "deterministic", None, 8, 1 << 16, 60.0)
    return {
        "json": (decoded(wire.JSON, MIXED), [json.dumps(document).encode(), json.dumps(b64).encode()]),
        "safetensors": (
            decoded(wire.SAFETENSORS, MIXED),
            [
                wire.encode_request(wire.SAFETENSORS, wire.Payload(tensors, batched, seed=1), MIXED.request_inputs)
                for batched in (True, False)
            ],
        ),
        "png": (decoded(wire.PNG, SCREEN), [png(4, 3)]),
        "raw": (decoded(wire.RAW, SCREEN), [bytes(36), bytes(72)]),
        "gzip": (expanded("gzip"), [gzip.compress(plain), gzip.compress(bytes(1 << 20))]),
        "deflate": (expanded("deflate"), [zlib.compress(plain)]),
        "zstd": (expanded("zstd"), [zstd.compress(plain), zstd.compress(bytes(1 << 20))]),
        "oip": (
            oip,
            [b"|" + json.dumps({"inputs": inputs}).encode(), b"%d|" % len(oip_binary) + oip_binary + bytes(8)],
        ),
        "head": (head, [request(b"", length=str(ITEM_BYTES), headers=["Authorization: Bearer x", "Accept: */*"])]),
        "frame": (
            frames.read,
            [b"\x82\x8c\x01\x02\x03\x04" + bytes(12), b"\x81\xfe\x00\x80\x01\x02\x03\x04" + bytes(128)],
        ),
        "reply": (replies.unpack, [bytes(32)]),
        "reply in JSON": (
            lambda data: replies.from_json(data.decode("latin-1")),
            [b'{"action":1,"value":[1.5,2],"step":1,"queue_us":2,"run_us":3}'],
        ),
        "hello": (lambda data: Hello.from_json(data.decode("latin-1")), [hello.to_json().encode()]),
        "accept": (
            lambda data: quality(data.decode("latin-1"), wire.JSON),
            [b"text/html, application/json;q=0.5, */*"],
        ),
        "authorization": (access.find, [b"Bearer actserve_" + b"x" * 43]),
        "npy": (decoded(wire.NPY, SCREEN), [to_npy(np.zeros((4, 3, 3), np.uint8)), to_npy(np.zeros((2, 4, 3, 3)))]),
    } | robot_targets()


def png(height: int, width: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(height * (1 + 3 * width)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def mutated(good: bytes, rng: random.Random) -> bytes:
    """With a few pieces put in, taken out, changed or repeated."""
    data = bytearray(good)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes((rng.randrange(256),))
            case 1:
                data[at:at] = rng.choice(BITS)
            case 2:
                bit = rng.choice(BITS)
                data[at : at + len(bit)] = bit
            case 3:
                del data[at : at + rng.randrange(1, 20)]
            case 4:
                del data[at:]
            case 5:
                data[at:at] = data[at : at + rng.randrange(1, 40)] * rng.randrange(1, 30)
            case 6:
                data[at:at] = rng.randbytes(rng.randrange(1, 12))
    return bytes(data)


def throw_at(name: str, target: Target, goods: list[bytes], cases: int, rng: random.Random, report: Report) -> None:
    for _ in range(cases):
        data = mutated(rng.choice(goods), rng)
        begun = time.perf_counter()
        try:
            target(data)
        except ActserveError:
            pass
        except Exception as error:
            report.crashes.append(f"{name}: {error!r} of {data[:200]!r}")
        report.took(name, time.perf_counter() - begun)


def requests_to(name: str, observation: bytes) -> list[bytes]:
    """Good ones, of every kind, to the policy `name`."""

    def whole(method: str, path: str, content_type: str = "", body: bytes = b"", *headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: h", f"Content-Length: {len(body)}", *headers]
        lines += [f"Content-Type: {content_type}"] if content_type else []
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    raw, document = "application/octet-stream", b'{"x": 3}'
    return [
        whole("POST", "/act", raw, observation),
        whole("POST", f"/policies/{name}/act", raw, observation, "X-Deadline-Ms: 5000"),
        whole("POST", f"/policies/{name}/versions/1/act?outputs=action,value&seed=3", wire.JSON, document),
        whole("POST", f"/policies/{name}/act", wire.JSON, document, "X-Session: abc", "X-Step: 1"),
        whole("POST", "/act", raw, gzip.compress(observation), "Content-Encoding: gzip"),
        whole("POST", f"/policies/{name}/sessions", wire.JSON, b'{"seed": 7}', "X-Owner: me"),
        whole("GET", f"/policies/{name}/sessions", "", b"", "X-Owner: me"),
        whole("POST", f"/v2/models/{name}/infer", wire.JSON, b'{"inputs":[]}', "Inference-Header-Content-Length: 13"),
        whole("GET", "/policies"),
        whole("GET", f"/v2/models/{name}/versions/1/stats"),
        whole("GET", "/stream", "", b"", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
              "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==") + b"\x82\x88\x01\x02\x03\x04" + bytes(8),
        b"POST /act HTTP/1.1\r\nHost: h\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"%x\r\n" % len(observation) + observation + b"\r\n0\r\n\r\n",
    ]  # fmt: skip


@contextmanager
def watched(report: Report) -> Iterator[None]:
    """A server of this process that logs an error has crashed on something, even if the client was told nothing."""

    class Watching(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            report.crashes.append(f"{record.name}: {self.format(record)[-2000:]}")

    handler = Watching(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def throw_over_sockets(
    part: str, port: int, goods: list[bytes], cases: int, rng: random.Random, report: Report, patience_s: float = 0.02
) -> None:
    """Mutated requests, a connection each, and a good one behind them that closes the connection if it is seen."""
    last = b"\r\n\r\nGET /policies HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    for _ in range(cases):
        data = mutated(rng.choice(goods), rng)
        begun = now = time.perf_counter()
        said = b""
        with socket.create_connection(("127.0.0.1", port), timeout=SOON_S * 5) as connection:
            try:
                connection.sendall(data + last)
                connection.settimeout(patience_s)
                while came := connection.recv(1 << 16):
                    said, now = said + came, time.perf_counter()
            except (TimeoutError, ConnectionError):
                pass
        report.took(part, now - begun)
        for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said):
            report.answers += 1
            if status >= b"500":
                report.errors.append(f"{part}: {status.decode()} to {data[:300]!r}: {said[:300]!r}")


def throw_by_schema(url: str, examples: int, seed: int, report: Report, wrong: bool = True) -> None:
    """schemathesis: what the OpenAPI document allows and, with `wrong`, what it does not, which takes it far longer to
    think of; `examples` of each for each operation."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode
    from schemathesis.core.result import Ok

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation: Any = found.ok()
        for mode in (GenerationMode.POSITIVE, *((GenerationMode.NEGATIVE,) if wrong else ())):

            @seeded(seed)
            @settings(
                max_examples=examples,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                begun = time.perf_counter()
                answer = case.call()
                report.took("schemathesis", time.perf_counter() - begun)
                report.answers += 1
                if answer.status_code >= 500:
                    report.errors.append(f"schemathesis: {answer.status_code} to {case.as_curl_command()[:400]}")

            with suppress(Unsatisfiable):  # nothing can be wrong where there is nothing to say
                ask()


def throw_at_all(
    found: Mapping[str, tuple[Target, list[bytes]]],
    cases: int,
    rng: random.Random,
    report: Report,
    among: Iterable[str] = (),
) -> None:
    names = list(among) or list(found)
    for name in names:
        throw_at(name, *found[name], cases // len(names), rng, report)
