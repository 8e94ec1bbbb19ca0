"""OipSequence: an episode over the Open Inference Protocol (OIP).

Observations are sent as binary tensor data, which needs no encoding. Outputs come back in JSON, because they are small.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actserve.client.oip_request import binary_data, infer_request, request_json
from actserve.client.operations import Operation, as_array, read_json, unexpected_answer, unwrap_action
from actserve.client.remote_policy import KeptEpisode, RemotePolicy
from actserve.core.signature import Array, Arrays, Exploration


class OipSequence(KeptEpisode):
    """One episode of `policy` whose state the service keeps under an id that the client chooses.

    A context manager that ends the sequence. To end it, the client sends the last observation again: the protocol has
    no other message for it.
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
        options = {"exploration": exploration, "seed": seed}
        self._first_step_options = {name: value for name, value in options.items() if value is not None}
        self._last: Mapping[str, Array] = {}  # the last observation

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """The action for one observation (*shape): an int if it is a single discrete one, else an array."""
        tensors = self._policy.description.named_observations(observation)
        first = {"sequence_start": True, **self._first_step_options} if not self.steps else {}
        self.outputs = self._policy.run(self._infer(tensors, first))
        self.steps += 1
        self._last = tensors
        return unwrap_action(self.outputs[self._policy.signature.action.name])

    def end(self) -> None:
        """End the sequence at the service, if it has begun."""
        if self.steps:
            self._policy.run(self._infer(self._last, {"sequence_end": True}))

    def _infer(self, tensors: Mapping[str, Array], parameters: Mapping[str, Any]) -> Operation[Arrays]:
        policy = self._policy
        items = {name: as_array(array)[None] for name, array in tensors.items()}
        policy.signature.validate_request(items)
        outputs = [{"name": name} for name in self._names]
        document = request_json(policy.signature, items, outputs, {"sequence_id": self.id, **parameters})
        answer = read_json((yield infer_request(policy.name, document, binary_data(policy.signature, items))))
        specs = {spec.name: spec for spec in policy.signature.outputs}
        try:
            given = {output["name"]: output["data"] for output in answer["outputs"]}
            return {
                name: np.array(given[name], specs[name].numpy_dtype).reshape(specs[name].shape) for name in self._names
            }
        except (KeyError, TypeError, ValueError) as error:
            raise unexpected_answer(", ".join(self._names), answer) from error
