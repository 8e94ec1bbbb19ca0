"""OnnxRuntime: runs `.onnx` programs with ONNX Runtime. The only import of onnxruntime.

A session copies the weights of a model in memory, and the layout of them that its kernels prefer comes on top. Large
models are therefore optimised once into files: the weights, laid out for this host, are mapped by every session of
every worker, and are in memory once.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import onnxruntime as ort

from actserve.core.errors import ActserveError, RuntimeFailure
from actserve.core.signature import Array, TensorSpec
from actserve.engine.malloc import trim
from actserve.engine.runtimes.base import Runtime, brief
from actserve.engine.runtimes.made_once import MadeOnce
from actserve.engine.runtimes.onnx_check import inspect_model
from actserve.engine.runtimes.onnx_weights import align
from actserve.store.artifact import Artifact

log = logging.getLogger("actserve")

LARGE_BYTES = 8 << 20  # smaller programs are loaded faster than files are written
SMALLEST_MAPPED_BYTES = 1024  # smaller tensors stay in the model
MODEL, WEIGHTS = "model.onnx", "weights.bin"

_DTYPES = {
    "uint8": "tensor(uint8)",
    "int8": "tensor(int8)",
    "uint16": "tensor(uint16)",
    "int16": "tensor(int16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(float)",  # as numpy has it
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "bool": "tensor(bool)",
}


class OnnxRuntime(Runtime):
    def __init__(
        self, artifact: Artifact, threads: int, shared: Path | None, session: Any, mapped: MadeOnce | None
    ) -> None:
        super().__init__(artifact.manifest.signature)
        self._artifact = artifact
        self._threads = threads
        self._shared = shared
        self._session = session
        self._mapped = mapped
        self._names = [spec.name for spec in self.signature.graph_results]

    @classmethod
    def load(cls, artifact: Artifact, threads: int, shared: Path | None = None) -> Self:
        runtime = cls(artifact, threads, shared, *_open(artifact, threads, shared))
        try:
            _compare(artifact.label, "input", runtime._session.get_inputs(), runtime.signature.inputs)
            _compare(artifact.label, "output", runtime._session.get_outputs(), runtime.signature.graph_results)
        except RuntimeFailure:
            runtime.close()
            raise
        return runtime

    def with_threads(self, threads: int) -> OnnxRuntime:
        return OnnxRuntime.load(self._artifact, threads, self._shared)

    def prove(self, policy: str, inputs: Mapping[str, Array]) -> None:
        super().prove(policy, inputs)
        if self._mapped is not None:
            # Opened again, in milliseconds: a session keeps the memory that the batches of the golden samples took.
            self._session = None
            self._session = _mapped_session(self._mapped, self._threads)
            trim()

    def _run(self, arrays: list[Array]) -> list[Array]:
        feed = {spec.name: array for spec, array in zip(self.signature.inputs, arrays, strict=True)}
        try:
            outputs: list[Array] = self._session.run(self._names, feed)
        except Exception as error:
            raise RuntimeFailure(f"ONNX Runtime failed: {brief(error)}") from error
        return outputs

    def close(self) -> None:
        self._session = None
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None


def _open(artifact: Artifact, threads: int, shared: Path | None) -> tuple[Any, MadeOnce | None]:
    """(a session of the program, the files that it maps)."""
    record = artifact.manifest.files[artifact.manifest.programs["onnx"].file]
    if shared is not None and record.bytes >= LARGE_BYTES:
        try:
            return _open_mapped(artifact, threads, shared, record.sha256)
        except ActserveError:
            raise
        except Exception as error:
            log.warning("%s: the workers do not share its weights: %s", artifact.label, brief(error))
    data = _read(artifact)
    try:
        return _session(data, _options(threads)), None
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise RuntimeFailure(f"{artifact.label}: ONNX Runtime refused the program: {brief(error)}") from error


def _open_mapped(artifact: Artifact, threads: int, shared: Path, name: str) -> tuple[Any, MadeOnce]:
    mapped = MadeOnce(shared, name, partial(_write_optimized, artifact))
    try:
        return _mapped_session(mapped, threads), mapped
    except Exception:
        mapped.close()
        raise


def _mapped_session(mapped: MadeOnce, threads: int) -> Any:
    options = _options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimised already
    return _session(str(mapped.folder / MODEL), options)


def _write_optimized(artifact: Artifact, folder: Path) -> None:
    """Write the program into `folder` as ONNX Runtime optimises it for this host, with the weights beside it."""
    data = _read(artifact)
    if shutil.disk_usage(folder).free < 2 * len(data):  # some weights are written in two layouts
        raise OSError(f"expected {2 * len(data) / 1e6:,.0f} MB of free space in the temporary folder")
    options = _options(threads=1)
    options.optimized_model_filepath = str(folder / MODEL)
    for name, value in (
        ("optimized_model_external_initializers_file_name", WEIGHTS),
        ("optimized_model_external_initializers_min_size_in_bytes", str(SMALLEST_MAPPED_BYTES)),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(f"session.{name}", value)
    _session(data, options)
    del data
    if (folder / WEIGHTS).exists():  # a model may have none of that size
        align(folder / MODEL, folder / WEIGHTS)
    trim()


def _read(artifact: Artifact) -> bytes:
    """The verified and checked model."""
    data = artifact.read_program("onnx")
    if (reason := inspect_model(data)) is not None:
        raise RuntimeFailure(f"{artifact.label}: actserve refused the .onnx program: {reason}")
    return data


def _options(threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads sleep between calls instead of spinning, so that an idle service uses no CPU.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Refuse ONNX Runtime's own format, which it detects by content.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return options


def _session(model: bytes | str, options: Any) -> Any:
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _compare(label: str, kind: str, nodes: list[Any], specs: tuple[TensorSpec, ...]) -> None:
    """Raises `RuntimeFailure` unless names, dtypes and item shapes of the program's tensors match the signature."""
    found = {node.name: (node.type, tuple(node.shape[1:])) for node in nodes}
    expected = {spec.name: (_DTYPES[spec.dtype], spec.shape) for spec in specs}
    if found != expected:
        raise RuntimeFailure(f"{label}: the .onnx program's {kind}s are {found}; the manifest says {expected}")
