"""What `fuzzing.py` throws at the decoders of robots' wires."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from actserve.core.signature import Array, TensorSpec
from actserve.server.protocols.robots import images, json_numpy
from actserve.server.protocols.robots.layout import Layout
from actserve.server.protocols.robots.names import NameMap, flatten
from actserve.server.protocols.robots.packed import of_gr00t, of_openpi, of_vla_eval, pack, unpack, unpack_in_place
from actserve.server.protocols.robots.values import to_tensor

SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("image", "uint8", (8, 8, 3)),
        TensorSpec("state", "float32", (3,)),
        TensorSpec("word", "int16", ()),
        TensorSpec("on", "bool", ()),
    )
}
PICTURE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, kind)
    return file.getvalue()


def layout_of(message: Array) -> Layout:
    """The layout of an observation in msgpack, (n,) uint8."""
    values = flatten(unpack_in_place(message.data))
    found = {known: values[name] for name, known in NameMap(list(SPECS), ["prompt"])(values).items()}
    return Layout(message, found, [value for value in values.values() if isinstance(value, np.ndarray)])


def robot_targets() -> dict[str, tuple[Callable[[bytes], Any], list[bytes]]]:
    """By name: what takes bytes, and bytes that it takes."""

    def observe(observation: Any) -> None:
        values = flatten(observation)
        for name, known in NameMap(list(SPECS), ["prompt"])(values).items():
            to_tensor(values[name], SPECS[known])

    def read_in_place(data: bytes) -> None:
        """If another message has the layout of `known`, its values are as `unpack` gives them."""
        message = np.frombuffer(bytearray(data), np.uint8)
        found = layout.read(message)
        if found is not None:
            values = flatten(unpack(data))
            for name, known in NameMap(list(SPECS), ["prompt"])(values).items():
                np.testing.assert_array_equal(found.pop(known), values[name])
            assert not found

    observation: dict[str, Any] = {
        "observation": {"image": PICTURE, "state": np.array([1.0, 2, 3])},
        "word": np.array(7),
        "on": True,
        "prompt": "pick up the cup",
    }
    known = pack(observation, of_openpi)
    layout = layout_of(np.frombuffer(bytearray(known), np.uint8))
    scalar = {b"__npgeneric__": True, b"data": 7, b"dtype": "<i8"}
    numpy = {"image": json_numpy.as_json(PICTURE), "state": [1, 2.5, 3], "word": json_numpy.as_json(np.array(7))}
    return {
        "robots' msgpack": (
            lambda data: observe(unpack(data)),
            [
                *(pack(observation, encode) for encode in (of_openpi, of_vla_eval, of_gr00t)),
                pack({**observation, "word": scalar}, of_openpi),
                pack({"image": encoded("PNG"), "state": [1.5, 2, 3]}, of_openpi),
                pack({"image": {"__image__": True, "format": "jpeg", "data": encoded("JPEG")}}, of_openpi),
            ],
        ),
        "robots' layout": (read_in_place, [known, pack(observation | {"on": False}, of_openpi)]),
        "json-numpy": (
            lambda data: observe(json_numpy.parse(data)[0]),
            [json.dumps(numpy).encode(), json.dumps({"encoded": json.dumps(numpy)}).encode()],
        ),
        "JPEG": (lambda data: images.decode(data, SPECS["image"]), [encoded("JPEG")]),
    }
