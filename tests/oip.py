"""Bodies of the Open Inference Protocol as a client makes and reads them, and the `/v2` routes with `digest` behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI

from actserve.core.settings import Settings
from actserve.core.signature import Array, Arrays
from actserve.server.admission import Admission
from actserve.server.protocols import oip
from actserve.server.regions import Regions
from actserve.server.sessions import SessionLimits, Sessions
from actserve.wire.oip import DATATYPES, HEADER
from tests.asgi import Answer, Caller
from tests.fake_policy import NAME, Versions

INFER = f"/v2/models/{NAME}/infer"
MAX_BODY_BYTES = 100_000


def serving(registry: Versions, folder: Path) -> Caller:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with Sessions(folder / "sessions.sqlite", SessionLimits()) as app.state.sessions:
            registry.publish()
            yield
            await registry.close()

    app = FastAPI(lifespan=lifespan)
    app.state.settings = Settings(max_body_bytes=MAX_BODY_BYTES)
    app.state.registry, app.state.admission = registry, Admission(app.state.settings)
    app.state.regions = Regions(folder / "regions")
    app.include_router(oip.router)
    return Caller(app)


BATCH = {
    "x": np.array([3, 999], np.int64),
    "digest": np.array([[7, 7], [5, 6]], np.int64),
    "odd": np.array([True, False]),
    "is_init": np.array([False, False]),
}


def tensor(name: str, array: Array, **fields: Any) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape), **fields}


def in_json(tensors: Arrays, **rest: Any) -> dict[str, Any]:
    return {"inputs": [tensor(name, array, data=array.tolist()) for name, array in tensors.items()], **rest}


def in_binary(tensors: Arrays, **rest: Any) -> tuple[bytes, dict[str, str]]:
    inputs = [tensor(n, array, parameters={"binary_data_size": array.nbytes}) for n, array in tensors.items()]
    document = json.dumps({"inputs": inputs, **rest}).encode()
    return document + b"".join(array.tobytes() for array in tensors.values()), {HEADER: str(len(document))}


def arrays(answer: Answer) -> Arrays:
    """The content of an answer, in any encoding."""
    assert answer.status == 200, answer.content
    end = int(answer.headers.get(HEADER.lower(), len(answer.content)))
    document, rest = json.loads(answer.content[:end]), answer.content[end:]
    dtypes = {datatype: dtype for dtype, datatype in DATATYPES.items()}
    found: Arrays = {}
    for output in document["outputs"]:
        dtype, size = np.dtype(dtypes[output["datatype"]]), output.get("parameters", {}).get("binary_data_size")
        values = np.array(output["data"], dtype) if size is None else np.frombuffer(rest[:size], dtype)
        found[output["name"]] = values.reshape(output["shape"])
        rest = rest[size or 0 :]
    assert rest == b""
    return found


def same(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
        assert array.dtype == other[name].dtype


def error(answer: Answer) -> tuple[int, str]:
    document = answer.document
    assert list(document) == ["error"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status, document["error"]
