"""A recording as MCAP files, one for each trajectory, with schemas that Foxglove knows.

Each step has messages at the time when it was taken, with its number as the sequence:

* `/observation/NAME` of an image: `foxglove.CompressedImage` (protobuf), a PNG;
* `/observation/NAME`, `/parameter/NAME` and `/output/NAME` of other tensors: JSON, `{"value": …}`, a number or nested
  lists; null where a number is not finite;
* `/step`: JSON, with the episode, the number of the step, and what the client told about it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from mcap.well_known import MessageEncoding, SchemaEncoding
from mcap.writer import Writer
from mcap_protobuf.schema import register_schema
from PIL import Image

from actserve import __version__
from actserve.core.signature import Array, TensorSpec
from actserve.recording.images import as_image, is_image
from actserve.recording.reader import Step, Steps
from actserve.recording.rows import OBSERVATION, OUTPUT, PARAMETER
from actserve.recording.shards import Header, tensor_columns
from actserve_export.recordings.trajectories import Trajectory, make_new, trajectories

STEP = "/step"
_NUMBERS = {
    "title": "actserve.Tensor",
    "type": "object",
    "properties": {"value": {"description": "a number, or lists of numbers; null: not finite"}},
}
_STEP = {
    "title": "actserve.Step",
    "type": "object",
    "properties": {
        "episode": {"type": "string"},
        "step": {"type": "integer"},
        "version": {"type": "integer"},
        "door": {"type": "string"},
        "run_us": {"type": "integer"},
        "reward": {"type": ["number", "null"]},
        "done": {"type": "boolean"},
    },
}


def write(steps: Steps, out: Path, progress: Callable[[int], None]) -> int:
    """Write `000000.mcap` and so on into the folder `out` -> the number of files. `progress` gets numbers of steps.

    Raises `UsageError` if the folder has files, or if an image has pixels that cannot be written.
    """
    make_new(out)
    count = 0
    for trajectory in trajectories(steps, progress):
        with (out / f"{count:06}.mcap").open("wb") as stream:
            _File(stream, steps.newest).write(trajectory)
        count += 1
    return count


class _File:
    """One MCAP file. `header` is that of the recording."""

    def __init__(self, stream: BinaryIO, header: Header) -> None:
        self._writer = Writer(stream)
        self._writer.start(library=f"actserve {__version__}")
        specs = tensor_columns(header.signature)
        self._specs = {name: spec for name, spec in specs.items() if name.startswith((OBSERVATION, PARAMETER, OUTPUT))}
        image = register_schema(self._writer, CompressedImage) if any(map(self._is_image, self._specs)) else 0
        numbers, step = (self._json_schema(schema) for schema in (_NUMBERS, _STEP))
        self._channels = {
            name: self._channel(_topic(name), image if self._is_image(name) else numbers, self._is_image(name))
            for name in self._specs
        }
        self._step = self._channel(STEP, step)
        known = {"policy": header.policy, "runtime": header.runtime, "environment": json.dumps(header.environment)}
        self._writer.add_metadata("actserve", known)

    def write(self, trajectory: Trajectory) -> None:
        """Write all steps, and complete the file."""
        for step, reward, done in zip(trajectory.steps, trajectory.reward.tolist(), trajectory.done, strict=True):
            for name, channel in self._channels.items():
                self._add(channel, step, self._message(name, step))
            facts = {name: getattr(step, name) for name in ("episode", "step", "version", "door", "run_us")}
            facts |= {"reward": None if np.isnan(reward) else reward, "done": bool(done)}
            self._add(self._step, step, json.dumps(facts).encode())
        self._writer.finish()

    def _is_image(self, column: str) -> bool:
        return column.startswith(OBSERVATION) and is_image(self._specs[column])

    def _json_schema(self, schema: dict[str, Any]) -> int:
        data = json.dumps(schema).encode()
        return int(self._writer.register_schema(schema["title"], SchemaEncoding.JSONSchema, data))

    def _channel(self, topic: str, schema: int, is_image: bool = False) -> int:
        encoding = MessageEncoding.Protobuf if is_image else MessageEncoding.JSON
        return int(self._writer.register_channel(topic, encoding, schema))

    def _message(self, column: str, step: Step) -> bytes:
        array, spec = step.tensors[column], self._specs[column]
        if not self._is_image(column):
            return json.dumps({"value": _plain(array)}).encode()
        message = CompressedImage(data=_png(array, spec), format="png", frame_id=spec.name)
        message.timestamp.FromNanoseconds(_ns(step.time))
        return bytes(message.SerializeToString())

    def _add(self, channel: int, step: Step, data: bytes) -> None:
        time_ns = _ns(step.time)
        self._writer.add_message(channel, time_ns, data, time_ns, step.step)


def _topic(column: str) -> str:
    return "/" + column.replace(".", "/", 1)


def _ns(time: datetime) -> int:
    """Nanoseconds since 1970. The time is exact to a microsecond."""
    return (time - datetime(1970, 1, 1, tzinfo=time.tzinfo)) // timedelta(microseconds=1) * 1000


def _plain(array: Array) -> Any:
    """A number or nested lists, None where a number is not finite."""
    plain = array.astype(object)
    if array.dtype.kind == "f":
        plain[~np.isfinite(array)] = None
    return plain.tolist()


def _png(array: Array, spec: TensorSpec) -> bytes:
    data = io.BytesIO()
    Image.fromarray(as_image(array, spec)).save(data, "png", compress_level=1)
    return data.getvalue()
