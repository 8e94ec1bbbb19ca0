"""Request and response bodies <-> named arrays: the same code on both ends of the wire.

A body is one item, or a batch of k items with a leading axis. Payload in, items out; batch in, batch out. One file an
encoding: each has `read(body, specs) -> Payload`, and `write(items) -> bytes` where we write it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from actserve.core.errors import NotAcceptable, UnsupportedContentType
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.wire import as_json, as_png, as_raw, as_safetensors
from actserve.wire.accept_header import quality
from actserve.wire.compression import expand
from actserve.wire.payload import JSON, PNG, RAW, SAFETENSORS, Body, Payload, check_complete, read_randomness

__all__ = [
    "JSON",
    "PNG",
    "RAW",
    "SAFETENSORS",
    "Payload",
    "decode",
    "decode_answer",
    "encode",
    "encode_request",
    "expand",
    "negotiate",
    "read_randomness",
]

_READERS: dict[str, Callable[[Body, Sequence[TensorSpec]], Payload]] = {
    RAW: as_raw.read,
    JSON: as_json.read,
    SAFETENSORS: as_safetensors.read,
    PNG: as_png.read,
}
_WRITERS: dict[str, Callable[[Payload], bytes]] = {
    JSON: as_json.write,  # the first among equals in Accept
    RAW: as_raw.write,
    SAFETENSORS: as_safetensors.write,
}
_BARE = (RAW, PNG)  # one observation and nothing beside it


def decode(content_type: str, body: Body, signature: Signature) -> Payload:
    """A request body -> what a program takes. Raises an `InvalidRequest` that says what was expected and what came."""
    essence = _essence(content_type)
    reader = _READERS.get(essence)
    if reader is None:
        raise UnsupportedContentType(content_type, list(_READERS))
    items = reader(body, signature.observations if essence in _BARE else signature.request_inputs)
    signature.validate_request(items.tensors)
    return items


def encode(accept: str, outputs: Mapping[str, Array], batched: bool, seed: int | None = None) -> tuple[str, bytes]:
    """A policy's outputs, each (k, *shape) -> (content type, body), in the encoding that `accept` prefers.

    `seed` is what anything random came from; JSON and safetensors carry it beside the outputs. Raises `NotAcceptable`.
    """
    content_type = negotiate(accept, len(outputs))
    return content_type, _WRITERS[content_type](Payload(dict(outputs), batched, seed=seed))


def encode_request(content_type: str, items: Payload) -> bytes:
    """The client's side of `decode`. Raises `UnsupportedContentType` where that encoding cannot say it all."""
    able = [known for known in _WRITERS if known not in _BARE or (len(items.tensors) == 1 and not items.metadata)]
    if content_type not in able:
        raise UnsupportedContentType(content_type, able)
    return _WRITERS[content_type](items)


def decode_answer(content_type: str, body: Body, specs: Sequence[TensorSpec]) -> Payload:
    """The client's side of `encode`: an answer that has `specs` and nothing else, and the seed where it has one.

    Raises an `InvalidRequest` for anything else.
    """
    essence = _essence(content_type)
    if essence not in _WRITERS:
        raise UnsupportedContentType(content_type, list(_WRITERS))
    items = _READERS[essence](body, specs)
    check_complete(items, specs)
    return items


@lru_cache(64)  # a client's header is always the same
def negotiate(accept: str, outputs: int) -> str:
    """The encoding for an Accept header and so many outputs: the best quality, JSON first among equals. Raises
    `NotAcceptable`."""
    best, content_type = max(((quality(accept, known), known) for known in _WRITERS), key=lambda pair: pair[0])
    if best <= 0:
        raise NotAcceptable(accept[:200], list(_WRITERS))
    if content_type == RAW and outputs != 1:
        raise NotAcceptable(f"{RAW}, which can carry one output, and {outputs} were asked for", [JSON, SAFETENSORS])
    return content_type


def _essence(content_type: str) -> str:
    return content_type.split(";", 1)[0].strip().lower()
