"""The methods of `inference.GRPCInferenceService`. The protocol defines their names."""
# ruff: noqa: N802

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import ExitStack
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import ServicerContext
from tritonclient.grpc import service_pb2 as pb

from actserve.core.errors import ActserveError, MalformedBody
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.server.admission import Admission, current_ticket
from actserve.server.memory import STREAM_BYTES
from actserve.server.protocols.grpc import messages
from actserve.server.protocols.grpc import status as errors
from actserve.server.protocols.grpc.infer_stream import InferStream
from actserve.server.protocols.oip import infer, metadata, statistics
from actserve.server.sessions import Sessions
from actserve.telemetry import call
from actserve.telemetry.call import Call
from actserve.wire.payload import MANY_BYTES

PROBES = ("ServerLive", "ServerReady")  # need no token
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def _unary(
    method: Callable[[InferenceService, _Request], Awaitable[_Response]],
) -> Callable[[InferenceService, _Request | MalformedBody, ServicerContext], Awaitable[_Response]]:
    """Wraps a method with one request and one response: checks the token, and turns errors into a status."""

    @functools.wraps(method)
    async def answer(self: InferenceService, request: _Request | MalformedBody, context: ServicerContext) -> _Response:
        try:
            if method.__name__ not in PROBES:
                self.admit(context)
            return await method(self, _valid(request))
        except Exception as error:
            status = errors.status(error)
        await context.abort(*status)
        raise AssertionError("abort raises")

    return answer


class InferenceService:
    """Each method returns the same content as its `/v2` route. `close` ends the streams."""

    def __init__(self, registry: Registry, sessions: Sessions, admission: Admission) -> None:
        self._registry = registry
        self._sessions = sessions
        self._admission = admission
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Streams stop reading. The requests that they have received are answered."""
        self._closing.set()

    def admit(self, context: ServicerContext) -> None:
        """Check the token in the metadata field `authorization`. Raises `Unauthorized` or `RateLimited`."""
        given = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        current_ticket.set(self._admission.open(given[0].encode() if len(given) == 1 else None))

    @_unary
    async def ServerLive(self, _request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    @_unary
    async def ServerReady(self, _request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._registry.not_ready() is None)

    @_unary
    async def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """An unknown model is not ready, as in Triton."""
        try:
            await self._find(request.name, request.version)
        except ActserveError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    @_unary
    async def ServerMetadata(self, _request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**metadata.server())

    @_unary
    async def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        policy = await self._find(request.name, request.version)
        return pb.ModelMetadataResponse(**metadata.model(policy, self._registry))

    @_unary
    async def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=metadata.config(await self._find(request.name, request.version)))

    @_unary
    async def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Without a name, the statistics of the live version of every policy."""
        if not request.name:
            return pb.ModelStatisticsResponse(model_stats=statistics.describe_live(self._registry))
        policy = await self._find(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=[statistics.describe(policy)])

    @_unary
    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        return pb.RepositoryIndexResponse(models=metadata.index(self._registry, request.ready))

    @_unary
    async def ModelInfer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        return await self._infer(request)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest | MalformedBody], context: ServicerContext
    ) -> None:
        """Several requests may be in flight; responses come in order. Errors are in the responses and do not end the
        stream. UNAVAILABLE when the service closes."""
        held = ExitStack()
        try:
            self.admit(context)
            held.enter_context(self._admission.memory.taken(STREAM_BYTES))
        except ActserveError as error:
            await context.abort(*errors.status(error))
        with held:
            stream = InferStream(self._respond, _sequence, context.write)
            if not await stream.run(requests, self._closing):
                await context.abort(
                    grpc.StatusCode.UNAVAILABLE, "the service is closing; it has answered all requests that it received"
                )

    async def _find(self, name: str, version: str) -> Policy:
        return await self._registry.find(name, version or None)

    async def _infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Act and count, with the id of the request or a new one."""
        call.current.set(Call.of(request.id))  # never reset: each request has its own task
        name = request.model_name if request.model_name in self._registry.names else ""
        tally = self._registry.counts.tally(name, "grpc", "ModelInfer")
        size_bytes = request.ByteSize()
        try:
            with self._admission.memory.taken(size_bytes):
                response = await infer.handle_infer(
                    self._admission,
                    self._sessions,
                    self._registry,
                    await self._find(request.model_name, request.model_version),
                    bool(request.model_version),
                    lambda: messages.GrpcInferRequest(request),
                    messages.encode,
                    takes_long=size_bytes > MANY_BYTES,
                )
        except Exception as error:
            tally.add(errors.code(error).name, error.code if isinstance(error, ActserveError) else "internal")
            raise
        tally.add("OK")
        return response

    async def _respond(self, request: pb.ModelInferRequest | MalformedBody) -> pb.ModelStreamInferResponse:
        try:
            self._admission.open_message()
            return pb.ModelStreamInferResponse(infer_response=await self._infer(_valid(request)))
        except Exception as error:
            _, message = errors.status(error)
            fields = {} if isinstance(request, MalformedBody) else {"model_name": request.model_name, "id": request.id}
            return pb.ModelStreamInferResponse(error_message=message, infer_response=fields)


def handlers(service: InferenceService) -> grpc.GenericRpcHandler:
    """Handlers of every method of the protocol. Methods that `InferenceService` lacks return UNIMPLEMENTED.

    The generated `add_GRPCInferenceServiceServicer_to_server` is not used: it answers an invalid message with UNKNOWN
    and the name of a class, and logs a traceback.
    """
    described = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    methods = {}
    for method in described.methods:
        streams = method.client_streaming and method.server_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        methods[method.name] = make(
            getattr(service, method.name, _not_offered),
            request_deserializer=functools.partial(_read, getattr(pb, method.input_type.name)),
            response_serializer=getattr(pb, method.output_type.name).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(described.full_name, methods)


async def _not_offered(_request: Any, context: ServicerContext) -> None:
    offered = ", ".join(metadata.EXTENSIONS)
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"not offered; the extensions offered are {offered}")


def _read(kind: Any, message: bytes) -> Any:
    """The message, or the error for the client."""
    try:
        return kind.FromString(message)
    except DecodeError:
        return MalformedBody(f"expected a {kind.DESCRIPTOR.name}; got something else")


def _valid(request: _Request | MalformedBody) -> _Request:
    if isinstance(request, MalformedBody):
        raise request
    return request


def _sequence(request: pb.ModelInferRequest | MalformedBody) -> Hashable | None:
    """The sequence of a request, if any. The ids 7 and "7" differ."""
    if isinstance(request, MalformedBody):
        return None
    id_ = messages.parameters(request).get("sequence_id")
    return (request.model_name, repr(id_)) if id_ else None
