"""StepRecord: the stored result of a session's last step: every output, and the state for the next step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
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
        outputs = acted.outputs
        answer = [spec.to_wire(outputs[spec.name]) for spec in signature.outputs]
        state = [item.spec.to_wire(outputs[item.spec.name]) for item in signature.state]
        return cls(step, acted.seed is not None, _pack(answer), _pack(state))

    @classmethod
    def of_batch(cls, step: int, results: Arrays, item: int, signature: Signature) -> StepRecord:
        """`results` are those of a program without noise, each (B, *shape)."""
        which = slice(item, item + 1)
        answer = [spec.to_wire(results[spec.name][which]) for spec in signature.outputs]
        state = [item.spec.to_wire(results[item.output][which]) for item in signature.state]
        return cls(step, False, _pack(answer), _pack(state))

    @property
    def size_bytes(self) -> int:
        return len(self.answer) + len(self.state)

    def checksum(self, number: int) -> int:
        """A checksum of the record and of the number of its session."""
        head = b"%d %d %d" % (number, self.step, self.seeded)
        return zlib.crc32(self.state, zlib.crc32(self.answer, zlib.crc32(head)))

    def carried(self, signature: Signature, copy: bool = True) -> Arrays:
        """The state for the next step, each (1, *shape); empty before the first step.

        Without `copy`, the arrays share the memory of the record: they are only to be copied from.
        """
        return _unpack([state.spec for state in signature.state], self.state, copy) if self.step else {}

    def acted(self, signature: Signature, seed: int) -> Acted:
        """The answer to the step, without state. `seed` is the seed of the session."""
        outputs = _unpack(signature.outputs, self.answer)
        return Acted(outputs, step_seed(seed, self.step) if self.seeded else None, queue_ns=0, run_ns=0)


def _pack(arrays: Iterable[Array]) -> bytes:
    return b"".join([array.tobytes() for array in arrays])


def _unpack(specs: Sequence[TensorSpec], data: bytes, copy: bool = True) -> Arrays:
    """Packed bytes -> arrays, each (1, *shape). Without `copy` they can be in `data`, and not aligned."""
    arrays: Arrays = {}
    offset = 0
    for spec in specs:
        unpacked = spec.from_wire(np.ndarray((1, *spec.shape), spec.wire_dtype, data, offset))
        arrays[spec.name] = unpacked.astype(spec.numpy_dtype) if copy else unpacked
        offset += spec.item_bytes
    return arrays
