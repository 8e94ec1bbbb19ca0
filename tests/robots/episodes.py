"""Whole episodes: the exported program, with its state fed back, beside the library's own policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import urllib3
from torch import Tensor

from actserve import RemotePolicy
from actserve.core.completion import complete
from actserve.core.settings import Settings
from actserve.core.signature import Arrays
from actserve.engine.runtimes.load import load
from actserve.server.app import create_app
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export.publish import export
from actserve_export.sources.policy_source import PolicySource
from tests.serving import port_of, serving
from tests.waiting import until

ROWS, STEPS = 3, 30
Act = Callable[[dict[str, Tensor], Tensor], Tensor]  # (observations, where episodes begin) -> actions


def published(source: PolicySource, folder: Path) -> Artifact:
    return export(source, "robot", ModelStore(folder), origin="x", runtimes=["onnx"]).artifact


@contextmanager
def serving_policy(source: PolicySource, folder: Path) -> Iterator[RemotePolicy]:
    """A client of a service with the policy, exported."""
    published(source, folder)
    with serving(create_app(Settings(store=str(folder), runtime="onnx"))) as server:
        url = f"http://127.0.0.1:{port_of(server)}"
        until(lambda: urllib3.request("GET", f"{url}/readyz").status == 200)
        with RemotePolicy(url) as client:
            yield client


def assert_same_episodes(artifact: Artifact, act: Act, rows: int = ROWS, begins_at: float = 0.1) -> None:
    """Play `STEPS` steps in several rows, with resets: the program acts as `act` does, which keeps its own state."""
    signature = artifact.manifest.signature
    runtime = load("onnx", artifact)
    rng = np.random.default_rng(0)
    state: Arrays = {}
    seen_actions: list[Any] = []
    for step in range(STEPS):
        observed = {spec.name: spec.sample(rng, rows) for spec in signature.observations}
        begins = np.full(rows, step == 0) if rows == 1 else (rng.random(rows) < begins_at) | (step == 0)
        flags = {"is_init": begins} if signature.is_init else {}
        inputs = complete(signature, observed | state | flags, rows, signature.exploration[0], seed=None).inputs
        given = {spec.name: inputs[spec.name] for spec in signature.inputs}
        result = runtime.run(given)
        with torch.no_grad():
            expected = act(
                {name: torch.from_numpy(array) for name, array in observed.items()}, torch.from_numpy(begins)
            )
        np.testing.assert_allclose(result[signature.action.name], expected.numpy(), atol=1e-4, rtol=1e-4)
        state = {entry.spec.name: result[entry.output] for entry in signature.state}
        seen_actions.append(result[signature.action.name])
    runtime.close()
    assert len(np.unique(np.concatenate(seen_actions), axis=0)) > 1, "or it proves little"
