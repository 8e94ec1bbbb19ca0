"""Many robots at once on one thread: plain sockets, WebSocket frames that are made ready before.

Each robot sends an observation, waits for the actions, and sends the next one. A message costs it about 10 µs, most of
it the kernel's, so that the servers are the limit.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from actserve.server.fastpath import websocket_frames as frames
from actserve.server.fastpath.websocket_protocol import unmask
from tests.benchmarks.server import DoesNotServe

TIMEOUT_S = 30.0
_BINARY = 0x82
_HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: robot\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def frame(message: bytes) -> bytes:
    """A client's frame with a whole binary message, masked."""
    mask, payload = os.urandom(4), np.frombuffer(bytearray(message), np.uint8)
    unmask(payload, mask)  # masking and unmasking are the same
    size = len(message)
    if size < 126:
        head = struct.pack("!BB", _BINARY, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", _BINARY, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", _BINARY, 0x80 | 127, size)
    return head + mask + payload.tobytes()


@dataclass
class Robot:
    socket: socket.socket
    number: int  # of the message that was sent last
    data: bytes = b""  # of an answer that is not complete
    rest: memoryview = field(default_factory=lambda: memoryview(b""))  # of a message that is not sent completely


@dataclass(frozen=True)
class Answers:
    count: int
    seconds: float
    last: list[tuple[int, bytes]]  # of each robot: the number of the message, and the answer to it


class Robots:
    """A context manager: `count` robots that are connected to `path`, and have got the greeting."""

    def __init__(self, port: int, path: str, messages: Sequence[bytes], count: int) -> None:
        self._port, self._path, self._count = port, path, count
        self._frames = [frame(message) for message in messages]
        self._held = ExitStack()
        self._robots: dict[int, Robot] = {}  # by file descriptor

    def __enter__(self) -> Self:
        """Raises OSError or `DoesNotServe`."""
        with ExitStack() as held:
            self._epoll = held.enter_context(select.epoll())
            for number in range(self._count):
                connection = held.enter_context(socket.create_connection(("127.0.0.1", self._port), TIMEOUT_S))
                self._greet(connection)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setblocking(False)
                self._epoll.register(connection, select.EPOLLIN)
                self._robots[connection.fileno()] = Robot(connection, number % len(self._frames))
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def act(self, seconds: float) -> Answers:
        """The answers of so many seconds, and then one more for each robot. Raises `DoesNotServe`."""
        begun_s = time.monotonic()
        until_s, answers = begun_s + seconds, 0
        last: list[tuple[int, bytes]] = []
        for robot in self._robots.values():
            self._send(robot, self._frames[robot.number])
        while len(last) < len(self._robots):
            events = self._epoll.poll(TIMEOUT_S)
            if not events:
                raise DoesNotServe(f"no answer for {TIMEOUT_S:g} s")
            is_over = time.monotonic() > until_s
            for descriptor, event in events:
                robot = self._robots[descriptor]
                if event & select.EPOLLOUT:
                    self._send(robot, robot.rest)
                if not event & ~select.EPOLLOUT or (answer := _receive(robot)) is None:
                    continue
                answers += 1
                if is_over:
                    last.append((robot.number, answer))
                else:
                    robot.number = (robot.number + 1) % len(self._frames)
                    self._send(robot, self._frames[robot.number])
        return Answers(answers, time.monotonic() - begun_s, last)

    def _greet(self, connection: socket.socket) -> None:
        connection.sendall(_HANDSHAKE.format(path=self._path).encode())
        data = b""
        while not (head := data.partition(b"\r\n\r\n"))[1] or _payload(head[2]) is None:
            received = connection.recv(1 << 16)
            if not received:
                raise DoesNotServe(data[-500:].decode(errors="replace"))
            data += received

    def _send(self, robot: Robot, data: bytes | memoryview) -> None:
        try:
            sent = robot.socket.send(data)
        except BlockingIOError:
            sent = 0
        rest = memoryview(data)[sent:]
        if bool(rest) != bool(robot.rest):
            self._epoll.modify(robot.socket, select.EPOLLIN | (select.EPOLLOUT if rest else 0))
        robot.rest = rest


def _receive(robot: Robot) -> bytes | None:
    """The payload of an answer, once it is complete. Raises `DoesNotServe`."""
    received = robot.socket.recv(1 << 18)
    if not received:
        raise DoesNotServe("the server has closed a connection")
    data = robot.data + received if robot.data else received
    payload = _payload(data)
    robot.data = data if payload is None else b""
    return payload


def _payload(data: bytes) -> bytes | None:
    """The payload of the frame in `data`; None if it is not complete. Raises `DoesNotServe` for text."""
    header = frames.read(data)
    if header is None or len(data) < header.size + header.length:
        return None
    payload = data[header.size : header.size + header.length]
    if header.first != _BINARY:
        raise DoesNotServe(f"a frame of the type {header.first}: {payload[:300]!r}")
    return payload
