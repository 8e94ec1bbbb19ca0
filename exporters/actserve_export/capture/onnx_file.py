"""An `.onnx` file -> a program with a Signature. The model that the file was exported from is not needed.

The signature comes from the graph and from one run. The certificate proves less than it does for a policy: the program
in the store gives the same results as the file, and a batch gives the same results as its items alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Array, Arrays, Signature, State, TensorSpec
from actserve.engine import golden
from actserve.store.artifact import Program
from actserve_export.capture.chunks import with_chunk
from actserve_export.capture.company import ITEMS, dependence
from actserve_export.capture.trace import MAX_BATCH
from actserve_export.programs.onnx_graph import (
    add_argmax,
    dtype_of,
    inputs_of,
    opset_of,
    outputs_of,
    read_model,
    refuse_random,
    remove_source_traces,
    write_signature,
)
from actserve_export.programs.onnx_layout import (
    constant_outputs,
    fix_constants,
    move_batch_first,
    open_axes,
    plain,
    tensors_only,
)
from actserve_export.programs.onnx_session import open_session, reason
from actserve_export.sources import samples
from actserve_export.sources.modules import ACTIONS
from actserve_export.sources.onnx_source import OnnxSource

log = logging.getLogger("actserve")
SIZES = (3, 5)  # of the batches that show where an output has its batch


class OnnxPolicy:
    """`model` is the program, and `session` runs the user's file unchanged, as the reference.

    If `scores` names an output, the action is the index of its largest value.
    """

    runtimes: ClassVar[tuple[str, ...]] = ("onnx",)

    def __init__(
        self,
        model: Any,
        session: FileSession,
        signature: Signature,
        scores: str | None,
        rewrites: list[str],
        single_item_reason: str | None,
    ) -> None:
        self.signature, self.single_item_reason = signature, single_item_reason
        self._model, self._session = model, session
        self._scores = scores
        self._rewrites = tuple(rewrites)

    def run_reference(self, inputs: Mapping[str, Any]) -> Arrays:
        """The results of the file for each item alone."""
        results = _one_by_one(self._session, self._names, inputs)
        if self._scores is not None:
            results["action"] = results[self._scores].argmax(-1)
        return results

    @property
    def _names(self) -> list[str]:
        return [spec.name for spec in self.signature.results[self._scores is not None :]]

    def graph(self) -> str:
        bare = onnx.ModelProto()
        bare.CopyFrom(self._model)
        bare.graph.ClearField("initializer")
        text: str = onnx.printer.to_text(bare)
        return text

    def weights_sha256(self) -> str:
        """The hash of the whole program, which includes the weights."""
        return hashlib.sha256(self._data()).hexdigest()

    def _data(self) -> bytes:
        data: bytes = self._model.SerializeToString(deterministic=True)
        return data

    def save(self, folder: Path, programs: Mapping[str, Program]) -> dict[str, Path]:
        return {}

    def build(self, runtime: str, folder: Path, target: Mapping[str, Any]) -> Program:
        file = f"policy.{runtime}"
        (folder / file).write_bytes(self._data())
        return Program(file, {"opset": opset_of(self._model)}, self._rewrites)


def capture_onnx_file(source: OnnxSource) -> OnnxPolicy:
    """Read the file and derive its signature. Raises `UsageError` for an unreadable file, and `CaptureFailed`."""
    if source.action not in ACTIONS:
        raise CaptureFailed(f"expected an action of {' or '.join(ACTIONS)}; got {source.action!r}")
    file = read_model(Path(source.path))
    open_axes(file)
    model = plain(file)
    graph = model.graph
    refuse_random(graph)
    constants = fix_constants(graph, source.constants)
    inputs, axes, single = inputs_of(graph, source.batch_axes)
    fixed = constant_outputs(graph)
    names = outputs_of(graph, source.outputs, source.state, fixed)
    tensors_only(graph, names)
    if len(inputs) == len(source.state) or len(names) == len(source.state):
        raise CaptureFailed("expected an observation and an output that depends on it; the file has none")
    session = FileSession(_session(file), constants, axes)
    single = single or not _takes_batches(session, names, inputs)
    if not single and not source.outputs:
        fixed += _of_sizes_only(graph, session, names, inputs)
        names = [name for name in names if name not in fixed or name in source.state.values()]
    outputs = _outputs(session, names, inputs, (1,) if single else SIZES, source.batch_axes)
    _check_state(inputs, outputs, source.state)
    rewrites = [f"constant: {name} = {_text(array)}" for name, array in constants.items()]
    rewrites += _leave_out(graph, names, fixed, asked=bool(source.outputs))
    rewrites += _move_batch_first(graph, session.axes, [*inputs, *outputs.values()])
    given = [spec for name, spec in outputs.items() if name not in source.state.values()]
    scores = None
    if source.action == "argmax":
        scores = given[0].name
        given.insert(0, add_argmax(graph, given[0]))
        rewrites.append(f"action: the largest of {scores}")
    signature = Signature(
        observations=tuple(spec for spec in inputs if spec.name not in source.state),
        outputs=tuple(given),
        max_batch=1 if single else MAX_BATCH,
        state=tuple(State(spec, source.state[spec.name]) for spec in inputs if spec.name in source.state),
    )
    signature = with_chunk(signature, source.chunk)
    items = samples.collect(source, signature, ITEMS)
    _refuse_draws(session, names, items)
    refusal = "the file takes a batch of 1 only" if single else _batch_refusal(session, names, items, signature, scores)
    if refusal is not None and not single:
        log.warning("exported one item at a time: %s", refusal)
        signature = replace(signature, max_batch=1)
    write_signature(graph, signature)
    remove_source_traces(graph)
    return OnnxPolicy(model, session, signature, scores, rewrites, refusal)


def _of_sizes_only(graph: Any, session: FileSession, names: Sequence[str], inputs: Sequence[TensorSpec]) -> list[str]:
    """The outputs that depend on the sizes of inputs only, and not on the batch's."""
    runs = _runs(session, names, inputs, SIZES)
    of_sizes = constant_outputs(graph, ("Shape", "Size"))
    return [
        name for name in names if name in of_sizes and all(np.array_equal(run[name], runs[0][name]) for run in runs)
    ]


def _outputs(
    session: FileSession,
    names: Sequence[str],
    inputs: Sequence[TensorSpec],
    sizes: Sequence[int],
    batch_axes: Mapping[str, int],
) -> dict[str, TensorSpec]:
    """What the file gives for one item, by name. Notes in `session.axes` where each output has its batch."""
    runs = _runs(session, names, inputs, sizes)
    session.axes |= {name: _output_axis(name, [run[name] for run in runs], sizes, batch_axes) for name in names}
    (alone,) = _runs(session, names, inputs, [1])
    return {name: TensorSpec(name, dtype_of(name, array.dtype), array.shape[1:]) for name, array in alone.items()}


def _runs(
    session: FileSession, names: Sequence[str], inputs: Sequence[TensorSpec], sizes: Sequence[int]
) -> list[Arrays]:
    """The results for batches of these sizes."""
    return [session.run(names, {spec.name: spec.zeros(size) for spec in inputs}) for size in sizes]


def _leave_out(graph: Any, names: Sequence[str], fixed: Sequence[str], *, asked: bool) -> list[str]:
    """Name the outputs that are not in `names`, for the manifest, and unless that was `asked` for, in the log."""
    left_out = [value.name for value in graph.output if value.name not in names]
    for name in [] if asked else left_out:
        log.warning("left out the output %s: no input changes it", name)
    return [f"leave out {name}" + ", which no input changes" * (name in fixed) for name in left_out]


def _move_batch_first(graph: Any, axes: Mapping[str, int], specs: Sequence[TensorSpec]) -> list[str]:
    """Move the batches that are elsewhere to the first axis, and name the tensors, for the manifest."""
    moved = {name: axis for name, axis in axes.items() if axis}
    move_batch_first(graph, moved, {spec.name: len(spec.shape) + 1 for spec in specs})
    return [f"batch first: {name} has it at axis {axis} in the file" for name, axis in moved.items()]


def _session(model: Any) -> Any:
    try:
        return open_session(model.SerializeToString())
    except Exception as error:
        raise CaptureFailed(f"ONNX Runtime refused the file: {reason(error)}") from error


class FileSession:
    """Runs the user's file, unchanged, on tensors with the batch first. `axes` says where the file has the batch."""

    def __init__(self, session: Any, constants: Arrays, axes: dict[str, int]) -> None:
        self.axes = axes
        self._session, self._constants = session, constants

    def run(self, names: Sequence[str], inputs: Mapping[str, Array]) -> Arrays:
        given = {name: _moved(array, 0, self.axes[name]) for name, array in inputs.items()}
        try:
            found = self._session.run(list(names), given | self._constants)
        except Exception as error:
            raise CaptureFailed(f"ONNX Runtime could not run the file: {reason(error)}") from error
        return {name: _moved(array, self.axes.get(name, 0), 0) for name, array in zip(names, found, strict=True)}


def _moved(array: Array, axis: int, target: int) -> Array:
    return array if axis == target else np.ascontiguousarray(np.moveaxis(array, axis, target))


def _takes_batches(session: FileSession, names: Sequence[str], inputs: Sequence[TensorSpec]) -> bool:
    """Whether the file takes more than one item at a time, whatever it declares."""
    try:
        _runs(session, names, inputs, SIZES[:1])
    except CaptureFailed:
        return False
    return True


def _output_axis(name: str, arrays: Sequence[Array], sizes: Sequence[int], said: Mapping[str, int]) -> int:
    """The axis that has the batch's size (the first of several). Raises `CaptureFailed` if `said` says another."""
    shapes = [np.shape(array) for array in arrays]
    axes = [axis for axis, of in enumerate(zip(*shapes, strict=False)) if of == tuple(sizes)]
    axis = said.get(name, axes[0] if axes else 0)
    axis += len(shapes[0]) * (axis < 0)
    if axis not in axes:
        raise CaptureFailed(
            f"{name}: expected an axis for the batch; for {sizes[-1]} items at once the shape is {shapes[-1]} (say "
            "which axis it is, with batch_axes or --batch-axis NAME=AXIS, or leave the output out: name the others, "
            "with outputs or --output)"
        )
    if len({shape[:axis] + shape[axis + 1 :] for shape in shapes}) > 1:
        raise CaptureFailed(f"{name}: expected one axis for the batch; for 3 and 5 items the shapes are {shapes}")
    return axis


def _check_state(inputs: Sequence[TensorSpec], outputs: Mapping[str, TensorSpec], state: Mapping[str, str]) -> None:
    for spec in inputs:
        after = outputs.get(state.get(spec.name, ""))
        if after is not None and str(after) != str(spec):
            raise CaptureFailed(
                f"state: {spec.name} is {spec} an item, but {after.name}, which replaces it, is {after}"
            )


def _text(array: Array) -> str:
    return f"{array.reshape(-1)[0]:g}" if (array == array.reshape(-1)[0]).all() else str(array.tolist())


def _refuse_draws(session: FileSession, names: Sequence[str], items: Arrays) -> None:
    """Raise `CaptureFailed` if the same inputs give other results the second time."""
    first, second = (_one_by_one(session, names, items) for _ in range(2))
    changed = [name for name in names if first[name].tobytes() != second[name].tobytes()]
    if changed:
        raise CaptureFailed(
            f"the same inputs give another {', '.join(changed)} each time: the file draws random numbers, such as a "
            "Dropout in training mode; export it for inference"
        )


def _one_by_one(session: FileSession, names: Sequence[str], inputs: Mapping[str, Array]) -> Arrays:
    return golden.in_batches(lambda item: session.run(names, item), inputs, 1)


def _batch_refusal(
    session: FileSession, names: Sequence[str], items: Arrays, signature: Signature, scores: str | None
) -> str | None:
    """Why the file cannot take batches, or None."""

    def run(batch: Arrays) -> Arrays:
        results = session.run(names, batch)
        return results if scores is None else results | {"action": results[scores].argmax(-1)}

    try:
        return dependence(run, signature, items)
    except CaptureFailed as error:
        return f"with a batch {error.message}"
