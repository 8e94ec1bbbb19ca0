"""Infer messages <-> named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from actserve.core.errors import InvalidTensor, MalformedBody
from actserve.core.signature import Array, Arrays, Signature, TensorSpec
from actserve.server.protocols.oip import codec, schema
from actserve.server.protocols.oip.infer import InferResponse
from actserve.wire.oip import DATATYPES
from actserve.wire.payload import check_value_count

CONTENTS = {
    "uint8": "uint_contents",
    "int32": "int_contents",
    "int64": "int64_contents",
    "float32": "fp32_contents",
    "float64": "fp64_contents",
    "bool": "bool_contents",
}


class GrpcInferRequest:
    """A ModelInferRequest. Its tensors are in `raw_input_contents`, all of them, or each in its own `contents`.

    Raises `MalformedBody` for a field or a parameter of another kind.
    """

    def __init__(self, message: pb.ModelInferRequest) -> None:
        self.request = schema.check(
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
        self._message = message

    def tensors(self, signature: Signature) -> Arrays:
        """The inputs, a valid request: each (B, *shape). Raises `InvalidTensor` or `MalformedBody`."""
        raw = self._message.raw_input_contents
        if raw and len(raw) != len(self.request.inputs):
            expected = f"{len(self.request.inputs)}, one for each input, or none"
            raise MalformedBody(f"raw_input_contents: expected {expected}; got {len(raw)}")
        found: Arrays = {}
        for index, (given, spec) in enumerate(codec.matched(self.request.inputs, signature)):
            contents = {field.name: values for field, values in self._message.inputs[index].contents.ListFields()}
            if raw and contents:
                raise InvalidTensor(spec.name, "either contents or raw_input_contents", "both")
            if raw:
                # A copy, which is writable, so that no runtime has to make it.
                found[spec.name] = codec.from_bytes(bytearray(raw[index]), given.shape, spec)
            else:
                found[spec.name] = _from_contents(contents, given.shape, spec)
        signature.validate_request(found)
        return found


def _from_contents(contents: Mapping[str, Any], shape: list[int], spec: TensorSpec) -> Array:
    field = CONTENTS[spec.dtype]
    if list(contents) != [field]:
        raise InvalidTensor(spec.name, f"raw_input_contents or {field}", ", ".join(contents) or "neither")
    check_value_count(len(contents[field]))
    return codec.from_values(list(contents[field]), shape, spec)


def written(answer: InferResponse) -> pb.ModelInferResponse:
    """The outputs' data is in `raw_output_contents`."""
    message = pb.ModelInferResponse(
        model_name=answer.model_name,
        model_version=answer.model_version,
        id=answer.id or "",
        outputs=[
            {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": array.shape}
            for name, array in answer.outputs.items()
        ],
        raw_output_contents=[codec.to_bytes(array) for array in answer.outputs.values()],
    )
    if answer.seed is not None:
        message.parameters["seed"].int64_param = answer.seed
    return message


def parameters(part: Any) -> dict[str, Any]:
    """The parameters of a request, an input or an output as Python's own values; without those that are not set."""
    chosen = {name: (value, value.WhichOneof("parameter_choice")) for name, value in part.parameters.items()}
    return {name: getattr(value, choice) for name, (value, choice) in chosen.items() if choice}
