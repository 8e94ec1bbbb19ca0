"""The clients of GR00T's port, and the episode of each. A client is a connection: ZeroMQ names it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from actserve.core.errors import InvalidRequest, SessionExpired
from actserve.server.access.tokens import Token
from actserve.server.protocols.robots.episode import RobotEpisode

MAX_EXPIRED = 10_000  # remembered, so that an episode does not begin in the middle


@dataclass
class Client:
    """One connection. `busy`: a request is in progress."""

    token: Token | None
    episode: RobotEpisode | None = None
    busy: bool = False
    used_s: float = 0.0


class Clients:
    """The clients by the identity of their connection. One that is idle for `idle_s` loses its episode."""

    def __init__(self, idle_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._idle_s, self._clock = idle_s, clock
        self._clients: OrderedDict[bytes, Client] = OrderedDict()  # the longest idle one first
        self._expired: OrderedDict[bytes, None] = OrderedDict()

    def take(self, identity: bytes, token: Token | None) -> Client:
        """The client, for one request; `give_back` it. Raises `InvalidRequest` if another one is in progress."""
        client = self._clients.get(identity)
        if client is not None and client.busy:
            raise InvalidRequest("expected one request at a time on a connection; got another before the answer")
        if client is None or client.token is not token:  # a token that was replaced begins anew
            self.end(identity)
            client = self._clients[identity] = Client(token)
        client.busy = True
        return client

    def give_back(self, identity: bytes) -> None:
        client = self._clients.get(identity)
        if client is not None:
            client.busy, client.used_s = False, self._clock()
            self._clients.move_to_end(identity)

    def check_alive(self, identity: bytes) -> None:
        """Raises `SessionExpired` once the client's episode has expired, until `forgive`."""
        if identity in self._expired:
            raise SessionExpired(f"it was idle for {self._idle_s:g} s")

    def forgive(self, identity: bytes) -> None:
        self._expired.pop(identity, None)

    def end(self, identity: bytes) -> None:
        """Forget a client, and free its episode."""
        client = self._clients.pop(identity, None)
        if client is not None and client.episode is not None:
            client.episode.close()

    def sweep(self) -> None:
        """End the episodes of idle clients."""
        before_s = self._clock() - self._idle_s
        while self._clients:
            identity, client = next(iter(self._clients.items()))
            if client.busy or client.used_s > before_s:
                return
            if client.episode is not None and client.episode.state.steps:
                self._expired[identity] = None
                if len(self._expired) > MAX_EXPIRED:
                    self._expired.popitem(last=False)
            self.end(identity)

    def close(self) -> None:
        for identity in list(self._clients):
            self.end(identity)
