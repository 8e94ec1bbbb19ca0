"""Chunks: an output that plans several actions, as the source describes it."""

from __future__ import annotations

from dataclasses import replace

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Chunk, Signature, TensorSpec


def with_chunk(signature: Signature, chunk: Chunk | None) -> Signature:
    """`signature` with the chunk that the source describes. Raises `CaptureFailed` if no output is such a chunk."""
    if chunk is None:
        return signature
    found = next((spec for spec in signature.outputs if spec.name == chunk.output), None)
    if found is None or not found.shape or not 1 <= chunk.execute <= found.shape[0]:
        expected = f"an output {chunk.output} of {chunk.execute} or more actions, (horizon, *shape)"
        raise CaptureFailed(f"expected {expected}, as the chunk says; got {', '.join(map(_named, signature.outputs))}")
    return replace(signature, chunk=chunk)


def _named(spec: TensorSpec) -> str:
    return f"{spec.name} {spec}"
