"""Messages of the Open Inference Protocol's gRPC side, as a client makes and reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from actserve.core.signature import Array, Arrays
from actserve.server.protocols.grpc.messages import CONTENTS
from actserve.wire.oip import DATATYPES
from tests.fake_policy import NAME


def described(name: str, array: Array, **fields: Any) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": array.shape, **fields}


def infer(tensors: Arrays, raw: bool = True, **fields: Any) -> pb.ModelInferRequest:
    """A request with its data in `raw_input_contents`, or in each tensor's `contents`."""
    if raw:
        data = {"raw_input_contents": [array.tobytes() for array in tensors.values()]}
        inputs = [described(name, array) for name, array in tensors.items()]
    else:
        data = {}
        inputs = [
            described(name, array, contents={CONTENTS[array.dtype.name]: array.ravel().tolist()})
            for name, array in tensors.items()
        ]
    return pb.ModelInferRequest(**{"model_name": NAME, "inputs": inputs, **data, **fields})


def with_parameters(request: pb.ModelInferRequest, **parameters: Any) -> pb.ModelInferRequest:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def arrays(response: pb.ModelInferResponse) -> Arrays:
    dtypes = {datatype: dtype for dtype, datatype in DATATYPES.items()}
    return {
        output.name: np.frombuffer(raw, dtypes[output.datatype]).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
