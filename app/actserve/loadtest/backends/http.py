"""`POST /policies/{name}/act`: every request is an episode of its own."""

from __future__ import annotations

from functools import cached_property

from actserve.client.operations import HttpRequest, act_path, request_body
from actserve.loadtest.backends.base import Backend, Requests
from actserve.loadtest.connection import LoadConnection, Parts


class HttpBackend(Backend):
    async def begin(self, connection: LoadConnection) -> None:
        connection.script = Requests(self.turns, self._requests)

    @cached_property
    def _requests(self) -> list[Parts]:
        path = act_path(self.description.name) + ("" if self.drawn is None else f"?seed={self.drawn}")
        bodies = [request_body(self.signature, observation, batched=False) for observation in self.observations]
        return [self.whole(HttpRequest("POST", path, body, {"Content-Type": type_})) for type_, body in bodies]
