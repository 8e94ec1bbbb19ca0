"""The requests to the servers and the expected answers: screens of played games, in each encoding."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from backports import zstd
from safetensors.numpy import save

from actserve.core.signature import Array

Answer = tuple[int, bytes]  # status, body
RAW = {"Content-Type": "application/octet-stream"}
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
MASK = b"\x5a\x13\xc7\x88"  # a WebSocket client must mask its messages (RFC 6455, 5.3)
TIMING = 16  # bytes of a stream's reply before the action: the step and two durations


def http_answer(data: bytes) -> Answer | None:
    """The response that `data` is, or None if there is more to come."""
    head = data.find(b"\r\n\r\n") + 4
    if head < 4:
        return None
    length = LENGTH.search(data, 0, head)
    status = int(data[9:12])
    if length is not None:
        return (status, data[head:]) if len(data) - head >= int(length[1]) else None
    if b"chunked" not in data[:head]:
        raise ValueError(f"expected a length; got {data[:head]!r}")
    return (status, b"".join(data[head:].split(b"\r\n")[1::2])) if data.endswith(b"\r\n0\r\n\r\n") else None


def stream_answer(data: bytes) -> Answer | None:
    """The same of a reply in a stream of actserve's: an error is text."""
    found = frame(data)
    if found is None:
        return None
    is_binary, body = found
    return (200, body[TIMING:]) if is_binary else (500, body)


def frame(data: bytes) -> tuple[bool, bytes] | None:
    """(is it binary, its payload) of a WebSocket frame from a server, or None if there is more to come."""
    if len(data) < 4:
        return None
    start, length = (4, int.from_bytes(data[2:4], "big")) if data[1] == 126 else (2, data[1])
    return (data[0] & 15 == 2, data[start:]) if len(data) - start >= length else None


def actions_of_json(body: bytes) -> list[int]:
    found = json.loads(body)["action"]
    return [found] if isinstance(found, int) else list(found)


@dataclass(frozen=True)
class Screens:
    pixels: Array  # (32, 210, 160, 3) u8
    actions: Sequence[int]  # of each, by the bare program at batch 1


@dataclass(frozen=True)
class Questions:
    """Requests, ready to be sent one after the other, and the right answer to each."""

    requests: Sequence[bytes]
    actions: Sequence[Sequence[int]]
    frames: int = 1  # a request
    greeting: bytes = b""  # what opens a connection, if anything does
    split: Callable[[bytes], Answer | None] = http_answer  # raises ValueError
    read: Callable[[bytes], Sequence[int]] = actions_of_json  # of a body; raises ValueError, KeyError, TypeError

    def is_right(self, question: int, body: bytes) -> bool:
        try:
            return self.read(body) == self.actions[question]
        except (ValueError, KeyError, TypeError):
            return False


Way = Callable[[Screens], Questions]


def request(path: str, body: bytes, headers: Mapping[str, str], method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in headers.items())]
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, *length, "", ""]).encode() + body


def posts(
    path: str = "/act",
    encode: Callable[[Array], bytes] = Array.tobytes,
    headers: Mapping[str, str] = RAW,
    read: Callable[[bytes], Sequence[int]] = actions_of_json,
) -> Way:
    """A screen a request."""

    def ask(screens: Screens) -> Questions:
        requests = [request(path, encode(screen), headers) for screen in screens.pixels]
        return Questions(requests, [[action] for action in screens.actions], read=read)

    return ask


def constant(screens: Screens) -> Questions:
    """For a server that does not read its requests."""
    return replace(posts()(screens), actions=[[0]] * len(screens.actions))


def several(frames: int) -> Way:
    """So many screens a request, one behind the other."""

    def ask(screens: Screens) -> Questions:
        each = [
            [(first + frame) % len(screens.pixels) for frame in range(frames)] for first in range(len(screens.pixels))
        ]
        requests = [request("/act", screens.pixels[which].tobytes(), RAW) for which in each]
        return Questions(requests, [[screens.actions[index] for index in which] for which in each], frames)

    return ask


def stream(screens: Screens, path: str = "/stream", headers: Mapping[str, str] | None = None) -> Questions:
    """Messages of a WebSocket, a screen each."""
    handshake = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "YWN0c2VydmUgYmVuY2htYQ==",
    }
    messages = [message(screen.tobytes()) for screen in screens.pixels]
    return Questions(
        messages,
        [[action] for action in screens.actions],
        greeting=request(path, b"", {**handshake, **(headers or {})}, "GET"),
        split=stream_answer,
        read=lambda body: np.frombuffer(body, "<i8").tolist(),
    )


def message(payload: bytes) -> bytes:
    """A binary message of a WebSocket client; the payload's length is a multiple of 4."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x82, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x82, 0xFE, size)
    else:
        head = struct.pack("!BBQ", 0x82, 0xFF, size)
    masked = np.frombuffer(payload, np.uint8).reshape(-1, 4) ^ np.frombuffer(MASK, np.uint8)
    return head + MASK + masked.tobytes()


def greeted(data: bytes) -> bool:
    """Whether the answer to a stream's greeting is complete: the switch of protocols, and a first message."""
    head, separator, rest = data.partition(b"\r\n\r\n")
    if separator and not head.startswith(b"HTTP/1.1 101"):
        raise ConnectionRefusedError(f"expected to switch protocols; got {data[:500]!r}")
    return bool(separator) and frame(rest) is not None


def open_inference(screens: Screens) -> Questions:
    """The Open Inference Protocol's binary tensors, as Triton takes them."""
    tensor: dict[str, Any] = {"name": "pixels", "datatype": "UINT8", "shape": [1, *screens.pixels[0].shape]}
    tensor["parameters"] = {"binary_data_size": screens.pixels[0].nbytes}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "action"}]}).encode()
    return posts(
        "/v2/models/pong/infer",
        lambda screen: head + screen.tobytes(),
        RAW | {"Inference-Header-Content-Length": str(len(head))},
        lambda body: json.loads(body)["outputs"][0]["data"],
    )(screens)


SAFETENSORS = posts("/act", lambda s: save({"pixels": s}), {"Content-Type": "application/safetensors"})
ZSTD = posts("/act", lambda screen: zstd.compress(screen.tobytes()), RAW | {"Content-Encoding": "zstd"})
