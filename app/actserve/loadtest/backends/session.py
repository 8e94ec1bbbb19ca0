"""SessionBackend: each connection steps one of its own, and every step is numbered.

When a connection breaks, the next one goes on with its session and asks the unanswered step again. The service must
take it once, whether the question was lost or the answer; else the answers after it are others than they should be.
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
from actserve.loadtest.backends.base import Ask, Backend, Steps
from actserve.loadtest.connection import LoadConnection, Parts


@dataclass
class SessionState:
    id: str
    steps: Steps
    connection: LoadConnection  # that steps it, or did

    @property
    def free(self) -> bool:
        return not self.steps.over and not self.connection.usable


class SessionBackend(Backend):
    def __init__(self, url: str, description: PolicyDescription, seed: int, token: str | None = None) -> None:
        super().__init__(url, description, seed, token)
        self._sessions: list[SessionState] = []
        self._owner: str | None = None  # of all that were begun, even if the answer that told so was lost

    async def begin(self, connection: LoadConnection) -> None:
        session = next((session for session in self._sessions if session.free), None)
        if session is None:
            session = await self._begin(connection)
            self._sessions.append(session)
        session.connection = connection
        connection.script = session.steps

    async def end(self, ask: Ask) -> None:
        if self._owner is None:
            return
        listing = HttpRequest("GET", sessions_path(self.description.name), headers={"X-Owner": self._owner})
        status, body = await ask(self.whole(listing))
        if status == 200:
            for session in pydantic_core.from_json(body)["sessions"]:
                await ask(self.whole(next(end_session(self.description, session["session"]))))

    async def _begin(self, connection: LoadConnection) -> SessionState:
        self._owner = self._owner or secrets.token_urlsafe(16)
        beginning = begin_session(self.description, None, self.drawn, self._owner)
        status, body = await connection.exchange(*self.whole(next(beginning)))
        try:
            beginning.send(HttpResponse(status, "", body))
        except StopIteration as done:
            return SessionState(done.value, Steps(self.turns_of_an_episode(), self._request(done.value)), connection)
        raise AssertionError("to begin a session takes one request")

    def _request(self, id_: str) -> Callable[[int, int], Parts]:
        session = f"X-Session: {id_}\r\n".encode()
        bodies = self.bodies[1]
        return lambda index, step: (self._heads[index], session, b"X-Step: %d\r\n\r\n" % step, bodies[index])

    @cached_property
    def _heads(self) -> list[bytes]:
        content_type, bodies = self.bodies
        path, headers = act_path(self.description.name), {"Content-Type": content_type}
        return [self.head(HttpRequest("POST", path, body, headers)) for body in bodies]
