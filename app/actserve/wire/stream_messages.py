"""The messages on a stream: the service sends a hello, then one reply per message, in order.

The reply to a binary message has a fixed layout, all little-endian:

    byte   0  uint64  step: the episode's step count, this step included
    byte   8  uint32  queue_us: microseconds of waiting for the runtime
    byte  12  uint32  run_us: microseconds in the runtime
    byte  16          the outputs, row-major, each at its offset in the hello; offsets are multiples of 8

The reply to a text message is JSON: the outputs by name, and `step`, `queue_us` and `run_us`. An error is JSON in
either case: `{"error": {"code", "message", "detail"}, "status", "step"}`, where `step` is the step that failed.

A client may tell the result of its last step, in a text message without a reply: `{"result": {"reward": 1.0, "done":
false}}`. Both members are optional.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pydantic
import pydantic_core

from actserve.core.environment import Contract
from actserve.core.errors import InvalidRequest, MalformedBody
from actserve.core.signature import Arrays, Exploration, Signature, TensorSpec

_HEADER = struct.Struct("<QII")
_ALIGNMENT = 8  # bytes; JavaScript's typed arrays can read any output in place
_UINT32_MAX = 2**32 - 1
RESULT_CHARACTERS = 256  # a longer text message is no result


@dataclass(frozen=True)
class Hello:
    """The first message of a stream, in JSON. It describes the stream."""

    policy: str
    version: int
    runtime: str  # "onnx" or "pt2"
    signature: Signature  # of one message and its reply: without state and noise, which the service holds
    offsets: dict[str, int]  # byte offset of each output in a binary reply
    environment: Contract | None  # the game that the policy plays, or its robot
    exploration: Exploration
    seed: int | None  # the episode's seed; None: deterministic
    window: int  # the most unanswered messages
    max_message_bytes: int
    idle_s: float  # the stream is closed after so long without a message
    recorded: bool = False  # whether results are recorded; otherwise they are ignored

    def to_json(self) -> str:
        return _HELLO.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Hello:
        """Raises `MalformedBody`."""
        try:
            return _HELLO.validate_json(text)
        except pydantic.ValidationError as error:
            raise MalformedBody(f"expected a hello; got {text}"[:200]) from error


_HELLO = pydantic.TypeAdapter(Hello)


class Result(pydantic.BaseModel):
    """The result of a step, which only the client knows. None: it does not say."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    reward: pydantic.FiniteFloat | None = None
    done: pydantic.StrictBool | None = None


def result_message(result: Result) -> str:
    """The message that tells the result of the last step."""
    return pydantic_core.to_json({"result": result.model_dump(exclude_none=True)}).decode()


def read_result(text: str) -> Result | None:
    """The inverse; None: it is another message. Raises `InvalidRequest` for a result that is none."""
    if len(text) > RESULT_CHARACTERS or '"result"' not in text:
        return None
    try:
        document = pydantic_core.from_json(text)
    except ValueError:
        return None
    if not isinstance(document, dict) or document.keys() != {"result"} or not isinstance(document["result"], dict):
        return None
    if document["result"].keys() >= {"dtype", "shape", "b64"}:  # an observation of this name
        return None
    try:
        return Result.model_validate(document["result"])
    except pydantic.ValidationError as error:
        said = error.errors(include_url=False)[0]
        spot = ".".join(map(str, said["loc"])) or "result"
        raise InvalidRequest(
            f"expected a result with reward, a number, and done; {spot}: {said['msg']}"[:200]
        ) from None


class Reply(NamedTuple):
    """The answer to one message."""

    step: int
    outputs: Arrays  # each (*shape)
    queue_us: int
    run_us: int


class ReplyCodec:
    """Encodes and decodes replies with the outputs `specs`."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        self.offsets: dict[str, int] = {}
        self._packed: list[tuple[TensorSpec, bytes]] = []  # with the padding before it
        end = _HEADER.size
        for spec in specs:
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            self.offsets[spec.name] = offset
            self._packed.append((spec, bytes(offset - end)))
            end = offset + spec.item_bytes
        self._bytes = end

    def pack(self, reply: Reply) -> bytes:
        parts = [_HEADER.pack(reply.step, min(reply.queue_us, _UINT32_MAX), min(reply.run_us, _UINT32_MAX))]
        for spec, padding in self._packed:
            parts += (padding, spec.to_wire(np.asarray(reply.outputs[spec.name])).tobytes())
        return b"".join(parts)

    def unpack(self, message: bytes) -> Reply:
        """Raises `MalformedBody`."""
        if len(message) != self._bytes:
            raise MalformedBody(f"expected a reply of {self._bytes} bytes; got {len(message)}")
        step, queue_us, run_us = _HEADER.unpack_from(message)
        outputs: Arrays = {}
        for spec in self._specs:
            array = np.ndarray(spec.shape, spec.wire_dtype, message, self.offsets[spec.name])
            outputs[spec.name] = spec.from_wire(array).astype(spec.numpy_dtype)
        return Reply(step, outputs, queue_us, run_us)

    def to_json(self, reply: Reply) -> str:
        outputs = {spec.name: reply.outputs[spec.name].tolist() for spec in self._specs}
        timing = {"step": reply.step, "queue_us": reply.queue_us, "run_us": reply.run_us}
        return pydantic_core.to_json(outputs | timing, inf_nan_mode="strings").decode()

    def from_json(self, text: str) -> Reply:
        """Raises `MalformedBody`."""
        try:
            document = pydantic_core.from_json(text)
            outputs = {spec.name: np.array(document[spec.name], spec.numpy_dtype) for spec in self._specs}
            for spec in self._specs:
                outputs[spec.name] = outputs[spec.name].reshape(spec.shape)
            return Reply(document["step"], outputs, document["queue_us"], document["run_us"])
        except (ValueError, KeyError, TypeError) as error:
            raise MalformedBody(f"expected a reply with {', '.join(self.offsets)}; got {text}"[:200]) from error
