"""HttpBackend: `POST /policies/{name}/act`. Every request is its own episode."""

from __future__ import annotations

from functools import cached_property

from actserve.client.operations import HttpRequest, act_path, request_body
from actserve.loadtest.backends.base import Backend, IndependentRequests
from actserve.loadtest.connection import LoadConnection, RequestParts


class HttpBackend(Backend):
    async def prepare(self, connection: LoadConnection) -> None:
        connection.script = IndependentRequests(self.shared_keys, self._requests)

    @cached_property
    def _requests(self) -> list[RequestParts]:
        path = act_path(self.description.name) + ("" if self.noise_seed is None else f"?seed={self.noise_seed}")
        bodies = [request_body(self.signature, observation, batched=False) for observation in self.observations]
        return [self.encode(HttpRequest("POST", path, body, {"Content-Type": type_})) for type_, body in bodies]
