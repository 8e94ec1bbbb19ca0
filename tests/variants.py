"""Versions of a policy that can be told apart by any of their answers: version v acts as the original, plus v."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from actserve.core.completion import complete
from actserve.core.signature import Array, Arrays
from actserve.engine import golden
from actserve.engine.runtimes.onnx_runtime import OnnxRuntime
from actserve.store.artifact import GOLDEN, Artifact
from actserve.store.local import ModelStore


class Variants:
    """Publishes versions of `artifact`, a policy with n discrete actions and an `.onnx`, into `store`."""

    def __init__(self, artifact: Artifact, store: ModelStore) -> None:
        self.name = artifact.manifest.name
        self.store = store
        self._artifact = artifact
        self._runtime = OnnxRuntime.load(artifact, 1)
        self.actions = artifact.manifest.signature.outputs[1].shape[0]
        self._inputs, self._outputs = golden.read(artifact)
        self._made: dict[int, dict[str, bytes]] = {}

    @property
    def observations(self) -> Array:
        """(N, *shape)"""
        return self._inputs[self._artifact.manifest.signature.observations[0].name]

    def action(self, original: int, version: int) -> int:
        """The action of `version` where the original takes `action`."""
        return (original + version) % self.actions

    def episode(self, steps: int) -> list[int]:
        """The original's actions in an episode with these observations in order, repeated."""
        signature = self._artifact.manifest.signature
        name = signature.observations[0].name
        state: Arrays = {}
        actions = []
        for step in range(steps):
            observation = self.observations[step % len(self.observations)][None]
            results = self._runtime.run(complete(signature, {name: observation, **state}, 1).inputs)
            state = {part.spec.name: results[part.output] for part in signature.state}
            actions.append(int(results[signature.action.name][0]))
        return actions

    def publish(self, spoilt: bool = False) -> int:
        """The next version's number. `spoilt`: it does not do what its golden samples say."""
        version = max(self.store.versions(self.name) if self.name in self.store.names() else [0]) + 1
        shift = version % self.actions
        if shift not in self._made:
            self._made[shift] = self._make(shift)
        files = self._made[shift]
        if spoilt:
            files = files | {GOLDEN: self._make((shift + 1) % self.actions)[GOLDEN]}
        manifest = self._artifact.manifest
        programs = {"onnx": replace(manifest.programs["onnx"], file="policy.onnx")}
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            paths = {name: Path(folder, name) for name in files}
            return self.store.publish(replace(manifest, programs=programs), paths).manifest.version

    def _make(self, shift: int) -> dict[str, bytes]:
        model = onnx.load_model_from_string(self._artifact.read(self._artifact.manifest.programs["onnx"].file))
        action = self._artifact.manifest.signature.action
        for node in model.graph.node:
            node.output[:] = ["original" if name == action.name else name for name in node.output]
        for name, value in (("shift", shift), ("actions", self.actions)):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, action.numpy_dtype), name))
        model.graph.node.append(onnx.helper.make_node("Add", ["original", "shift"], ["shifted"]))
        model.graph.node.append(onnx.helper.make_node("Mod", ["shifted", "actions"], [action.name]))
        outputs = self._outputs | {action.name: (self._outputs[action.name] + shift) % self.actions}
        return {"policy.onnx": model.SerializeToString(), GOLDEN: golden.save(self._inputs, outputs)}
