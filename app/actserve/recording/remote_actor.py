"""RemoteActor: acts on recorded steps through a service. The client carries the state."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Self

import numpy as np

from actserve.client.remote_policy import RemotePolicy
from actserve.core.errors import UsageError
from actserve.core.signature import IS_INIT, Arrays
from actserve.recording.reader import Step
from actserve.recording.replay import begins, mode_of
from actserve.recording.rows import OBSERVATION, PARAMETER

CONNECTIONS = 8  # steps of so many episodes are sent at once


class RemoteActor:
    """The live version of `policy` of the service at `url`. Enter it to connect.

    Raises `UsageError` if `version` is another one than the live version, and as `RemotePolicy.step`.
    """

    max_batch = CONNECTIONS

    def __init__(self, url: str, policy: str, version: int | None = None, token: str | None = None) -> None:
        self._url, self._policy, self._version, self._token = url, policy, version, token
        self._stack = ExitStack()
        self._free: SimpleQueue[RemotePolicy] = SimpleQueue()

    def __enter__(self) -> Self:
        self._threads = self._stack.enter_context(ThreadPoolExecutor(CONNECTIONS, "replay"))
        try:
            for _ in range(CONNECTIONS):
                remote = self._stack.enter_context(RemotePolicy(self._url, self._policy, token=self._token))
                self._free.put(remote)
            self.description = remote.description
            self.signature = self.description.signature
            if self._version not in (None, self.description.version):
                raise UsageError(
                    f"the service acts with {self._policy}@{self.description.version}; expected {self._version}: "
                    "replay on that version with --store"
                )
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def act(self, steps: Sequence[Step], state: Arrays) -> Arrays:
        """As `Actor.act`."""
        states = [{name: array[row] for name, array in state.items()} for row in range(len(steps))]
        answers = list(self._threads.map(self._act, steps, states))
        return {name: np.stack([answer[name] for answer in answers]) for name in answers[0]}

    def _act(self, step: Step, state: Arrays) -> Arrays:
        """One step, each (*shape)."""
        signature, mode = self.signature, mode_of(step, self.signature)
        tensors = {spec.name: step.tensors[OBSERVATION + spec.name] for spec in signature.observations} | state
        if signature.is_init:
            tensors[IS_INIT.name] = np.array(begins(step))
        for parameter in signature.parameters:
            if PARAMETER + parameter.name in step.tensors:
                tensors[parameter.name] = step.tensors[PARAMETER + parameter.name]
        seed = (step.seed or 0) if signature.draws(mode) else None
        first = 0
        if seed is not None and step.item:  # the noise of an item depends on its place in the request
            tensors = {name: np.stack([array] * (step.item + 1)) for name, array in tensors.items()}
            first = step.item
        remote = self._free.get()
        try:
            answer = remote.step(tensors, signature.output_names, exploration=mode, seed=seed)
        finally:
            self._free.put(remote)
        return {name: array[first] for name, array in answer.items()} if first else answer
