"""AsyncRemotePolicy: `RemotePolicy` for asyncio. The only place that knows aiohttp."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from actserve.client import operations
from actserve.client.operations import Description, HttpRequest, HttpResponse, Operation, Result
from actserve.client.remote_policy import ATTEMPTS, LOST, Carried
from actserve.client.tensordicts import read_tensordict, write_tensordict
from actserve.client.transport import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S, bearer, parse
from actserve.core.errors import ServiceUnreachable
from actserve.core.imports import import_extra
from actserve.core.signature import Array, Arrays, Exploration


class AsyncRemotePolicy:
    """As `RemotePolicy`; an asynchronous context manager that many tasks may share, each with episodes of its own."""

    def __init__(self, url: str, policy: str | None = None, uds: str | None = None, token: str | None = None) -> None:
        self.url = url
        self.uds = uds
        self.token = token
        self._wanted = policy
        self._http: Any = None
        self._description: Description | None = None

    async def __aenter__(self) -> Self:
        parse(self.url)
        aiohttp = import_extra("async", "aiohttp")
        connector = aiohttp.UnixConnector(self.uds, limit=0) if self.uds else aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=ANSWER_TIMEOUT_S)
        self._http = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=bearer(self.token))
        try:
            self._description = await self.run(operations.describe(self._wanted))
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.close()

    @property
    def description(self) -> Description:
        """As the service gave it when this was entered."""
        assert self._description is not None, "to be used in an async with block"
        return self._description

    async def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """See `RemotePolicy.act`."""
        return await self.run(operations.act(self.description, observation))

    async def step(
        self,
        tensors: Mapping[str, Array],
        outputs: Sequence[str] = (),
        *,
        exploration: Exploration | None = None,
        seed: int | None = None,
    ) -> Arrays:
        """See `RemotePolicy.step`."""
        return await self.run(operations.step(self.description, tensors, outputs, exploration, seed))

    async def __call__(self, tensordict: Any) -> Any:
        """See `RemotePolicy.__call__`."""
        signature = self.description.signature
        tensors = read_tensordict(tensordict, signature)
        return write_tensordict(tensordict, await self.step(tensors, [s.name for s in signature.outputs]), signature)

    def episode(
        self, outputs: Sequence[str] = (), *, exploration: Exploration | None = None, seed: int | None = None
    ) -> AsyncEpisode:
        """See `RemotePolicy.episode`."""
        return AsyncEpisode(self, Carried(self.description, outputs, exploration, seed))

    async def run(self, operation: Operation[Result]) -> Result:
        """One operation."""
        try:
            request = next(operation)
            while True:
                request = operation.send(await self._exchange(request))
        except StopIteration as done:
            result: Result = done.value
            return result

    async def insist(self, ask: Callable[[], Operation[Result]]) -> Result:
        """See `RemotePolicy.insist`."""
        for _ in range(ATTEMPTS - 1):
            with suppress(*LOST):
                return await self.run(ask())
        return await self.run(ask())

    async def _exchange(self, request: HttpRequest) -> HttpResponse:
        aiohttp = import_extra("async", "aiohttp")
        try:
            try:
                return await self._send(request)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # The service closed a kept connection just as it was used again: once more, on another one.
                if not request.repeatable:
                    raise
                return await self._send(request)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServiceUnreachable(f"no answer from {self.url}: {error}", url=self.url) from error

    async def _send(self, request: HttpRequest) -> HttpResponse:
        url = self.url.rstrip("/") + request.path
        async with self._http.request(
            request.method, url, data=request.body, headers=request.headers, allow_redirects=False
        ) as response:
            return HttpResponse(response.status, response.headers.get("Content-Type", ""), await response.read())


class AsyncEpisode:
    """One episode played with an `AsyncRemotePolicy`; its steps one after the other."""

    def __init__(self, policy: AsyncRemotePolicy, carried: Carried) -> None:
        self._policy = policy
        self._carried = carried

    async def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """See `Episode.act`."""
        return await self._policy.insist(lambda: self._carried.act(observation))

    @property
    def outputs(self) -> Arrays:
        """Of the last step, by name; empty if only the action was wanted."""
        return self._carried.outputs
