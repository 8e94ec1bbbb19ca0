"""The methods of `inference.GRPCInferenceService`; the protocol gives them their names."""
# ruff: noqa: N802

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import ServicerContext
from tritonclient.grpc import service_pb2 as pb

from actserve.core.errors import ActserveError, MalformedBody
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.server.admission import Admission, current_ticket
from actserve.server.protocols.grpc import messages
from actserve.server.protocols.grpc import status as errors
from actserve.server.protocols.grpc.infer_stream import Conversation
from actserve.server.protocols.oip import infer, metadata, statistics
from actserve.server.sessions import Sessions
from actserve.telemetry import call
from actserve.telemetry.call import Call

PROBES = ("ServerLive", "ServerReady")  # need no token
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def _answering(
    method: Callable[[InferenceService, _Request], Awaitable[_Response]],
) -> Callable[[InferenceService, _Request | MalformedBody, ServicerContext], Awaitable[_Response]]:
    """A method of one request and one response, whose errors end the call with their status."""

    @functools.wraps(method)
    async def answer(self: InferenceService, request: _Request | MalformedBody, context: ServicerContext) -> _Response:
        try:
            if method.__name__ not in PROBES:
                self.admit(context)
            return await method(self, _sound(request))
        except Exception as error:
            status = errors.status(error)
        await context.abort(*status)
        raise AssertionError("abort raises")

    return answer


class InferenceService:
    """What each method answers is what its route of `/v2` answers. `close` ends the streams."""

    def __init__(self, registry: Registry, sessions: Sessions, admission: Admission) -> None:
        self._registry = registry
        self._sessions = sessions
        self._admission = admission
        self._closing = asyncio.Event()

    def close(self) -> None:
        """From now on streams take nothing more; what they have taken is answered."""
        self._closing.set()

    def admit(self, context: ServicerContext) -> None:
        """Let the call in by its token, in the metadata as `authorization`. Raises `Unauthorized`, `RateLimited`."""
        given = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        current_ticket.set(self._admission.open(given[0].encode() if len(given) == 1 else None))

    @_answering
    async def ServerLive(self, _request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    @_answering
    async def ServerReady(self, _request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._registry.not_ready() is None)

    @_answering
    async def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """A model that is not there is not ready, as in Triton."""
        try:
            await self._find(request.name, request.version)
        except ActserveError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    @_answering
    async def ServerMetadata(self, _request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**metadata.server())

    @_answering
    async def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        policy = await self._find(request.name, request.version)
        return pb.ModelMetadataResponse(**metadata.model(policy, self._registry))

    @_answering
    async def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=metadata.config(await self._find(request.name, request.version)))

    @_answering
    async def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Of the live version of every policy where none is named."""
        if not request.name:
            return pb.ModelStatisticsResponse(model_stats=statistics.describe_live(self._registry))
        policy = await self._find(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=[statistics.describe(policy)])

    @_answering
    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        return pb.RepositoryIndexResponse(models=metadata.index(self._registry, request.ready))

    @_answering
    async def ModelInfer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        return await self._infer(request)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest | MalformedBody], context: ServicerContext
    ) -> None:
        """Errors are in the responses, and the stream goes on; several requests may be in flight, responses come in
        order. UNAVAILABLE when the service closes."""
        try:
            self.admit(context)
        except ActserveError as error:
            await context.abort(*errors.status(error))
        conversation = Conversation(self._respond, _sequence, context.write)
        if not await conversation.run(requests, self._closing):
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "the service is closing; what it had taken in has been answered"
            )

    async def _find(self, name: str, version: str) -> Policy:
        return await self._registry.find(name, version or None)

    async def _infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Counted, under its own id or a new one."""
        call.current.set(Call.of(request.id))  # for good: it is a task of its own
        name = request.model_name if request.model_name in self._registry.names else ""
        tally = self._registry.counts.tally(name, "grpc", "ModelInfer")
        try:
            response = await infer.answer(
                self._admission,
                self._sessions,
                self._registry,
                await self._find(request.model_name, request.model_version),
                bool(request.model_version),
                lambda: messages.GrpcInferRequest(request),
                messages.written,
            )
        except Exception as error:
            tally.add(errors.code(error).name, error.code if isinstance(error, ActserveError) else "internal")
            raise
        tally.add("OK")
        return response

    async def _respond(self, request: pb.ModelInferRequest | MalformedBody) -> pb.ModelStreamInferResponse:
        try:
            self._admission.open_message()
            return pb.ModelStreamInferResponse(infer_response=await self._infer(_sound(request)))
        except Exception as error:
            _, message = errors.status(error)
            which = {} if isinstance(request, MalformedBody) else {"model_name": request.model_name, "id": request.id}
            return pb.ModelStreamInferResponse(error_message=message, infer_response=which)


def handlers(service: InferenceService) -> grpc.GenericRpcHandler:
    """Every method of the protocol; those that `InferenceService` has not are UNIMPLEMENTED, and say what is offered.

    Not the generated `add_GRPCInferenceServiceServicer_to_server`: what is no message it answers with UNKNOWN and the
    name of a class, and logs a traceback each time.
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
    """A message, or the error that it is to be answered with."""
    try:
        return kind.FromString(message)
    except DecodeError:
        return MalformedBody(f"expected a {kind.DESCRIPTOR.name}; got something else")


def _sound(request: _Request | MalformedBody) -> _Request:
    if isinstance(request, MalformedBody):
        raise request
    return request


def _sequence(request: pb.ModelInferRequest | MalformedBody) -> Hashable | None:
    """The sequence that a request is of; 7 and "7" are two."""
    if isinstance(request, MalformedBody):
        return None
    id_ = messages.parameters(request).get("sequence_id")
    return (request.model_name, repr(id_)) if id_ else None
