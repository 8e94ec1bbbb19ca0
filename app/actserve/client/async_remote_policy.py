"""AsyncRemotePolicy: `RemotePolicy` for asyncio. The only module that imports aiohttp."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from actserve import wire
from actserve.client import operations
from actserve.client.operations import HttpRequest, HttpResponse, Operation, PolicyDescription, Result
from actserve.client.remote_policy import MAX_ATTEMPTS, RETRIED_ERRORS, CarriedState
from actserve.client.transport import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S, authorization_header, parse_service_url
from actserve.core.errors import ServiceUnreachable
from actserve.core.imports import import_extra
from actserve.core.robot import Robot
from actserve.core.signature import Array, Arrays, Exploration


class AsyncRemotePolicy:
    """`RemotePolicy` for asyncio: an asynchronous context manager.

    Many tasks may share it; each plays its own episodes.
    """

    def __init__(
        self,
        url: str,
        policy: str | None = None,
        uds: str | None = None,
        token: str | None = None,
        robot: Robot | None = None,
    ) -> None:
        self.url = url
        self._robot = robot
        self.uds = uds
        self.token = token
        self._policy_name = policy
        self._http: Any = None
        self._description: PolicyDescription | None = None

    async def __aenter__(self) -> Self:
        parse_service_url(self.url)
        aiohttp = import_extra("async", "aiohttp")
        connector = aiohttp.UnixConnector(self.uds, limit=0) if self.uds else aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=ANSWER_TIMEOUT_S)
        self._http = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=authorization_header(self.token)
        )
        try:
            self._description = await self.run(operations.describe(self._policy_name))
            self._description.check_robot(self._robot)
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.close()

    @property
    def description(self) -> PolicyDescription:
        """The service's description of the policy, fetched by `__aenter__`."""
        assert self._description is not None, "use AsyncRemotePolicy in an async with block"
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
        return (await self.run(operations.step(self.description, tensors, outputs, exploration, seed))).outputs

    async def __call__(self, tensordict: Any) -> Any:
        """See `RemotePolicy.__call__`."""
        return await self.run(operations.act_on_tensordict(self.description, tensordict))

    def episode(
        self, outputs: Sequence[str] = (), *, exploration: Exploration | None = None, seed: int | None = None
    ) -> AsyncEpisode:
        """See `RemotePolicy.episode`."""
        return AsyncEpisode(self, CarriedState(self.description, outputs, exploration, seed))

    async def run(self, operation: Operation[Result]) -> Result:
        """Run one operation and return its result."""
        try:
            request = next(operation)
            while True:
                request = operation.send(await self._exchange(request))
        except StopIteration as done:
            result: Result = done.value
            return result

    async def run_with_retries(self, operation: Callable[[], Operation[Result]]) -> Result:
        """See `RemotePolicy.run_with_retries`."""
        for _ in range(MAX_ATTEMPTS - 1):
            with suppress(*RETRIED_ERRORS):
                return await self.run(operation())
        return await self.run(operation())

    async def _exchange(self, request: HttpRequest) -> HttpResponse:
        aiohttp = import_extra("async", "aiohttp")
        try:
            try:
                return await self._send(request)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # The service closed an idle connection while we reused it: retry once on another connection.
                if not request.idempotent:
                    raise
                return await self._send(request)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServiceUnreachable(f"no answer from {self.url}: {error}", url=self.url) from error

    async def _send(self, request: HttpRequest) -> HttpResponse:
        url = self.url.rstrip("/") + request.path
        async with self._http.request(
            request.method, url, data=request.body, headers=request.headers, allow_redirects=False
        ) as response:
            headers, body = response.headers, await response.read()
            return HttpResponse(
                response.status, headers.get("Content-Type", ""), body, headers.get(wire.VERSION_HEADER, "")
            )


class AsyncEpisode:
    """One episode played with an `AsyncRemotePolicy`. Take its steps one after the other."""

    def __init__(self, policy: AsyncRemotePolicy, carried: CarriedState) -> None:
        self._policy = policy
        self._carried = carried

    async def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """See `Episode.act`."""
        return await self._policy.run_with_retries(lambda: self._carried.act(observation))

    @property
    def outputs(self) -> Arrays:
        """The last step's outputs by name. Empty if the episode asked for the action only."""
        return self._carried.outputs
