"""The words of a bundle's README.md."""

from __future__ import annotations

from actserve.bundles.cpp import literals
from actserve.bundles.cpp.header import type_of
from actserve.store.artifact import Manifest

_NEEDS = {"onnx": "ONNX Runtime 1.8 or later", "pt2": "the C++ libraries of PyTorch {torch}"}
_FIND = {
    "onnx": "-DONNXRUNTIME_ROOT=DIR",
    "pt2": "-DCMAKE_PREFIX_PATH=\"$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')\"",
}
_WHERE = {
    "onnx": """
`DIR` is an unpacked release of ONNX Runtime. It can also be the folder of the Python package's library, which has no
headers: `python -c "import onnxruntime; print(onnxruntime.__path__[0] + '/capi')"`. If CMake finds ONNX Runtime as a
package, leave the option out. For another processor, give a toolchain file, and `DIR` for that processor.
""",
    "pt2": """
The program is machine code for the kind of host on which it was compiled. Use the same version of PyTorch there.
""",
}


def words(manifest: Manifest, runtime: str) -> dict[str, str]:
    """The values of README.md's placeholders."""
    signature = manifest.signature
    names = literals.identifiers(spec.name for spec in signature.observations)
    action = signature.action
    return {
        "name": manifest.name,
        "version": str(manifest.version),
        "program": manifest.programs[runtime].file,
        "needs": _NEEDS[runtime].format(torch=manifest.programs[runtime].requires.get("torch", "")),
        "find": _FIND[runtime],
        "where": _WHERE[runtime],
        "assigned": "\n".join(
            f"observations.{name} = {name};  // {type_of(spec)}, {_shape(spec.shape)}"
            for name, spec in zip(names, signature.observations, strict=True)
        ),
        "action": literals.identifiers([action.name])[0],
        "action_type": type_of(action),
        "action_shape": _shape(action.shape),
        "action_bytes": f"{action.item_bytes}",
        "max_batch": str(signature.max_batch),
        "parameters": ", ".join(f"`{each.name}`" for each in signature.parameters) or "this policy has none",
        "item_bytes": str(sum(spec.item_bytes for spec in signature.observations)),
        "observations": ", then ".join(f"`{spec.name}` {spec}" for spec in signature.observations),
        "outputs": ", then ".join(f"`{spec.name}` {spec}" for spec in signature.outputs),
    }


def _shape(shape: tuple[int, ...]) -> str:
    return f"{' x '.join(map(str, shape))} numbers" if shape else "one number"
