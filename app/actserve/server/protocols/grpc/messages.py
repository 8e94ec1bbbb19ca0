"""Infer messages <-> named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from actserve.core.errors import InvalidTensor, MalformedBody
from actserve.core.signature import Array, Arrays, Signature, TensorSpec
from actserve.server.protocols.oip import codec
from actserve.server.protocols.oip.infer import InferResponse
from actserve.server.protocols.oip.infer_request import from_fields
from actserve.wire.oip import DATATYPES
from actserve.wire.payload import check_value_count

CONTENTS = {  # float16 and bfloat16 have none
    "uint8": "uint_contents",
    "int8": "int_contents",
    "uint16": "uint_contents",
    "int16": "int_contents",
    "int32": "int_contents",
    "int64": "int64_contents",
    "float32": "fp32_contents",
    "float64": "fp64_contents",
    "bool": "bool_contents",
}


class GrpcInferRequest:
    """A ModelInferRequest. Its tensors are all in `raw_input_contents`, or each in its own `contents`.

    Raises `MalformedBody` for a field or parameter of the wrong type, and `InvalidRequest` for shared memory.
    """

    def __init__(self, message: pb.ModelInferRequest) -> None:
        self.request = from_fields(
            {
                "id": message.id or None,
                "parameters": parameters(message),
                "inputs": [
                    {
                        "name": tensor.name,
                        "datatype": tensor.datatype,
                        "shape": list(tensor.shape),
                        "parameters": parameters(tensor),
                    }
                    for tensor in message.inputs
                ],
                "outputs": [{"name": output.name, "parameters": parameters(output)} for output in message.outputs]
                or None,
            }
        )
        codec.refuse_shared_memory(self.request)
        self._message = message

    def tensors(self, signature: Signature) -> Arrays:
        """The inputs, a valid request: each (B, *shape). Raises `InvalidTensor` or `MalformedBody`."""
        raw = self._message.raw_input_contents
        if raw and len(raw) != len(self.request.inputs):
            expected = f"{len(self.request.inputs)}, one for each input, or none"
            raise MalformedBody(f"raw_input_contents: expected {expected}; got {len(raw)}")
        found: Arrays = {}
        for index, (given, spec) in enumerate(codec.match_inputs(self.request.inputs, signature)):
            contents = {field.name: values for field, values in self._message.inputs[index].contents.ListFields()}
            if raw and contents:
                raise InvalidTensor(spec.name, "either contents or raw_input_contents", "both")
            if raw:
                # A writable copy, so that runtimes do not make one.
                found[spec.name] = codec.from_bytes(bytearray(raw[index]), given.shape, spec)
            else:
                found[spec.name] = _from_contents(contents, given.shape, spec)
        signature.validate_request(found)
        return found


def _from_contents(contents: Mapping[str, Any], shape: list[int], spec: TensorSpec) -> Array:
    field = CONTENTS.get(spec.dtype)
    if field is None or list(contents) != [field]:
        expected = f"raw_input_contents{f' or {field}' if field else ''}"
        raise InvalidTensor(spec.name, expected, ", ".join(contents) or "neither")
    check_value_count(len(contents[field]))
    return codec.from_values(list(contents[field]), shape, spec)


def encode(response: InferResponse) -> pb.ModelInferResponse:
    """The message of a response, with the data in `raw_output_contents`."""
    message = pb.ModelInferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id or "",
        outputs=[
            {"name": name, "datatype": DATATYPES[response.specs[name].dtype], "shape": array.shape}
            for name, array in response.outputs.items()
        ],
        raw_output_contents=[response.specs[name].to_wire(array).tobytes() for name, array in response.outputs.items()],
    )
    if response.seed is not None:
        message.parameters["seed"].int64_param = response.seed
    return message


def parameters(part: Any) -> dict[str, Any]:
    """The parameters of a request, input or output as Python values, without unset ones."""
    chosen = {name: (value, value.WhichOneof("parameter_choice")) for name, value in part.parameters.items()}
    return {name: getattr(value, choice) for name, (value, choice) in chosen.items() if choice}
