"""Every kind of policy x both programs x each way to act x single and batched: exported, certified, served.

`python -m tests.kinds` writes the results as a table into docs/bring-your-own-policy.md.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from actserve.cli.tools import local_service as local
from actserve.core.signature import Arrays, Exploration
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from tests import kinds, policies
from tests.exported import exported, made_once, merged
from tests.waiting import until

ITEMS = 9
BOTH = ("onnx", "pt2")
# In `make test`; `make test-wide` compiles and exports the others, too.
COMPILED = ("epsilon_greedy", "gru")
SOME = ("cart_pair", "several_observations", "tanh_normal", "cat_frames", "gsde")


ROWS = kinds.KINDS | kinds.OF_LIBRARIES


class Kinds:
    """A service with each of `runtimes` over one store, to which a kind is published when a test first asks for it."""

    def __init__(self, root: Path, urls: dict[str, str], http: urllib3.PoolManager) -> None:
        self.urls = urls  # by runtime
        self._root = root
        self._http = http

    def get(self, kind: str) -> Artifact:
        """The artifact of a kind, once every service has it: a program for each, with its certificate."""
        (made,) = (
            p for p in exported(f"{ROWS[kind].__module__}:{kind}", tuple(self.urls)).root.iterdir() if p.is_dir()
        )
        if not (self._root / "store" / made.name).exists():
            shutil.copytree(made, self._root / "copying" / made.name)
            (self._root / "copying" / made.name).rename(self._root / "store" / made.name)
        for url in self.urls.values():
            until(lambda: self._http.request("GET", f"{url}/policies/{made.name}").status == 200)  # noqa: B023
        return ModelStore(self._root / "store").resolve(made.name)


@pytest.fixture(scope="module")
def published(
    request: pytest.FixtureRequest,
    cart_store: ModelStore,
    tmp_path_factory: pytest.TempPathFactory,
    http: urllib3.PoolManager,
) -> Iterator[Kinds]:
    root = tmp_path_factory.mktemp("kinds")
    store = str(merged([cart_store], root / "store").root)
    environment = {**os.environ, "ACTSERVE_POLL_S": "0.2"}
    with ExitStack() as stack:
        urls = {
            runtime: stack.enter_context(local.serve(store, "--runtime", runtime, environment=environment)).url
            for runtime in request.param
        }
        yield Kinds(root, urls, http)


@pytest.fixture(scope="module")
def http() -> urllib3.PoolManager:
    return urllib3.PoolManager(retries=False, timeout=120)


def ask(http: urllib3.PoolManager, url: str, name: str, document: dict[str, Any], outputs: str) -> dict[str, Any]:
    url = f"{url}/policies/{name}/act?outputs={outputs}"
    response = http.request("POST", url, body=json.dumps(document), headers={"Content-Type": "application/json"})
    answer: dict[str, Any] = json.loads(response.data)
    assert response.status == 200, answer
    return answer


def observations(artifact: Artifact) -> Arrays:
    rng = np.random.default_rng(5)
    made = {}
    for spec in artifact.manifest.signature.observations:
        values = rng.integers(0, 2, (ITEMS, *spec.shape)).astype(spec.numpy_dtype) if spec.dtype == "int64" else None
        made[spec.name] = spec.sample(rng, ITEMS) if values is None else values
        if "mask" in spec.name:
            made[spec.name][:, 0] = True
    return made


@pytest.mark.parametrize(
    ("published", "kind"),
    [
        *(pytest.param(BOTH, kind, marks=[] if kind in COMPILED else pytest.mark.wide) for kind in ROWS),
        *(pytest.param(("onnx",), kind) for kind in SOME),
    ],
    indirect=["published"],
)
def test_a_kind_is_exported_certified_and_served(published: Kinds, http: urllib3.PoolManager, kind: str) -> None:
    artifact = published.get(kind)
    signature, certificate = artifact.manifest.signature, artifact.manifest.certificate
    assert set(certificate["programs"]) == set(published.urls)
    assert ("rollout" in certificate["programs"]["onnx"]) == bool(signature.state)
    assert ("statistics" in certificate) == bool(signature.noise)
    batch = {name: values.tolist() for name, values in observations(artifact).items()}
    outputs = ",".join(signature.output_names)
    for exploration in signature.exploration:
        extra = {"exploration": exploration, "seed": 11}
        found = {
            runtime: ask(http, url, artifact.manifest.name, batch | extra, outputs)
            for runtime, url in published.urls.items()
        }
        for answer in found.values():
            agree(answer, found["onnx"])
        for runtime, url in published.urls.items():
            first = {name: values[0] for name, values in batch.items()}
            alone = ask(http, url, artifact.manifest.name, first | extra, outputs)
            agree(alone, {name: value[0] if name != "seed" else value for name, value in found[runtime].items()})
            kinds.record(kind, runtime, exploration, signature.max_batch)


def agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(np.array(value, float), np.array(other[name], float), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtimes", [("onnx",), pytest.param(BOTH, marks=pytest.mark.wide)])
def test_the_tutorials_recurrent_policy_from_a_users_own_file_answers_like_eager(
    runtimes: tuple[str, ...], tmp_path: Path, http: urllib3.PoolManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from tensordict import TensorDict

    from actserve_export.publish import export
    from actserve_export.targets import load

    shutil.copy(policies.__file__, tmp_path / "robot_policies.py")
    monkeypatch.chdir(tmp_path)
    name, source = load("robot_policies:tutorial_lstm")

    def make(folder: Path) -> None:
        export(source, name, ModelStore(folder), origin="robot_policies:tutorial_lstm", runtimes=runtimes)

    store = made_once("-".join(["robot", *runtimes]), make, [Path(policies.__file__)])
    rng = np.random.default_rng(0)
    for runtime in runtimes:
        with local.serve(store, "--runtime", runtime) as service:
            ours: dict[str, Any] = {}
            theirs = {"hidden0": torch.zeros(2, 256), "hidden1": torch.zeros(2, 256)}
            for step in range(200):
                observation = rng.standard_normal(32).astype(np.float32)
                is_init = step == 0 or bool(rng.random() < 0.05)
                document = {"observation": observation.tolist(), "is_init": is_init, **ours}
                answer = ask(http, service.url, name, document, "action")
                assert answer.keys() == {"action", "hidden0", "hidden1"}
                inputs = {"observation": torch.from_numpy(observation), "is_init": torch.tensor(is_init), **theirs}
                with torch.no_grad():
                    expected = source.policy(TensorDict(inputs))
                np.testing.assert_allclose(answer["action"], expected["action"].numpy(), atol=1e-5)
                ours = {key: answer[key] for key in ("hidden0", "hidden1")}
                theirs = {key: expected[key] for key in ("hidden0", "hidden1")}


@pytest.mark.parametrize("published", [BOTH], indirect=True)
def test_a_thousand_seeded_requests_are_the_same_on_both_runtimes_singly_and_in_mixed_batches(
    published: Kinds, http: urllib3.PoolManager
) -> None:
    name = published.get("epsilon_greedy").manifest.name
    rng = np.random.default_rng(1)
    batches = rng.standard_normal((1000, 4)).astype(np.float32)
    mode: Exploration = "random"
    answers: dict[str, list[int]] = {"onnx": [], "pt2": []}
    for runtime, url in published.urls.items():
        for seed, observation in enumerate(batches):
            document = {"observation": observation.tolist(), "exploration": mode, "seed": seed}
            answers[runtime].append(ask(http, url, name, document, "action")["action"])
    assert answers["onnx"] == answers["pt2"]
    sizes = [int(size) for size in rng.integers(1, 32, 40)]
    for seed, size in enumerate(sizes):
        document = {"observation": batches[seed : seed + 1].repeat(size, 0).tolist(), "exploration": mode, "seed": seed}
        batched = {
            runtime: ask(http, url, name, document, "action")["action"] for runtime, url in published.urls.items()
        }
        assert batched["onnx"] == batched["pt2"]
        assert batched["onnx"][0] == answers["onnx"][seed]


@pytest.mark.parametrize("published", [BOTH], indirect=True)
def test_unseeded_the_rate_of_exploration_is_epsilon(published: Kinds, http: urllib3.PoolManager) -> None:
    name = published.get("epsilon_greedy").manifest.name
    document = {"observation": [[0.3, -0.2, 0.1, 0.5]] * 8000, "exploration": "random"}
    answer = ask(http, published.urls["onnx"], name, document, "action")
    greedy = ask(http, published.urls["onnx"], name, {"observation": [0.3, -0.2, 0.1, 0.5]}, "action")["action"]
    other = ask(http, published.urls["onnx"], name, document, "action")
    assert answer["seed"] != other["seed"]
    rate = np.mean(np.array(answer["action"]) != greedy)
    assert abs(rate - 0.25 * 2 / 3) < 0.02, "epsilon 0.25, and one random action in three is the greedy one"
