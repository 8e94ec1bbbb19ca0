"""Server and model metadata, model configuration and repository index of the protocol."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from actserve import __version__
from actserve.core.signature import TensorSpec
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry
from actserve.wire.oip import DATATYPES

EXTENSIONS = [
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "sequence",
    "sequence(string_id)",
    "statistics",
    "system_shared_memory",
]
PLATFORMS = {"onnx": "onnxruntime_onnx", "pt2": "pytorch_aotinductor"}


def server() -> dict[str, Any]:
    return {"name": "actserve", "version": __version__, "extensions": EXTENSIONS}


def model(policy: Policy, registry: Registry) -> dict[str, Any]:
    """Model metadata, with the names of the signature. New state has the name of the input that it replaces."""
    described = registry.describe(policy.name)
    return {
        "name": policy.name,
        "versions": [str(version) for version in described["versions"] if version not in described["refused"]],
        "platform": PLATFORMS[policy.choice.runtime],
        "inputs": [_tensor(spec) for spec in policy.signature.request_inputs],
        "outputs": [_tensor(spec) for spec in policy.signature.answers],
    }


def config(policy: Policy) -> dict[str, Any]:
    """The fields of Triton's ModelConfig that apply here. Shapes are per item, as `max_batch_size` requires."""
    signature = policy.signature
    needed = {spec.name for spec in signature.observations}
    return {
        "name": policy.name,
        "platform": PLATFORMS[policy.choice.runtime],
        "max_batch_size": signature.max_batch,
        "input": [_tensor_config(spec) | {"optional": spec.name not in needed} for spec in signature.request_inputs],
        "output": [_tensor_config(spec) for spec in signature.answers],
    }


def index(registry: Registry, only_ready: bool) -> list[dict[str, str]]:
    """Every version of every policy. UNKNOWN: it is loaded and verified at its first request."""
    found = [entry for name in registry.names for entry in _versions(registry, name)]
    return [entry for entry in found if entry["state"] == "READY" or not only_ready]


def _versions(registry: Registry, name: str) -> Iterable[dict[str, str]]:
    described = registry.describe(name)
    for version in described["versions"]:
        if version == described["version"] or version in described["loaded"]:
            state, reason = "READY", ""
        elif version in described["refused"]:
            state, reason = "UNAVAILABLE", described["refused"][version]["message"]
        else:
            state, reason = "UNKNOWN", "not the live version: loaded at its first request"
        yield {"name": name, "version": str(version), "state": state, "reason": reason}


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": [-1, *spec.shape]}


def _tensor_config(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{DATATYPES[spec.dtype]}", "dims": list(spec.shape)}
