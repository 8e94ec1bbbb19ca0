"""Tokens and TLS over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from actserve.cli.tools.local_service import free_port
from actserve.core.settings import Settings
from actserve.server.access.tokens import Access, add_token
from actserve.server.admission import Admission
from actserve.server.protocols import Service
from actserve.server.protocols.grpc.server import serving
from actserve.server.regions import Regions
from actserve.server.sessions import SessionLimits, Sessions
from tests import certificates
from tests.fake_policy import NAME, Versions
from tests.oip_grpc import infer, with_parameters

X = {"x": np.array([3], np.int64)}


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[GRPCInferenceServiceStub]:
    cert, key = certificates.make(folder)
    settings = Settings(grpc_port=free_port(), tls_cert=cert, tls_key=key)
    registry = Versions()
    registry.publish()
    with Sessions(folder / "sessions.sqlite", SessionLimits()) as sessions:
        admission = Admission(settings, Access(folder / "tokens"))
        async with serving(Service(registry, admission, sessions, settings, Regions(folder / "regions"))):
            credentials = grpc.ssl_channel_credentials(cert.read_bytes())
            async with grpc.aio.secure_channel(f"127.0.0.1:{settings.grpc_port}", credentials) as channel:
                yield GRPCInferenceServiceStub(channel)
        await registry.close()


def bearer(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


def test_calls_need_a_token(tmp_path: Path) -> None:
    mine, yours = add_token(tmp_path / "tokens", "me"), add_token(tmp_path / "tokens", "you")
    hasty = add_token(tmp_path / "tokens", "hasty", rate=2)

    async def run() -> None:
        async with served(tmp_path) as stub:
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            for wrong in (None, bearer("guess"), bearer(mine) * 2, (("authorization", mine),)):
                for method, asked in (
                    (stub.ModelInfer, infer(X)),
                    (stub.ModelMetadata, pb.ModelMetadataRequest(name=NAME)),
                    (stub.RepositoryIndex, pb.RepositoryIndexRequest()),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await method(asked, metadata=wrong)
                    assert refused.value.code() is StatusCode.UNAUTHENTICATED
                # Without a message: gRPC's client fails if the server ends the call while it sends one.
                assert await stub.ModelStreamInfer(metadata=wrong).code() is StatusCode.UNAUTHENTICATED
            begin = with_parameters(infer(X), sequence_id=5, sequence_start=True)
            go_on = with_parameters(infer(X), sequence_id=5)
            await stub.ModelInfer(begin, metadata=bearer(mine))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ModelInfer(go_on, metadata=bearer(yours))
            assert refused.value.code() is StatusCode.NOT_FOUND
            await stub.ModelInfer(go_on, metadata=bearer(mine))
            replies = stub.ModelStreamInfer(iter([infer(X)] * 8), metadata=bearer(hasty))
            errors = [reply.error_message async for reply in replies]
            assert errors[0] == ""
            assert "at most 2 requests a second" in errors[-1]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ModelInfer(infer(X), metadata=bearer(hasty))
            assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(asyncio.wait_for(run(), 60))
