"""OipBackend: the Open Inference Protocol, with binary tensor data in requests and answers.

If the policy has state, each connection is a sequence.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pydantic_core

from actserve.client.oip_request import binary_data, infer_request, request_json
from actserve.client.operations import PolicyDescription
from actserve.loadtest.backends.base import Backend, EpisodeSteps, IndependentRequests, SendRequest
from actserve.loadtest.connection import LoadConnection


class OipBackend(Backend):
    def __init__(self, url: str, description: PolicyDescription, seed: int, token: str | None = None) -> None:
        super().__init__(url, description, seed, token)
        self._sequence_ids: list[str] = []

    async def prepare(self, connection: LoadConnection) -> None:
        if not self.signature.state:
            head = self._head({})
            connection.script = IndependentRequests(self.shared_keys, [(head, tensors) for tensors in self._tensors])
            return
        id_ = secrets.token_urlsafe(16)
        first, later = self._head({"sequence_id": id_, "sequence_start": True}), self._head({"sequence_id": id_})
        self._sequence_ids.append(id_)
        connection.script = EpisodeSteps(
            self.episode_keys(), lambda index, step: (first if step == 1 else later, self._tensors[index])
        )

    async def clean_up(self, send: SendRequest) -> None:
        for id_ in self._sequence_ids:
            head = self._head({"sequence_id": id_, "sequence_end": True})
            await send((head, self._tensors[0]))  # only an inference request can end a sequence

    def decode(self, answer: bytes) -> Mapping[str, Any]:
        action = self.signature.action
        end = len(answer) - action.item_bytes
        (output,) = pydantic_core.from_json(answer[:end])["outputs"]
        return {output["name"]: action.from_wire(np.frombuffer(answer[end:], action.wire_dtype))}

    @cached_property
    def _tensors(self) -> list[bytes]:
        """The binary tensor data of each step."""
        return [binary_data(self.signature, step) for step in self.steps]

    def _head(self, parameters: Mapping[str, Any]) -> bytes:
        """The part of a request before its binary tensor data, which has the same size in every step."""
        outputs = [{"name": self.signature.action.name, "parameters": {"binary_data": True}}]
        seed = {} if self.noise_seed is None else {"seed": self.noise_seed}
        document = request_json(self.signature, self.steps[0], outputs, {**parameters, **seed})
        return self.encode_head(infer_request(self.description.name, document, self._tensors[0])) + b"\r\n" + document
