"""Open Inference Protocol: binary tensor data both ways. Where a policy has state, each connection is a sequence."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pydantic_core

from actserve.client.oip_request import binary_data, infer_request, request_json
from actserve.client.operations import PolicyDescription
from actserve.loadtest.backends.base import Ask, Backend, Requests, Steps
from actserve.loadtest.connection import LoadConnection


class OipBackend(Backend):
    def __init__(self, url: str, description: PolicyDescription, seed: int, token: str | None = None) -> None:
        super().__init__(url, description, seed, token)
        self._sequences: list[str] = []

    async def begin(self, connection: LoadConnection) -> None:
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
        return [binary_data(step) for step in self.steps]

    def _head(self, parameters: Mapping[str, Any]) -> bytes:
        """All of a request before its binary tensor data, which is of one size in every step."""
        outputs = [{"name": self.signature.action.name, "parameters": {"binary_data": True}}]
        seed = {} if self.drawn is None else {"seed": self.drawn}
        document = request_json(self.steps[0], outputs, {**parameters, **seed})
        return self.head(infer_request(self.description.name, document, self._tensors[0])) + b"\r\n" + document
