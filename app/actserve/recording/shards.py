"""Shards: the Parquet files of a recording, one row for each step.

A shard has the steps of one version of a policy that one worker recorded. Its metadata has the signature, the
environment, the worker, and the number of the shard among those of the worker.

Numbers and small tensors are columns of numbers. Larger tensors are bytes, row-major and little-endian; the signature
has their shapes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from actserve.core.errors import CorruptRecording
from actserve.core.signature import EXPLORE, IS_INIT, Array, Arrays, Signature, TensorSpec
from actserve.engine.recorders import Feedback
from actserve.recording.rows import OBSERVATION, OUTPUT, PARAMETER, STATE, Rows
from actserve.store.artifact import Artifact

FORMAT = 1
METADATA = b"actserve"  # the key of a JSON object
ENDED = b"actserve.ended"  # the key of incomplete episodes: their ids and the step that was dropped
FEEDBACK = b"actserve.feedback"  # the key of the feedback on last steps: ids of episodes, reward and done
SUFFIX = ".parquet"
LIST_ELEMENTS = 64  # tensors with more elements are bytes
COMPRESSION = "zstd"
LEVEL = 1
FACTS = {  # of a step, beside its tensors
    "episode": pa.string(),
    "step": pa.int64(),
    "follows": pa.int64(),
    "time": pa.timestamp("us", tz="UTC"),
    "door": pa.string(),
    "client": pa.string(),
    "seed": pa.int64(),
    "item": pa.int32(),
    "exploration": pa.string(),
    "run_us": pa.int64(),
    "previous_reward": pa.float64(),
    "previous_done": pa.bool_(),
}
_TEXTS = ["episode", "door", "client", "exploration"]
_SIGNATURE = TypeAdapter(Signature)


@dataclass(frozen=True)
class Header:
    """The metadata of a shard."""

    policy: str
    version: int
    runtime: str
    signature: Signature
    environment: dict[str, Any] | None
    writer: str  # the worker
    sequence: int  # of the shard, among those of the worker

    @staticmethod
    def of(artifact: Artifact, runtime: str, writer: str, sequence: int) -> Header:
        manifest = artifact.manifest
        environment = manifest.to_dict()["environment"]
        return Header(manifest.name, manifest.version, runtime, manifest.signature, environment, writer, sequence)

    @property
    def file_name(self) -> str:
        return f"{self.policy}@{self.version}-{self.writer}-{self.sequence:06}{SUFFIX}"

    def to_json(self) -> bytes:
        signature = _SIGNATURE.dump_python(self.signature, mode="json")
        document = {
            "format": FORMAT,
            "policy": self.policy,
            "version": self.version,
            "runtime": self.runtime,
            "signature": signature,
            "signature_sha256": _digest(signature),
            "environment": self.environment,
            "writer": self.writer,
            "sequence": self.sequence,
        }
        return json.dumps(document).encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> Header:
        """Raises `CorruptRecording`."""
        try:
            document = json.loads(data)
            if document["format"] > FORMAT:
                raise CorruptRecording(
                    f"{where}: a newer actserve wrote it (format {document['format']}, this one reads up to {FORMAT}); "
                    "upgrade actserve"
                )
            signature = _SIGNATURE.validate_python(document["signature"])
            if document["signature_sha256"] != _digest(document["signature"]):
                raise CorruptRecording(f"{where}: the signature in its metadata does not match its hash")
            names = ("policy", "version", "runtime", "environment", "writer", "sequence")
            return Header(signature=signature, **{name: document[name] for name in names})
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise CorruptRecording(f"{where}: its metadata cannot be read: {type(error).__name__}") from error


def _digest(signature: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()


# tensors <-> columns


def tensor_columns(signature: Signature) -> dict[str, TensorSpec]:
    """The columns that have tensors."""
    found = {OBSERVATION + spec.name: spec for spec in signature.observations}
    found |= {PARAMETER + parameter.name: parameter.spec for parameter in signature.parameters}
    found |= {IS_INIT.name: IS_INIT} if signature.is_init else {}
    found |= {STATE + state.spec.name: state.spec for state in signature.state}
    return found | {OUTPUT + spec.name: spec for spec in signature.outputs}


def _is_bytes(column: str, spec: TensorSpec) -> bool:
    return column.startswith(STATE) or spec.elements > LIST_ELEMENTS or spec.elements == 0


def _type(column: str, spec: TensorSpec) -> Any:
    """The Arrow type of a column."""
    if _is_bytes(column, spec):
        return pa.binary(max(1, spec.elements * spec.numpy_dtype.itemsize))
    element = pa.from_numpy_dtype(spec.numpy_dtype)
    return element if spec.shape == () else pa.list_(element, spec.elements)


def schema(header: Header) -> Any:
    """The Arrow schema of a shard."""
    tensors = {column: _type(column, spec) for column, spec in tensor_columns(header.signature).items()}
    return pa.schema(list({**FACTS, **tensors}.items()), metadata={METADATA: header.to_json()})


class Columns:
    """Turns rows into record batches of Arrow. A batch is valid until the next one: they share memory."""

    def __init__(self, shard_schema: Any, signature: Signature) -> None:
        self._schema, self._signature = shard_schema, signature
        self._specs = tensor_columns(signature)
        self._memory: dict[str, Array] = {}  # of each column with bytes, (capacity, bytes)

    def batch(self, rows: Sequence[Rows]) -> Any:
        sizes = [len(each.episodes) for each in rows]
        facts = self._facts(rows, sizes)
        arrays = []
        for field in self._schema:
            spec = self._specs.get(field.name)
            if spec is None:
                arrays.append(pa.array(facts[field.name], field.type))
                continue
            parts = [each.tensors.get(field.name) for each in rows]
            to_arrow = self._bytes if _is_bytes(field.name, spec) else self._numbers
            arrays.append(to_arrow(field, spec, parts, sizes))
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def _facts(self, rows: Sequence[Rows], sizes: Sequence[int]) -> dict[str, Any]:
        """The columns beside the tensors."""
        modes = self._signature.exploration
        explored = [each.tensors.get(EXPLORE.name) for each in rows]
        random = np.concatenate([np.zeros(n, bool) if e is None else e for e, n in zip(explored, sizes, strict=True)])
        items = [np.arange(each.first_item, each.first_item + n) for each, n in zip(rows, sizes, strict=True)]
        return {
            "episode": [episode for each in rows for episode in each.episodes],
            "step": np.repeat([each.step for each in rows], sizes),
            "follows": _repeated([each.follows for each in rows], sizes),
            "time": np.repeat([each.time_us for each in rows], sizes),
            "door": _repeated([each.door for each in rows], sizes),
            "client": _repeated([each.client for each in rows], sizes),
            "seed": _repeated([each.seed for each in rows], sizes),
            "item": np.concatenate(items),
            "exploration": np.where(random, "random", "deterministic" if len(modes) > 1 else modes[0]).tolist(),
            "previous_reward": _repeated([each.previous and each.previous.reward for each in rows], sizes),
            "previous_done": _repeated([each.previous and each.previous.done for each in rows], sizes),
            "run_us": np.repeat([each.run_us for each in rows], sizes),
        }

    @staticmethod
    def _numbers(field: Any, spec: TensorSpec, parts: Sequence[Array | None], sizes: Sequence[int]) -> Any:
        """A column of numbers, or of lists of them. Every row has it."""
        given = [spec.zeros(n) if part is None else part for part, n in zip(parts, sizes, strict=True)]
        flat = pa.array(np.concatenate(given).reshape(-1))
        return flat if spec.shape == () else pa.FixedSizeListArray.from_arrays(flat, type=field.type)

    def _bytes(self, field: Any, spec: TensorSpec, parts: Sequence[Array | None], sizes: Sequence[int]) -> Any:
        """A column of bytes. A part that is None is null in all its rows."""
        count, width = sum(sizes), field.type.byte_width
        memory = self._memory.get(field.name)
        if memory is None or len(memory) < count:
            memory = self._memory[field.name] = np.zeros((count, width), np.uint8)
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            if part is not None and spec.elements:
                memory[start : start + size] = np.ascontiguousarray(part).reshape(size, -1).view(np.uint8)
            start += size
        validity = None
        if any(part is None for part in parts):
            known = np.repeat([part is not None for part in parts], sizes)
            validity = pa.py_buffer(np.packbits(known, bitorder="little"))
        return pa.Array.from_buffers(field.type, count, [validity, pa.py_buffer(memory[:count])])


def _repeated(values: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    return [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]


def from_arrow(column: Any, name: str, spec: TensorSpec) -> Array:
    """The inverse: (n, *shape). Null rows are zeros."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    if not _is_bytes(name, spec):
        flat = array if spec.shape == () else array.flatten()
        return np.asarray(flat.to_numpy(zero_copy_only=False), spec.numpy_dtype).reshape(-1, *spec.shape)
    if spec.elements == 0:
        return spec.zeros(len(array))
    size = spec.elements * spec.numpy_dtype.itemsize
    data = array.buffers()[1]
    packed = np.frombuffer(data, np.uint8, len(array) * size, array.offset * size)
    return packed.view(spec.numpy_dtype).reshape(-1, *spec.shape)


class ShardWriter:
    """One shard in the file `path`, which is not to be read until `close`. Raises `OSError` or `pa.ArrowException`."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._schema = schema(header)
        self._columns = Columns(self._schema, header.signature)
        small = [field.name for field in self._schema if field.name in FACTS]
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression=COMPRESSION,
            compression_level=LEVEL,
            use_dictionary=_TEXTS,
            write_statistics=small,
            write_page_checksum=True,
            store_schema=True,
        )

    def write(self, rows: Sequence[Rows]) -> None:
        self._writer.write_batch(self._columns.batch(rows))

    def close(self, ended: Mapping[str, int], feedback: Mapping[str, Feedback]) -> None:
        """Complete the file. `ended` and `feedback` are as in `Recorded`."""
        found = {name: [each.reward, each.done] for name, each in feedback.items()}
        metadata = {ENDED: json.dumps(ended).encode(), FEEDBACK: json.dumps(found).encode()}
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()

    def abandon(self) -> None:
        """Close the file after an error."""
        with suppress(OSError, pa.ArrowException):
            self._writer.close()


def arrays_of(table: Any, signature: Signature) -> Arrays:
    """The tensors of a table by column, each (n, *shape)."""
    return {name: from_arrow(table[name], name, spec) for name, spec in tensor_columns(signature).items()}
