"""Sequence: an episode in the Open Inference Protocol's own terms, for whoever speaks nothing else.

Observations go out as binary tensor data, which costs nothing to write; outputs come back in JSON, as they are small.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from actserve.client.inference import binary_data, infer, inference
from actserve.client.operations import Operation, plain, read_json, unintelligible
from actserve.client.remote_policy import RemotePolicy
from actserve.core.signature import Array, Arrays, Exploration


class OipSequence:
    """One episode of `policy`, of which the service keeps the state under an id chosen here.

    A context manager: at its end the sequence is ended, by an observation more, as the protocol has no other way.
    """

    def __init__(
        self,
        policy: RemotePolicy,
        outputs: Sequence[str] = (),
        *,
        exploration: Exploration | None = None,
        seed: int | None = None,
    ) -> None:
        self.id = secrets.token_urlsafe(16)
        self.steps = 0
        self.outputs: Arrays = {}  # of the last step
        self._policy = policy
        self._names = policy.signature.select(list(dict.fromkeys((policy.signature.action.name, *outputs))))
        beginning = {"exploration": exploration, "seed": seed}
        self._beginning = {name: wish for name, wish in beginning.items() if wish is not None}
        self._last: Mapping[str, Array] = {}

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """The action for one observation (*shape): an int if it is a single discrete one, else an array."""
        tensors = self._policy.description.by_name(observation)
        first = {"sequence_start": True, **self._beginning} if not self.steps else {}
        self.outputs = self._policy.run(self._infer(tensors, first))
        self.steps += 1
        self._last = tensors
        return plain(self.outputs[self._policy.signature.action.name])

    def end(self) -> None:
        """Tell the service that the sequence is over, if it has begun: by its last step, once more."""
        if self.steps:
            self._policy.run(self._infer(self._last, {"sequence_end": True}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.end()

    def _infer(self, tensors: Mapping[str, Array], parameters: Mapping[str, Any]) -> Operation[Arrays]:
        policy = self._policy
        items = {name: np.asarray(array)[None] for name, array in tensors.items()}
        policy.signature.validate_request(items)
        outputs = [{"name": name} for name in self._names]
        document = inference(items, outputs, {"sequence_id": self.id, **parameters})
        answer = read_json((yield infer(policy.name, document, binary_data(items))))
        specs = {spec.name: spec for spec in policy.signature.outputs}
        try:
            given = {output["name"]: output["data"] for output in answer["outputs"]}
            return {
                name: np.array(given[name], specs[name].numpy_dtype).reshape(specs[name].shape) for name in self._names
            }
        except (KeyError, TypeError, ValueError) as error:
            raise unintelligible(", ".join(self._names), answer) from error
