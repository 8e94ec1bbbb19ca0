"""Request and response bodies <-> named arrays. Service and client share this code.

A body holds one item, or a batch of k items with a leading axis; the answer to a batch is a batch. Each encoding is one
file, with `read(body, specs) -> Payload` and, if actserve writes that encoding, `write(payload) -> bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from actserve.core.errors import NotAcceptable, UnsupportedContentType
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.wire import as_json, as_npy, as_png, as_raw, as_safetensors
from actserve.wire import payload as payloads
from actserve.wire.accept_header import quality
from actserve.wire.compression import expand
from actserve.wire.payload import (
    JSON,
    MANY_VALUES,
    NPY,
    PNG,
    RAW,
    SAFETENSORS,
    Body,
    Payload,
    check_complete,
    read_randomness,
)

__all__ = [
    "JSON",
    "NPY",
    "PNG",
    "RAW",
    "SAFETENSORS",
    "VERSION_HEADER",
    "Payload",
    "decode",
    "decode_answer",
    "decoder",
    "encode",
    "encode_request",
    "expand",
    "is_raw",
    "media_type_of",
    "negotiate",
    "raw_type",
    "read_randomness",
    "takes_long",
    "writing_takes_long",
]

VERSION_HEADER = "x-policy-version"  # of the answer: the version that acted

_READERS: dict[str, Callable[[Body, Sequence[TensorSpec]], Payload]] = {
    RAW: as_raw.read,
    JSON: as_json.read,
    SAFETENSORS: as_safetensors.read,
    PNG: as_png.read,
    NPY: as_npy.read,
}
_WRITERS: dict[str, Callable[[Payload, Sequence[TensorSpec]], bytes]] = {
    JSON: as_json.write,  # preferred when Accept ranks several equally
    RAW: as_raw.write,
    SAFETENSORS: as_safetensors.write,
}
_SINGLE_TENSOR = (RAW, PNG, NPY)  # one tensor without metadata


def decode(content_type: str, body: Body, signature: Signature) -> Payload:
    """A request body -> its payload, validated against `signature`. Raises an `InvalidRequest`."""
    return decoder(content_type, signature)(body)


def decoder(content_type: str, signature: Signature, values: bool = True) -> Callable[[Body], Payload]:
    """A function that does what `decode` does. Without `values`, the program must validate the values of the tensors.

    Raises `UnsupportedContentType`, or `InvalidTensor` for another dtype than that of raw bytes.
    """
    media_type = media_type_of(content_type)
    reader = _READERS.get(media_type)
    if reader is None:
        raise UnsupportedContentType(content_type, list(_READERS))
    is_raw(content_type, signature)
    specs = signature.observations if media_type in _SINGLE_TENSOR else signature.request_inputs

    def read(body: Body) -> Payload:
        payload = reader(body, specs)
        signature.validate_request(payload.tensors, values)
        return payload

    return read


def is_raw(content_type: str, signature: Signature) -> bool:
    """Whether a body of this type is the bytes of the only observation. Raises `InvalidTensor` for another dtype."""
    if media_type_of(content_type) != RAW or len(signature.observations) != 1:
        return False
    as_raw.check_dtype(_dtype(content_type), signature.observations[0])
    return True


def takes_long(content_type: str, body: Body) -> bool:
    """Whether `decode` takes so long that the event loop must not wait for it."""
    return payloads.takes_long(media_type_of(content_type), body)


def writing_takes_long(outputs: Mapping[str, Array]) -> bool:
    """The same for `encode`."""
    return sum(array.size for array in outputs.values()) > MANY_VALUES


def encode(
    accept: str, outputs: Mapping[str, Array], specs: Sequence[TensorSpec], batched: bool, seed: int | None = None
) -> tuple[str, bytes]:
    """A policy's outputs, each (k, *shape) -> (content type, body), in the encoding that `accept` prefers.

    `specs` has the spec of each output, and may have others. `seed` is the seed of a random action; JSON and
    safetensors carry it as metadata. Raises `NotAcceptable`.
    """
    content_type = negotiate(accept, len(outputs))
    return content_type, _WRITERS[content_type](Payload(dict(outputs), batched, seed=seed), specs)


def encode_request(content_type: str, payload: Payload, specs: Sequence[TensorSpec]) -> bytes:
    """The client's side of `decode`. Raises `UnsupportedContentType` if that encoding cannot carry the payload."""
    fits_raw = len(payload.tensors) == 1 and not payload.metadata
    supported = [known for known in _WRITERS if known not in _SINGLE_TENSOR or fits_raw]
    if content_type not in supported:
        raise UnsupportedContentType(content_type, supported)
    return _WRITERS[content_type](payload, specs)


def decode_answer(content_type: str, body: Body, specs: Sequence[TensorSpec]) -> Payload:
    """The client's side of `encode`: an answer with exactly the tensors `specs`, and the seed if it has one.

    Raises an `InvalidRequest` for any other answer.
    """
    media_type = media_type_of(content_type)
    if media_type not in _WRITERS:
        raise UnsupportedContentType(content_type, list(_WRITERS))
    payload = _READERS[media_type](body, specs)
    check_complete(payload, specs)
    return payload


@lru_cache(64)  # each client sends the same header every time
def negotiate(accept: str, outputs: int) -> str:
    """The content type with the highest quality in `accept` for this number of outputs; JSON wins ties.

    Raises `NotAcceptable`.
    """
    best, content_type = max(((quality(accept, known), known) for known in _WRITERS), key=lambda pair: pair[0])
    if best <= 0:
        raise NotAcceptable(accept[:200], list(_WRITERS))
    if content_type == RAW and outputs != 1:
        raise NotAcceptable(f"{RAW}, which carries one output, for {outputs} outputs", [JSON, SAFETENSORS])
    return content_type


def raw_type(spec: TensorSpec) -> str:
    """The content type of the raw bytes of one tensor, which says their dtype."""
    return f"{RAW}; dtype={spec.dtype}"


def _dtype(content_type: str) -> str | None:
    """The parameter `dtype`, if any."""
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "dtype":
            return value.strip().strip('"')
    return None


def media_type_of(content_type: str) -> str:
    """A content type without its parameters."""
    return content_type.split(";", 1)[0].strip().lower()
