"""Open Inference Protocol: binary tensor data both ways. Where a policy has state, each connection is a sequence."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any
from urllib.parse import quote

import numpy as np
import pydantic_core

from app import wire
from app.client.backends.base import Ask, Backend, Requests, Steps
from app.client.connection import Connection
from app.client.operations import Description, Request, little_endian
from app.wire.oip import DATATYPES, HEADER


class Oip(Backend):
    def __init__(self, url: str, description: Description, seed: int, token: str | None = None) -> None:
        super().__init__(url, description, seed, token)
        self._sequences: list[str] = []

    async def begin(self, connection: Connection) -> None:
        if not self.signature.state:
            head = self._head({})
            connection.script = Requests(self.turns, [(head, tensors) for tensors in self._tensors])
            return
        id_ = secrets.token_urlsafe(16)
        first, later = self._head({"sequence_id": id_, "sequence_start": True}), self._head({"sequence_id": id_})
        self._sequences.append(id_)
        connection.script = Steps(
            self.turns_of_an_episode(), lambda index, step: (first if step == 1 else later, self._tensors[index])
        )

    async def end(self, ask: Ask) -> None:
        for id_ in self._sequences:
            head = self._head({"sequence_id": id_, "sequence_end": True})
            await ask((head, self._tensors[0]))  # a step more: the protocol has no other way

    def read(self, answer: bytes) -> Mapping[str, Any]:
        action = self.signature.action
        end = len(answer) - action.item_bytes
        (output,) = pydantic_core.from_json(answer[:end])["outputs"]
        return {output["name"]: np.frombuffer(answer[end:], action.numpy_dtype.newbyteorder("<"))}

    @cached_property
    def _tensors(self) -> list[bytes]:
        """The binary tensor data of each step."""
        return [b"".join(little_endian(array).tobytes() for array in step.values()) for step in self.steps]

    def _head(self, parameters: Mapping[str, Any]) -> bytes:
        """All of a request before its binary tensor data, which is of one size in every step."""
        inputs = [
            {
                "name": name,
                "datatype": DATATYPES[array.dtype.name],
                "shape": array.shape,
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in self.steps[0].items()
        ]
        seed = {} if self.drawn is None else {"seed": self.drawn}
        document = pydantic_core.to_json(
            {
                "inputs": inputs,
                "outputs": [{"name": self.signature.action.name, "parameters": {"binary_data": True}}],
                "parameters": {**parameters, **seed},
            }
        )
        headers = {"Content-Type": wire.RAW, HEADER: str(len(document))}
        path = f"/v2/models/{quote(self.description.name, safe='')}/infer"
        whole = self.head(Request("POST", path, document + self._tensors[0], headers))
        return whole + b"\r\n" + document
