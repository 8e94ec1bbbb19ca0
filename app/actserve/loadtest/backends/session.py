"""SessionBackend: each connection steps its own session, and every step is numbered.

When a connection breaks, the next connection resumes its session and sends the unanswered step again. The service must
take that step once, whether the request or the answer was lost; otherwise the later answers are inconsistent.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pydantic_core

from actserve.client.operations import (
    HttpRequest,
    HttpResponse,
    PolicyDescription,
    act_path,
    begin_session,
    end_session,
    sessions_path,
)
from actserve.loadtest.backends.base import Backend, EpisodeSteps, SendRequest
from actserve.loadtest.connection import LoadConnection, RequestParts


@dataclass
class SessionState:
    id: str
    steps: EpisodeSteps
    connection: LoadConnection  # the last one that stepped it

    @property
    def resumable(self) -> bool:
        return not self.steps.over and not self.connection.usable


class SessionBackend(Backend):
    def __init__(self, url: str, description: PolicyDescription, seed: int, token: str | None = None) -> None:
        super().__init__(url, description, seed, token)
        self._sessions: list[SessionState] = []
        self._owner: str | None = None  # of all sessions; finds those whose creation was never answered

    async def prepare(self, connection: LoadConnection) -> None:
        session = next((session for session in self._sessions if session.resumable), None)
        if session is None:
            session = await self._begin_session(connection)
            self._sessions.append(session)
        session.connection = connection
        connection.script = session.steps

    async def clean_up(self, send: SendRequest) -> None:
        if self._owner is None:
            return
        listing = HttpRequest("GET", sessions_path(self.description.name), headers={"X-Owner": self._owner})
        status, body = await send(self.encode(listing))
        if status == 200:
            for session in pydantic_core.from_json(body)["sessions"]:
                await send(self.encode(next(end_session(self.description, session["session"]))))

    async def _begin_session(self, connection: LoadConnection) -> SessionState:
        self._owner = self._owner or secrets.token_urlsafe(16)
        operation = begin_session(self.description, None, self.noise_seed, self._owner, secrets.token_urlsafe(16))
        status, body = await connection.exchange(*self.encode(next(operation)))
        try:
            operation.send(HttpResponse(status, "", body))
        except StopIteration as done:
            return SessionState(done.value, EpisodeSteps(self.episode_keys(), self._request(done.value)), connection)
        raise AssertionError("beginning a session takes one request")

    def _request(self, id_: str) -> Callable[[int, int], RequestParts]:
        session = f"X-Session: {id_}\r\n".encode()
        bodies = self.bodies[1]
        return lambda index, step: (self._heads[index], session, b"X-Step: %d\r\n\r\n" % step, bodies[index])

    @cached_property
    def _heads(self) -> list[bytes]:
        content_type, bodies = self.bodies
        path, headers = act_path(self.description.name), {"Content-Type": content_type}
        return [self.encode_head(HttpRequest("POST", path, body, headers)) for body in bodies]
