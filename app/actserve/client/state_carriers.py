"""Four ways to keep an episode's state: in the client, in a session, in a stream, in an OIP sequence.

All four give the same actions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from actserve.client.remote_policy import RemotePolicy
from actserve.client.sequence import OipSequence
from actserve.client.stream import Stream
from actserve.core.signature import Array, Arrays


class EpisodeClient(Protocol):
    """One episode played with a service."""

    @property
    def outputs(self) -> Arrays:
        """The last step's outputs by name. May be empty if the episode asked for the action only."""

    def act(self, observation: Array) -> Any:
        """The action for one observation (*shape): an int if it is a single discrete one, else an array."""


def _stream(remote: RemotePolicy, **options: Any) -> Stream:
    return Stream(remote.url, remote.name, uds=remote.uds, token=remote.token, **options)


STATE_CARRIERS: dict[str, Callable[..., AbstractContextManager[EpisodeClient]]] = {
    "http": lambda remote, **options: nullcontext(remote.episode(**options)),
    "session": RemotePolicy.session,
    "stream": _stream,
    "oip": OipSequence,
}
"""By `--via`. Each takes a `RemotePolicy` and the keywords `outputs`, `exploration` and `seed`."""
