"""OnnxRuntime: runs `.onnx` programs with ONNX Runtime. The only import of onnxruntime."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from actserve.core.errors import RuntimeFailure
from actserve.core.signature import Array, Signature, TensorSpec
from actserve.engine.runtimes.base import Runtime, brief
from actserve.engine.runtimes.onnx_check import inspect_model
from actserve.store.artifact import Artifact

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
    def __init__(self, signature: Signature, session: Any) -> None:
        super().__init__(signature)
        self._session = session
        self._names = [spec.name for spec in signature.graph_results]

    @classmethod
    def load(cls, artifact: Artifact, threads: int) -> OnnxRuntime:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads sleep between calls instead of spinning, so that an idle service uses no CPU.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Refuse ONNX Runtime's own format, which it detects by content.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        data = artifact.read_program("onnx")
        if (reason := inspect_model(data)) is not None:
            raise RuntimeFailure(f"{artifact.label}: actserve refused the .onnx program: {reason}")
        try:
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise RuntimeFailure(f"{artifact.label}: ONNX Runtime refused the program: {brief(error)}") from error
        signature = artifact.manifest.signature
        _compare(artifact.label, "input", session.get_inputs(), signature.inputs)
        _compare(artifact.label, "output", session.get_outputs(), signature.graph_results)
        return cls(signature, session)

    def _run(self, arrays: list[Array]) -> list[Array]:
        feed = {spec.name: array for spec, array in zip(self.signature.inputs, arrays, strict=True)}
        try:
            outputs: list[Array] = self._session.run(self._names, feed)
        except Exception as error:
            raise RuntimeFailure(f"ONNX Runtime failed: {brief(error)}") from error
        return outputs

    def close(self) -> None:
        self._session = None


def _compare(label: str, kind: str, nodes: list[Any], specs: tuple[TensorSpec, ...]) -> None:
    """Raises `RuntimeFailure` unless names, dtypes and item shapes of the program's tensors match the signature."""
    found = {node.name: (node.type, tuple(node.shape[1:])) for node in nodes}
    expected = {spec.name: (_DTYPES[spec.dtype], spec.shape) for spec in specs}
    if found != expected:
        raise RuntimeFailure(f"{label}: the .onnx program's {kind}s are {found}; the manifest says {expected}")
