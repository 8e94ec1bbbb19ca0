"""ExportedProgram <-> one safetensors file: the graph as JSON in its metadata, weights and constants as its tensors.

`torch.export.save` pickles the example inputs and some kinds of tensors, and `torch.export.load` may unpickle anything.
This module uses torch's JSON form of the graph only. Even that form is not safe by itself: torch evaluates the
expressions of sizes and looks up operators by name. Both are therefore checked first.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch._export.serde import schema
from torch._export.serde.serialize import (
    ExportedProgramDeserializer,
    _dict_to_dataclass,
    serialize,
)
from torch.export import ExportedProgram

from actserve.core.errors import CaptureFailed, one_line
from actserve_export.programs.references import ReadFile, read_references, replace_by_references, to_json

PROGRAM = "program.safetensors"  # the file's name in an artifact
FORMAT, FORMAT_WITH_REFERENCES = "1", "2"
_STATE = "state."
_CONSTANT = "constant."
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|_operator\.[a-z]\w*|math\.[a-z]\w*|torch\._?sym_\w+"
)
_EXPRESSION = re.compile(r"[\w\s+\-*/%(),<>=!&|~.']*")
_SYMPY = frozenset(  # the names that sympy.srepr writes
    re.findall(
        r"\w+",
        "Piecewise ExprCondPair Symbol Integer Float Rational Add Mul Pow Min Max And Or Not oo "
        "Equality Unequality StrictLessThan StrictGreaterThan LessThan GreaterThan Eq Ne "
        "positive nonnegative integer real precision True False true false",
    )
)


def save_program(program: ExportedProgram, path: Path, files: Mapping[str, bytes] | None = None) -> None:
    """Write `program` to `path`, without source traces, which name the machine's folders.

    `files` are other files of the artifact, by name. A tensor whose bytes one of them holds is stored as a reference.
    Raises `CaptureFailed` for a program that holds more than tensors and operators.
    """
    tensors: dict[str, torch.Tensor] = {}
    layouts: dict[str, Any] = {}
    for prefix, found in ((_STATE, program.state_dict), (_CONSTANT, program.constants)):
        for name, tensor in found.items():
            if not isinstance(tensor, torch.Tensor):
                raise CaptureFailed(f"{name}: a {type(tensor).__name__} in the program cannot be stored, only tensors")
            # A copy of each: safetensors stores neither shared memory nor strides.
            tensors[prefix + name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            layouts[prefix + name] = {
                "strides": list(tensor.stride()),
                "parameter": isinstance(tensor, torch.nn.Parameter),
                "requires_grad": tensor.requires_grad,
            }
    graph = _graph(program)
    _check(graph)
    metadata = {
        "torch": torch.__version__.partition("+")[0],
        "graph": json.dumps(graph),
        "layouts": json.dumps(layouts),
        "examples": json.dumps(_examples(program)),
    }
    path.write_bytes(pack(tensors, metadata, files or {}))


def pack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], files: Mapping[str, bytes]) -> bytes:
    """The stored form. `metadata` gets the format, and the references into `files` where there are any."""
    stored, references = replace_by_references(tensors, files)
    if not references:
        return save_tensors(stored, {**metadata, "format": FORMAT})
    return save_tensors(stored, {**metadata, "format": FORMAT_WITH_REFERENCES, "references": to_json(references)})


def _no_other_file(name: str) -> NoReturn:
    raise CaptureFailed(f"the stored program refers to {name}, which was not given")


def load_program(data: bytes, read: ReadFile = _no_other_file) -> ExportedProgram:
    """The program in a file's bytes. `read` returns the verified bytes of another file of the same artifact, by name.

    Raises `CaptureFailed` for other data and for a program that this torch cannot read, and what `read` raises.
    """
    try:
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors = load_tensors(data)
        graph, layouts = json.loads(metadata["graph"]), json.loads(metadata["layouts"])
        examples = json.loads(metadata["examples"])
        if metadata["format"] == FORMAT_WITH_REFERENCES:
            tensors |= read_references(metadata["references"], read)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CaptureFailed(f"the stored program cannot be read: {type(error).__name__}: {error}"[:300]) from error
    if metadata["format"] not in (FORMAT, FORMAT_WITH_REFERENCES):
        raise CaptureFailed(
            f"the stored program has format {metadata['format']!r}, this actserve reads up to "
            f"{FORMAT_WITH_REFERENCES!r}; upgrade actserve"
        )
    _check(graph)
    try:
        return _assemble(graph, {name: _restore(tensor, layouts[name]) for name, tensor in tensors.items()}, examples)
    except Exception as error:  # torch raises many types, with no common base
        raise CaptureFailed(
            f"the program, stored by torch {metadata.get('torch')}, cannot be read by torch "
            f"{torch.__version__.partition('+')[0]}: {one_line(error)}"
        ) from error


def _assemble(graph: dict[str, Any], tensors: dict[str, torch.Tensor], examples: list[Any]) -> ExportedProgram:
    state = {name.removeprefix(_STATE): t for name, t in tensors.items() if name.startswith(_STATE)}
    constants = {name.removeprefix(_CONSTANT): t for name, t in tensors.items() if name.startswith(_CONSTANT)}
    arguments = tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for dtype, shape in examples)
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        stored = _dict_to_dataclass(schema.ExportedProgram, graph)
        return ExportedProgramDeserializer().deserialize(stored, state, constants, (arguments, {}))


def _graph(program: ExportedProgram) -> dict[str, Any]:
    """The program without its tensors, as torch's JSON."""
    try:
        stored = serialize(
            program, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
        )
    except Exception as error:
        raise CaptureFailed(f"torch cannot store the program: {one_line(error)}") from error
    graph: dict[str, Any] = json.loads(stored.exported_program)
    for found in _json_objects(graph):
        if "target" in found and "metadata" in found:
            found["metadata"] = {}
    graph["guards_code"] = []  # Python source; compiling does not use it
    return graph


def _examples(program: ExportedProgram) -> list[tuple[str, list[int]]]:
    """(dtype, shape) of each example input. The compiler requires examples and uses only these two properties."""
    arguments, by_name = program.example_inputs or ((), {})
    if by_name or not all(isinstance(tensor, torch.Tensor) for tensor in arguments):
        raise CaptureFailed("expected a program of positional tensors")
    return [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in arguments]


def _restore(tensor: torch.Tensor, layout: dict[str, Any]) -> torch.Tensor:
    if list(tensor.stride()) != layout["strides"]:
        tensor = torch.empty_strided(tensor.shape, layout["strides"], dtype=tensor.dtype).copy_(tensor)
    return torch.nn.Parameter(tensor, layout["requires_grad"]) if layout["parameter"] else tensor


def _check(graph: Any) -> None:
    """Raise `CaptureFailed` unless every operator only computes and every size is plain arithmetic."""
    names = _size_functions()
    for found in _json_objects(graph):
        target = found.get("target")
        if isinstance(target, str) and "inputs" in found and not _OPERATOR.fullmatch(target):
            raise CaptureFailed(f"the program uses {target[:100]!r}, which is no operator of torch's own")
        expression = found.get("expr_str")
        if isinstance(expression, str) and not _is_arithmetic(expression, names):
            raise CaptureFailed(f"the program has a size that is no arithmetic: {expression[:100]!r}")
    if isinstance(graph, dict) and graph.get("guards_code"):
        raise CaptureFailed("the program holds Python source; expected none")


def _is_arithmetic(expression: str, functions: set[str]) -> bool:
    if not _EXPRESSION.fullmatch(expression) or re.search(r"\.\s*[^\W\d]", expression):
        return False
    words = re.findall(r"[^\W\d]\w*", expression)
    return all(word in functions or re.fullmatch(r"[a-z]{1,3}\d+|e\d*", word) for word in words)


def _size_functions() -> set[str]:
    """The names that torch's expressions of sizes use, besides symbols."""
    from torch.utils._sympy import functions

    return {name for name in functions.__all__ if "_" not in name} | _SYMPY


def _json_objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in `value`, itself included."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _json_objects(inner)
