"""The ways to keep an episode's state: on this side, in a session, in a stream, in a sequence. One result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from actserve.client.remote_policy import RemotePolicy
from actserve.client.sequence import OipSequence
from actserve.client.stream import Stream
from actserve.core.signature import Array, Arrays, Exploration

Begin = Callable[[RemotePolicy, Sequence[str], Exploration | None, int | None], Any]


class Acting(Protocol):
    """One episode, however its state is kept."""

    @property
    def outputs(self) -> Arrays:
        """Of the last step, by name: those that were wanted."""

    def act(self, observation: Array) -> Any:
        """The action for one observation (*shape): an int if it is a single discrete one, else an array."""


@contextmanager
def _episode(
    remote: RemotePolicy, outputs: Sequence[str], exploration: Exploration | None, seed: int | None
) -> Iterator[Acting]:
    yield remote.episode(outputs, exploration=exploration, seed=seed)


def _session(remote: RemotePolicy, outputs: Sequence[str], exploration: Exploration | None, seed: int | None) -> Any:
    return remote.session(outputs, exploration=exploration, seed=seed)


def _stream(remote: RemotePolicy, outputs: Sequence[str], exploration: Exploration | None, seed: int | None) -> Any:
    return Stream(
        remote.url,
        remote.name,
        uds=remote.uds,
        token=remote.token,
        outputs=outputs,
        exploration=exploration,
        seed=seed,
    )


def _oip(remote: RemotePolicy, outputs: Sequence[str], exploration: Exploration | None, seed: int | None) -> Any:
    return OipSequence(remote, outputs, exploration=exploration, seed=seed)


WAYS: dict[str, Begin] = {"http": _episode, "session": _session, "stream": _stream, "oip": _oip}
"""Each gives a context manager over an `Acting`."""
