"""An inference request of the Open Inference Protocol with binary tensor data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import pydantic_core

from actserve.client.operations import HttpRequest
from actserve.core.signature import Arrays, Signature
from actserve.wire import RAW
from actserve.wire.oip import DATATYPES, HEADER
from actserve.wire.payload import find_spec


def request_json(
    signature: Signature, tensors: Arrays, outputs: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]
) -> bytes:
    """The JSON part of a request for `tensors` {name: (k, *shape)}. `binary_data` follows it in the body."""
    inputs = [
        {
            "name": name,
            "datatype": DATATYPES[(spec := find_spec(name, signature.request_inputs)).dtype],
            "shape": array.shape,
            "parameters": {"binary_data_size": len(array) * spec.item_bytes},
        }
        for name, array in tensors.items()
    ]
    return pydantic_core.to_json({"inputs": inputs, "outputs": outputs, "parameters": parameters})


def binary_data(signature: Signature, tensors: Arrays) -> bytes:
    """The tensor data that follows the JSON part, in the same order."""
    return b"".join(
        find_spec(name, signature.request_inputs).to_wire(array).tobytes() for name, array in tensors.items()
    )


def infer_request(policy: str, document: bytes, data: bytes) -> HttpRequest:
    """The HTTP request: `document` from `request_json`, `data` from `binary_data`."""
    headers = {"Content-Type": RAW, HEADER: str(len(document))}
    return HttpRequest("POST", f"/v2/models/{quote(policy, safe='')}/infer", document + data, headers, idempotent=False)
