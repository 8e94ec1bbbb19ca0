"""StepRecord: the stored result of a session's last step: every output, and the state for the next step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actserve.core.completion import step_seed
from actserve.core.signature import Array, Arrays, Signature, TensorSpec
from actserve.engine.policy import Acted


@dataclass(frozen=True)
class StepRecord:
    """The result of step number `step`. Before the first step it is 0, and answer and state are empty."""

    step: int
    seeded: bool  # whether the step drew random numbers
    answer: bytes  # every output, row-major, in the order of the signature
    state: bytes  # every state, likewise

    @classmethod
    def of(cls, step: int, acted: Acted, signature: Signature) -> StepRecord:
        """`acted` is the result for one item."""
        answer = _pack(signature.outputs, acted.outputs)
        state = _pack([state.spec for state in signature.state], acted.outputs)
        return cls(step, acted.seed is not None, answer, state)

    @property
    def size_bytes(self) -> int:
        return len(self.answer) + len(self.state)

    def checksum(self, number: int) -> int:
        """A checksum of the record and of the number of its session."""
        head = b"%d %d %d" % (number, self.step, self.seeded)
        return zlib.crc32(self.state, zlib.crc32(self.answer, zlib.crc32(head)))

    def carried(self, signature: Signature) -> Arrays:
        """The state for the next step, each (1, *shape); empty before the first step."""
        return _unpack([state.spec for state in signature.state], self.state) if self.step else {}

    def acted(self, signature: Signature, seed: int) -> Acted:
        """The answer to the step, without state. `seed` is the seed of the session."""
        outputs = _unpack(signature.outputs, self.answer)
        return Acted(outputs, step_seed(seed, self.step) if self.seeded else None, queue_ns=0, run_ns=0)


def _pack(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> bytes:
    return b"".join(spec.to_wire(arrays[spec.name]).tobytes() for spec in specs)


def _unpack(specs: Sequence[TensorSpec], data: bytes) -> Arrays:
    """Packed bytes -> arrays that own their memory, each (1, *shape)."""
    arrays: Arrays = {}
    offset = 0
    for spec in specs:
        packed = np.ndarray((1, *spec.shape), spec.wire_dtype, data, offset)
        arrays[spec.name] = spec.from_wire(packed).astype(spec.numpy_dtype)
        offset += spec.item_bytes
    return arrays
