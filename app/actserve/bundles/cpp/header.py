"""signature.h: a signature as constants, and the structs in which callers give observations and get outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actserve.bundles.cpp import literals
from actserve.core.limits import LIMITED
from actserve.core.signature import EXPLORE, IS_INIT, Signature, State, TensorSpec
from actserve.store.artifact import Manifest

_TYPES = {
    "uint8": "std::uint8_t",
    "int8": "std::int8_t",
    "uint16": "std::uint16_t",
    "int16": "std::int16_t",
    "int32": "std::int32_t",
    "int64": "std::int64_t",
    "float32": "float",
    "float64": "double",
}
_DTYPES = {"bool": "boolean"}


def signature(manifest: Manifest, runtime: str) -> str:
    """The content of signature.h."""
    found = manifest.signature
    program = manifest.programs[runtime].file
    device = manifest.programs[runtime].requires.get("device") or "cpu"
    return "".join(
        (
            f"// The signature of {manifest.name}, version {manifest.version}. actserve wrote this file.\n",
            "#pragma once\n\n#include <array>\n#include <cstddef>\n#include <cstdint>\n#include <limits>\n",
            '#include <optional>\n\n#include "actserve/spec.h"\n\nnamespace actserve {\n\n',
            _observations(found.observations),
            _outputs(found.outputs),
            _parameters(found),
            "namespace signature {\n\n",
            f"inline constexpr const char* name = {literals.text(manifest.name)};\n",
            f"inline constexpr int version = {manifest.version};\n",
            f"inline constexpr File file = {literals.file(program, manifest.files[program])};\n",
            f"inline constexpr const char* device = {literals.text(device)};\n",
            f"inline constexpr bool on_cpu = {str(device == 'cpu').lower()};\n",
            f"inline constexpr std::size_t max_batch = {found.max_batch};  // items of a call\n\n",
            _constants(found),
            "}  // namespace signature\n}  // namespace actserve\n",
        )
    )


def _observations(specs: Sequence[TensorSpec]) -> str:
    names = literals.identifiers(spec.name for spec in specs)
    return (
        "// The observations of some items, each back to back and row-major.\nstruct Observations {\n"
        f"{_pointers(names, specs)}\n"
        f"  std::array<const void*, {len(names)}> pointers() const {{ return {{{{{', '.join(names)}}}}}; }}\n}};\n\n"
    )


def _outputs(specs: Sequence[TensorSpec]) -> str:
    names = literals.identifiers(spec.name for spec in specs)
    assigned = "".join(
        f"    {name} = static_cast<const {type_of(spec)}*>(source.output({index}));\n"
        for index, (name, spec) in enumerate(zip(names, specs, strict=True))
    )
    return (
        "// The outputs for some items, the action first. They are valid until the policy is used again.\n"
        f"struct Outputs {{\n{_pointers(names, specs)}\n"
        f"  template <class Source>\n  void assign(const Source& source) {{\n{assigned}  }}\n}};\n\n"
    )


def _pointers(names: Sequence[str], specs: Sequence[TensorSpec]) -> str:
    return "".join(
        f"  const {type_of(spec)}* {name} = nullptr;  {_shape(spec)}\n" for name, spec in zip(names, specs, strict=True)
    )


def _parameters(found: Signature) -> str:
    names = literals.identifiers(parameter.name for parameter in found.parameters)
    fields = "".join(
        f"  float {name} = {literals.single(np.float32(parameter.default))};"
        f"  // {parameter.default:g}; {parameter.spec.range or 'any'}\n"
        for name, parameter in zip(names, found.parameters, strict=True)
    )
    kind = f"std::array<float, {len(names)}>"
    values = f"{{{{{', '.join(names)}}}}}" if names else "{}"
    assigned = "".join(f"    {name} = values[{index}];\n" for index, name in enumerate(names))
    return (
        "// Numbers that the policy takes beside its observations, with their values in training.\n"
        f"struct Parameters {{\n{fields}\n  {kind} values() const {{ return {values}; }}\n"
        f"  void assign([[maybe_unused]] const {kind}& values) {{\n{assigned}  }}\n}};\n\n"
    )


def _constants(found: Signature) -> str:
    inputs, results = found.inputs, found.results
    places = {spec.name: place for place, spec in enumerate(inputs)}
    graph_names = [literals.text(spec.name) for spec in found.graph_results]
    produced = {spec.name: place for place, spec in enumerate(results)}
    states = [
        f"{{{places[state.spec.name]}, {produced[state.output]}, initial_{index}}}"
        for index, state in enumerate(found.state)
    ]
    noises = [
        f"{{{places[noise.spec.name]}, Distribution::{noise.distribution}, {str(noise.always).lower()}}}"
        for noise in found.noise
    ]
    first_parameter = places[found.parameters[0].name] if found.parameters else 0
    return "".join(
        (
            *(_details(f"input_{index}", spec) for index, spec in enumerate(inputs)),
            *(_details(f"result_{index}", spec, bounds=False) for index, spec in enumerate(results)),
            *(_initial(f"initial_{index}", state) for index, state in enumerate(found.state)),
            "\n// What the program takes: observations, state, flags, parameters, noise.\n",
            literals.array("TensorSpec", "inputs", [_spec(f"input_{i}", spec) for i, spec in enumerate(inputs)]),
            literals.array("const char*", "input_names", [literals.text(spec.name) for spec in inputs]),
            f"inline constexpr std::size_t observation_count = {len(found.observations)};\n",
            _optional("is_init_input", places.get(IS_INIT.name) if found.is_init else None),
            _optional("explore_input", places.get(EXPLORE.name) if len(found.exploration) > 1 else None),
            f"inline constexpr std::size_t first_parameter = {first_parameter};\n",
            literals.array("Noise", "noises", noises),
            literals.array("Exploration", "explorations", [f"Exploration::{mode}" for mode in found.exploration]),
            "\n// What it gives: outputs, then the new state.\n",
            literals.array(
                "TensorSpec", "results", [_spec(f"result_{i}", spec, False) for i, spec in enumerate(results)]
            ),
            literals.array("const char*", "result_names", graph_names),
            f"inline constexpr std::size_t output_count = {len(found.outputs)};\n",
            _optional("limited_result", produced.get(LIMITED) if found.limits is not None else None),
            literals.array("State", "states", states),
            "\n",
        )
    )


def _optional(name: str, value: int | None) -> str:
    given = "std::nullopt" if value is None else str(value)
    return f"inline constexpr std::optional<std::size_t> {name} = {given};\n"


def _details(name: str, spec: TensorSpec, bounds: bool = True) -> str:
    """The arrays to which a TensorSpec points."""
    lines = []
    if spec.shape:
        lines.append(f"inline constexpr std::int64_t {name}_shape[] = {{{', '.join(map(str, spec.shape))}}};\n")
    for side, values in (("low", spec.each_low), ("high", spec.each_high)) if bounds else ():
        if np.isfinite(values).any():
            listed = ", ".join(map(literals.number, values.reshape(-1)))
            lines.append(f"inline constexpr double {name}_{side}[] = {{{listed}}};\n")
    return "".join(lines)


def _spec(name: str, spec: TensorSpec, bounds: bool = True) -> str:
    shape = f"{name}_shape" if spec.shape else "nullptr"
    low, high = (
        f"{{{name}_{side}, {values.size}}}" if bounds and np.isfinite(values).any() else "{nullptr, 0}"
        for side, values in (("low", spec.each_low), ("high", spec.each_high))
    )
    dtype = f"DType::{_DTYPES.get(spec.dtype, spec.dtype)}"
    return (
        f"{{{literals.text(spec.name)}, {dtype}, {literals.text(str(spec))}, {shape}, {len(spec.shape)}, "
        f"{spec.elements}, {low}, {high}}}"
    )


def _initial(name: str, state: State) -> str:
    value = np.ascontiguousarray(state.initial_value(1)[0])
    shown = state.initial if isinstance(state.initial, float | int) else "each element has its own"
    size = max(1, value.nbytes)
    return f"inline constexpr unsigned char {name}[{size}] = {{{literals.contents(value)}}};  // {shown}\n"


def type_of(spec: TensorSpec) -> str:
    return _TYPES.get(spec.dtype, spec.dtype)


def _shape(spec: TensorSpec) -> str:
    bounds = f"; {spec.range}" if spec.range else ""
    return f"// {literals.text(spec.name)} ({', '.join(['count', *map(str, spec.shape)])}){bounds}"
