"""InferRequest: the fields of an infer request, without its binary data.

Unknown fields and parameters are ignored, as the protocol requires.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actserve.core.errors import MalformedBody
from actserve.core.signature import Arrays, Signature
from actserve.wire import large_json
from actserve.wire.payload import JSON, check_json_size, takes_long

_Source = TypeVar("_Source")

Count = Annotated[int, Field(ge=0, lt=2**64)]
Name = Annotated[str, Field(max_length=128)]  # the limit of Triton for sequence ids


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class _TensorParameters(_Part):
    shared_memory_region: str | None = None
    shared_memory_offset: Count = 0
    shared_memory_byte_size: Count | None = None


class InputParameters(_TensorParameters):
    binary_data_size: Count | None = None


class Input(_Part):
    name: str
    datatype: str
    shape: Annotated[list[Count], Field(max_length=32)]
    parameters: InputParameters | None = None
    data: Any = None  # flat or nested lists, row-major


class OutputParameters(_TensorParameters):
    binary_data: bool | None = None
    classification: Any = None


class Output(_Part):
    name: str
    parameters: OutputParameters | None = None


class Parameters(_Part):
    """The parameters of a request. `priority` is read and has no effect: requests are answered in order."""

    sequence_id: Count | Name = 0  # 0 and "": none
    sequence_start: bool = False
    sequence_end: bool = False
    priority: Count = 0
    timeout: Count = 0  # microseconds for the whole request; 0: no limit
    binary_data_output: bool = False
    seed: Any = None
    exploration: Any = None


class InferRequest(_Part):
    id: str | None = None
    inputs: list[Input]
    outputs: list[Output] | None = None
    parameters: Parameters = Parameters()


class ReceivedRequest(Protocol):
    """An infer request as HTTP or gRPC received it. Its tensors are decoded once the policy is known."""

    @property
    def request(self) -> InferRequest: ...

    def tensors(self, signature: Signature) -> Arrays:
        """The inputs, a valid request: each (B, *shape). Raises `InvalidTensor` or `MalformedBody`."""


def parse_json(document: bytes) -> InferRequest:
    """Raises `MalformedBody`, which names the field."""
    check_json_size(document)
    if not takes_long(JSON, document):
        return _validated(InferRequest.model_validate_json, document)
    try:
        fields = large_json.load(document)
    except ValueError as error:
        raise MalformedBody(f"the JSON part: expected JSON; got something else: {error}"[:400]) from None
    return _validated(InferRequest.model_validate, fields)


def from_fields(fields: Mapping[str, Any]) -> InferRequest:
    """Raises `MalformedBody`, which names the field."""
    return _validated(InferRequest.model_validate, fields)


def _validated(validate: Callable[[_Source], InferRequest], source: _Source) -> InferRequest:
    try:
        return validate(source)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the JSON part"
        raise MalformedBody(f"{where}: {first['msg']}; got {reprlib.repr(first['input'])}"[:400]) from None
