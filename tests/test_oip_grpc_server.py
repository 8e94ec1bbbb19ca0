"""The gRPC server, over a socket, with `digest` behind it."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from actserve.cli.tools.local_service import free_port
from actserve.core.errors import UsageError
from actserve.core.settings import Settings
from actserve.server.admission import Admission
from actserve.server.protocols import Service
from actserve.server.protocols.grpc import protocol
from actserve.server.protocols.grpc.server import serving
from actserve.server.protocols.grpc.service import InferenceService
from actserve.server.regions import Regions
from actserve.server.sessions import SessionLimits, Sessions
from tests.fake_policy import SLOW, Alone, Versions, seen
from tests.oip import BATCH, MAX_BODY_BYTES, same
from tests.oip_grpc import arrays, infer, with_parameters
from tests.waiting import until_in_loop

assert protocol.check is not None
check_settings = protocol.check


@asynccontextmanager
async def served(
    registry: Versions, folder: Path, admission: Admission | None = None
) -> AsyncIterator[tuple[grpc.aio.Channel, AsyncExitStack]]:
    """A channel to the service, and a stack that ends the service when it is closed."""
    chosen = Settings(grpc_port=free_port(), max_body_bytes=MAX_BODY_BYTES)
    admission = admission or Admission(chosen)
    with Sessions(folder / "sessions.sqlite", SessionLimits()) as sessions:
        registry.publish()
        parts = Service(registry, admission, sessions, chosen, Regions(folder / "regions"))
        async with AsyncExitStack() as service:
            await service.enter_async_context(serving(parts))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{chosen.grpc_port}") as channel:
                yield channel, service
        await registry.close()


def hold(registry: Versions) -> threading.Event:
    """Until the event is set the runtime answers nothing."""
    runtime, open_ = registry.runtimes[1], threading.Event()
    run = runtime._run
    runtime._run = lambda arrays: run(arrays) if open_.wait(30) else []  # type: ignore[method-assign]
    return open_


def test_what_was_accepted_is_answered_before_the_server_ends(tmp_path: Path) -> None:
    async def main() -> None:
        registry = Versions(SLOW)
        async with served(registry, tmp_path) as (channel, service):
            stub = GRPCInferenceServiceStub(channel)
            alone = arrays(await stub.ModelInfer(infer(BATCH)))
            open_ = hold(registry)
            unary = asyncio.ensure_future(stub.ModelInfer(infer(BATCH)))
            stream = stub.ModelStreamInfer()
            for number in range(3):
                await stream.write(infer(BATCH, id=str(number)))
            await until_in_loop(lambda: registry.policies[1].statistics().waiting == 8)
            ending = asyncio.create_task(service.aclose())
            await asyncio.sleep(0.05)
            assert not ending.done()
            open_.set()
            same(arrays(await unary), alone)
            for number in range(3):
                response = await stream.read()
                assert (response.infer_response.id, response.error_message) == (str(number), "")
                same(arrays(response.infer_response), alone)
            with pytest.raises(grpc.aio.AioRpcError, match="the service is closing") as caught:
                await stream.read()
            assert caught.value.code() is StatusCode.UNAVAILABLE
            await ending
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ServerLive(pb.ServerLiveRequest())
            assert caught.value.code() is StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_messages_and_streams_take_memory_of_the_connections(tmp_path: Path) -> None:
    async def main() -> None:
        registry, admission = Versions(SLOW), Admission(Settings(max_body_bytes=MAX_BODY_BYTES))
        memory = admission.memory
        async with served(registry, tmp_path, admission) as (channel, _):
            stub = GRPCInferenceServiceStub(channel)
            with memory.taken(memory.free_bytes):
                for call in (stub.ModelInfer(infer(BATCH)), stub.ModelStreamInfer().read()):
                    with pytest.raises(grpc.aio.AioRpcError, match="all connections together may hold") as caught:
                        await call
                    assert caught.value.code() is StatusCode.UNAVAILABLE
            open_ = hold(registry)
            waiting = asyncio.ensure_future(stub.ModelInfer(infer(BATCH)))
            await until_in_loop(lambda: memory.taken_bytes == infer(BATCH).ByteSize())
            open_.set()
            await waiting
            await until_in_loop(lambda: memory.taken_bytes == 0)

    asyncio.run(main())


def test_calls_that_end_early_move_nothing(tmp_path: Path) -> None:
    def step(x: int, start: bool = False) -> pb.ModelInferRequest:
        return with_parameters(infer(seen(x)), sequence_id=7, sequence_start=start)

    async def main() -> None:
        registry, alone = Versions(SLOW), Alone(1, 0, None)
        async with served(registry, tmp_path) as (channel, _):
            stub = GRPCInferenceServiceStub(channel)
            same(arrays(await stub.ModelInfer(step(3, start=True))), alone.take(seen(3)))
            open_ = hold(registry)

            def waiting(calls: int) -> Callable[[], bool]:
                return lambda: registry.policies[1].statistics().waiting == calls

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(step(4), timeout=0.2)
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
            call, stream = stub.ModelInfer(step(4)), stub.ModelStreamInfer()
            await until_in_loop(waiting(2))
            await stream.write(step(4))
            await until_in_loop(waiting(3))
            call.cancel()
            stream.cancel()
            late = with_parameters(step(4), timeout=1000)
            with pytest.raises(grpc.aio.AioRpcError, match="within the timeout of 1,000 µs") as caught:
                await stub.ModelInfer(late)
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
            await asyncio.sleep(0.1)
            open_.set()
            same(arrays(await stub.ModelInfer(step(5))), alone.take(seen(5)))

    asyncio.run(main())


def test_messages_are_bounded_and_what_is_none_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with served(Versions(SLOW), tmp_path) as (channel, _):
            stub = GRPCInferenceServiceStub(channel)
            fits = infer({"x": np.zeros(MAX_BODY_BYTES // 8, np.int64)})
            assert len(arrays(await stub.ModelInfer(fits))["action"]) == MAX_BODY_BYTES // 8
            for size, compression in ((1 << 18, None), (64 << 20, grpc.Compression.Gzip)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.ModelInfer(infer({"x": np.zeros(size // 8, np.int64)}), compression=compression)
                assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
            for method in ("ModelInfer", "ModelMetadata"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"pixels")
                message = f"expected a {method}Request; got something else"
                assert (caught.value.code(), caught.value.details()) == (StatusCode.INVALID_ARGUMENT, message)
            stream = channel.stream_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                response_deserializer=pb.ModelStreamInferResponse.FromString,
            )()
            await stream.write(b"pixels")
            await stream.write(infer(BATCH).SerializeToString())
            await stream.done_writing()
            assert (await stream.read()).error_message == "expected a ModelInferRequest; got something else"
            assert arrays((await stream.read()).infer_response)
            assert await stream.read() is grpc.aio.EOF
            assert not caplog.records

    asyncio.run(main())


def test_what_is_not_offered_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(Versions(SLOW), tmp_path) as (channel, _):
            for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
                call = getattr(GRPCInferenceServiceStub(channel), method.name)
                offered = not method.name.startswith(("System", "Cuda", "Trace", "Log", "RepositoryModel"))
                if offered:
                    assert hasattr(InferenceService, method.name)
                    continue
                with pytest.raises(grpc.aio.AioRpcError, match="the extensions offered are binary") as caught:
                    await call(getattr(pb, method.input_type.name)())
                assert caught.value.code() is StatusCode.UNIMPLEMENTED

    asyncio.run(main())


def test_libraries_that_are_absent_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("actserve.server.protocols.grpc.server", "actserve.server.protocols.grpc.service"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(UsageError, match=r'this needs grpc; install it with: pip install "actserve\[grpc\]"'):
        check_settings(Settings(grpc_port=1))


def test_a_port_that_is_taken_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = Settings(grpc_port=taken.getsockname()[1])
        with pytest.raises(UsageError, match="for gRPC: Address already in use"):
            check_settings(chosen)
    check_settings(chosen)
    check_settings(Settings())
