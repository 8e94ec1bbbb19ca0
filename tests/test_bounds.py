"""The bounds that a graph, a space or a spec states are in the signature; other values are the client's error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import urllib3
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from tensordict import TensorDict
from tensordict.nn import InteractionType, NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.nn import functional
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical
from torchrl.modules import (
    MLP,
    AdditiveGaussianModule,
    IndependentNormal,
    OneHotCategorical,
    ProbabilisticActor,
    SafeProbabilisticModule,
    SafeProbabilisticTensorDictSequential,
    TanhNormal,
    TruncatedNormal,
)
from typer.testing import CliRunner

from actserve.cli.commands.artifacts import inspect
from actserve.core.completion import blank_inputs, complete
from actserve.core.errors import ActserveError, CaptureFailed, InvalidTensor, RefusedByProgram
from actserve.core.settings import Settings
from actserve.core.signature import Bound, TensorSpec
from actserve.engine import golden
from actserve.engine.policy import Policy
from actserve.engine.runtimes.load import load
from actserve.server.app import create_app
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export import PolicySource, cli, from_module, from_sb3, narrow
from actserve_export.capture import capture
from actserve_export.programs.quantize import quantize as quantization
from actserve_export.publish import export
from actserve_export.sources import samples
from tests.sb3_models import CHOICE, _model
from tests.serving import port_of, serving
from tests.waiting import until


class Indexing(nn.Module):
    """A module around a function of (itself, x), with tables of 7 and of 3 rows."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.seven, self.three, self.bag = nn.Embedding(7, 4), nn.Embedding(3, 4), nn.EmbeddingBag(7, 4)
        self.head, self.wide = nn.Linear(4, 3), nn.Linear(7, 3)
        self.register_buffer("offsets", torch.tensor([0, 3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def published(source: PolicySource, folder: Path, runtime: str = "onnx") -> Artifact:
    return export(source, "x", ModelStore(folder), origin="x", runtimes=(runtime,)).artifact


def asked(artifact: Artifact, values: Sequence[Any], runtime: Any = "onnx") -> list[Any]:
    """The action for each value, or its error. All are asked at the same time."""

    async def run() -> list[Any]:
        policy = Policy.load(artifact, Settings(runtime=runtime, max_wait_ms=60_000))
        policy.start()
        spec = policy.signature.observations[0]
        given = (policy.act({spec.name: np.array([value], spec.numpy_dtype)}, 1) for value in values)
        answers = await asyncio.gather(*given, return_exceptions=True)
        await policy.close()
        return [each if isinstance(each, BaseException) else each.outputs["action"] for each in answers]

    return asyncio.run(run())


ONE = torch.tensor(0)
TWO = torch.tensor([0, 0])
GRAPHS: dict[str, tuple[Any, Tensor, Bound, Bound]] = {
    "embedding": (lambda m, x: m.head(m.seven(x)), ONE, 0, 6),
    "squeezed": (lambda m, x: m.head(m.seven(x.squeeze(-1))), torch.tensor([0]), 0, 6),
    "cast": (lambda m, x: m.head(m.seven(x.long())), torch.tensor(0, dtype=torch.int32), 0, 6),
    "a number": (lambda m, x: m.head(m.seven(x[:, 0].long())), torch.tensor([0.0, 1.0]), (0, None), (6, None)),
    "pixels": (lambda m, x: m.head(m.seven(x.int()).mean(1)), torch.zeros(5, dtype=torch.uint8), None, 6),
    "one_hot": (lambda m, x: m.wide(functional.one_hot(x, 7).float()), ONE, 0, 6),
    "columns": (lambda m, x: m.head(m.seven(x[:, 0]) + m.three(x[:, 1])), TWO, 0, (6, 2)),
    "index_select": (lambda m, x: m.head(torch.index_select(m.seven.weight, 0, x)), ONE, 0, 6),
    "gather": (lambda m, x: m.wide(torch.eye(7)[None].expand(x.shape[0], 7, 7).gather(1, x[:, None, None].expand(
        x.shape[0], 1, 7))[:, 0]), ONE, 0, 6),
    "brackets": (lambda m, x: m.head(m.seven.weight[x]), ONE, -7, 6),
    "from one": (lambda m, x: m.head(m.seven(x - 1)), torch.tensor(1), 1, 7),
    "one table": (lambda m, x: m.head(m.seven(x + m.offsets).sum(1)), TWO, (0, -3), (6, 3)),
    "bag": (lambda m, x: m.head(m.bag(x)), torch.tensor([0, 1, 2]), 0, 6),
    "clamped": (lambda m, x: m.head(m.seven(x.clamp(0, 6))), ONE, None, None),
    "changed in place": (lambda m, x: m.head(m.seven(x.sub_(1))), torch.tensor(1), 1, 7),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_the_bounds_that_a_graph_states_are_in_the_signature(name: str) -> None:
    function, item, low, high = GRAPHS[name]
    source = from_module(Indexing(function), item, "argmax")
    captured = capture(source)
    (spec,) = captured.signature.observations
    assert (spec.low, spec.high) == (low, high)
    inputs = samples.collect(source, captured.signature, 64)
    spec.validate(inputs["observation"])
    if high == 6 and low == 0:
        assert set(np.unique(inputs["observation"])) == set(range(7))


# The index is computed, so that the signature cannot have its bounds: right values, and wrong ones.
COMPUTED: dict[str, tuple[Any, list[int], list[int]]] = {
    "embedding": (lambda m, x: m.head(m.seven(x // 2)), [0, 13], [-1, -7, 14]),
    "index_select": (lambda m, x: m.head(torch.index_select(m.seven.weight, 0, x * 2)), [0, 3], [-1, -3, 4]),
    "gather": (lambda m, x: m.wide(torch.eye(7).expand(x.shape[0], 7, 7).gather(1, (x * 2)[:, None, None].expand(
        x.shape[0], 1, 7))[:, 0]), [0, 3], [-1, -3, 4]),
}  # fmt: skip


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("pt2", marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_index_out_of_bounds_is_the_clients_error(name: str, runtime: str, tmp_path: Path) -> None:
    function, right, wrong = COMPUTED[name]
    module = Indexing(function)
    artifact = published(from_module(module, ONE, "argmax"), tmp_path, runtime)
    answers = asked(artifact, right + wrong, runtime)
    assert answers[: len(right)] == [module(torch.tensor([x])).argmax(-1).tolist() for x in right]
    for value, answer in zip(wrong, answers[len(right) :], strict=True):
        assert isinstance(answer, RefusedByProgram)
        with pytest.raises((IndexError, RuntimeError)):
            module(torch.tensor([value]))


SPACES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "discrete": (spaces.Discrete(7), [0, 6], [7, 99, -1]),
    "discrete, from 1": (spaces.Discrete(7, start=1), [1, 6], [0, 7]),
    "several": (spaces.MultiDiscrete([3, 5]), [[2, 4]], [[3, 0], [0, 5], [-1, 0]]),
    "several, from 1": (spaces.MultiDiscrete([3, 5], start=[1, 0]), [[2, 4]], [[0, 1]]),
}


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        (DQN, "discrete"),
        (PPO, "several, from 1"),
        *(pytest.param(PPO, name, marks=pytest.mark.wide) for name in SPACES if name != "several, from 1"),
    ],
)
def test_an_observation_outside_of_its_space_is_refused(algorithm: Any, name: str, tmp_path: Path) -> None:
    space, right, wrong = SPACES[name]
    _model(algorithm, space, CHOICE)().save(tmp_path / "model.zip")
    artifact = published(from_sb3(tmp_path / "model.zip"), tmp_path)
    answers = asked(artifact, right + wrong)
    assert all(isinstance(answer, InvalidTensor) for answer in answers[len(right) :])
    assert not any(isinstance(answer, ActserveError) for answer in answers[: len(right)])


def test_the_bounds_of_a_spec_are_in_the_signature() -> None:
    def act(module: Any, x: Tensor) -> Tensor:
        result: Tensor = module.head(x.float().reshape(x.shape[0], -1)[:, :1].expand(x.shape[0], 4))
        return result

    many = MultiCategorical([3, 5])
    for spec, item, bounds in (
        (Categorical(7), ONE, (0, 6)),
        (Composite(observation=Categorical(7)), ONE, (0, 6)),
        (many, TWO, (0, (2, 4))),
        (Bounded(-2, 9, (2,), dtype=torch.int64), TWO, (-2, 9)),
    ):
        source = from_module(Indexing(act), item, "argmax")
        found = capture(PolicySource(source.policy, source.example, spec=spec)).signature.observations[0]
        assert (found.low, found.high) == bounds


@pytest.fixture(scope="module")
def indexing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two policies: one has bounds in its signature; of the other, only the program knows the bounds."""
    folder = tmp_path_factory.mktemp("store")
    store = ModelStore(folder)
    export(from_module(Indexing(GRAPHS["columns"][0]), TWO, "argmax"), "stated", store, origin="x", runtimes=("onnx",))
    computed = Indexing(lambda m, x: m.head(m.seven(x // 2)))
    export(from_module(computed, ONE, "argmax"), "computed", store, origin="x", runtimes=("onnx",))
    return folder


def test_every_encoding_refuses_values_out_of_bounds(indexing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = create_app(Settings(store=str(indexing), runtime="onnx"))
    with serving(app) as server, urllib3.HTTPConnectionPool("127.0.0.1", port_of(server), retries=False) as client:
        until(lambda: app.state.registry.not_ready() is None)
        signature = client.request("GET", "/policies/stated").json()["manifest"]["signature"]
        assert {"low": 0.0, "high": [6.0, 2.0]}.items() <= signature["observations"][0].items()
        raw = {"Content-Type": "application/octet-stream"}
        act = "/policies/stated/act"
        for values, message in (([6, 3], "at most 2 at [1]; got 3"), ([-1, 0], "at least 0; got -1")):
            tensor = {"name": "observation", "datatype": "INT64", "shape": [1, 2], "data": values}
            for answer in (
                client.request("POST", act, json={"observation": values}),
                client.request("POST", act, body=np.array(values).tobytes(), headers=raw),  # the fast path
                client.request("POST", f"{act}?outputs=action_value", body=np.array(values).tobytes(), headers=raw),
            ):
                assert (answer.status, message in answer.data.decode()) == (422, True), answer.data
            answer = client.request("POST", "/v2/models/stated/infer", json={"inputs": [tensor]})
            assert (answer.status, message in answer.data.decode()) == (400, True), "the protocol has no 422"
        answer = client.request("POST", "/policies/computed/act", json={"observation": 14})
        assert (answer.status, answer.json()["error"]["code"]) == (422, "refused_by_program")
        assert client.request("POST", "/policies/computed/act", json={"observation": 13}).status == 200
    inspect("stated", str(indexing))
    assert "takes  observation: int64[2], 0 to 6, 0 to 2" in capsys.readouterr().out


def test_what_only_the_program_notices_is_the_clients_error_and_harms_no_neighbour(indexing: Path) -> None:
    artifact = ModelStore(indexing).resolve("computed")
    answers = asked(artifact, [0, 14, 13, 99, 2])
    assert [isinstance(answer, RefusedByProgram) for answer in answers] == [False, True, False, True, False]
    assert answers[1].message.startswith("computed: the program cannot act on these inputs")
    assert json.dumps(answers[1].detail) == '{"policy": "computed"}'


def test_a_blank_observation_is_within_bounds() -> None:
    spec = TensorSpec("room", "int64", (2,), (1, -3), (6, -1))
    spec.validate(spec.blank(3))
    spec.validate(spec.sample(np.random.default_rng(0), 50))
    assert spec.range == "1 to 6, -3 to -1"


def from_one() -> PolicySource:
    function, item, *_ = GRAPHS["from one"]
    return from_module(Indexing(function), item, "argmax")


def test_blank_inputs_are_within_bounds() -> None:
    signature = capture(from_one()).signature
    assert blank_inputs(signature, 3)["observation"].tolist() == [1, 1, 1]


@pytest.mark.wide
def test_the_trial_run_of_a_program_gets_inputs_within_bounds(tmp_path: Path) -> None:
    assert asked(published(from_one(), tmp_path, "pt2"), [1, 7], "pt2")


def gaussian() -> TensorDictModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), NormalParamExtractor())
    return TensorDictModule(net, ["observation"], ["loc", "scale"])


def saturating() -> TensorDictModule:
    policy = gaussian()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(30)
    return policy


LIMITS = Bounded(-torch.ones(2) * 0.3, torch.ones(2) * 0.3)
KEYS: Any = {"in_keys": ["loc", "scale"], "out_keys": ["action"], "return_log_prob": True}


def safe(distribution: Any, **options: Any) -> Any:
    last = SafeProbabilisticModule(
        **KEYS, **options, distribution_class=distribution, default_interaction_type=InteractionType.RANDOM
    )
    return SafeProbabilisticTensorDictSequential(gaussian(), last)


def choosing(distribution: Any) -> Any:
    torch.manual_seed(0)
    logits = TensorDictModule(nn.Linear(4, 3), ["observation"], ["logits"])
    return ProbabilisticActor(logits, in_keys=["logits"], distribution_class=distribution, return_log_prob=True)


DENSITIES: dict[str, tuple[Callable[[], Any], Any, bool]] = {  # the policy, its distribution, whether it is served
    "normal": (lambda: safe(IndependentNormal), IndependentNormal, True),
    "tanh": (lambda: safe(TanhNormal), TanhNormal, True),
    "truncated": (lambda: safe(TruncatedNormal), TruncatedNormal, True),
    "categorical": (lambda: choosing(torch.distributions.Categorical), torch.distributions.Categorical, True),
    "one-hot": (lambda: choosing(OneHotCategorical), OneHotCategorical, True),
    "projected": (lambda: safe(IndependentNormal, spec=LIMITS, safe=True), IndependentNormal, False),
    "saturating": (
        lambda: ProbabilisticActor(saturating(), **KEYS, distribution_class=TanhNormal), TanhNormal, False
    ),
    "noise after it": (
        lambda: TensorDictSequential(
            safe(IndependentNormal), AdditiveGaussianModule(LIMITS, sigma_init=0.5, sigma_end=0.5)
        ), IndependentNormal, False,
    ),
    "clamped after it": (
        lambda: TensorDictSequential(
            safe(IndependentNormal), TensorDictModule(lambda action: action.clamp(-0.1, 0.1), ["action"], ["action"])
        ), IndependentNormal, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSITIES)
def test_a_log_probability_is_that_of_the_action_that_is_served(name: str) -> None:
    make, distribution, kept = DENSITIES[name]
    captured = capture(PolicySource(make(), TensorDict({"observation": torch.zeros(4)})))
    signature = captured.signature
    assert ("action_log_prob" in signature.output_names) is kept
    assert captured.left_out.startswith("action_log_prob: not the log-probability of the action") is not kept
    observations = {"observation": np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)}
    for mode in signature.exploration if kept else ():
        inputs = complete(signature, observations, 64, mode, 3 if mode == "random" else None).inputs
        tensors = {key: torch.from_numpy(array) for key, array in captured.run_reference(inputs).items()}
        given = {key: tensors[key] for key in ("logits", "loc", "scale") if key in tensors}
        expected = distribution(**given).log_prob(tensors["action"])
        torch.testing.assert_close(tensors["action_log_prob"], expected, rtol=1e-3, atol=1e-3)


def test_the_certificate_says_that_a_log_probability_is_left_out(tmp_path: Path) -> None:
    source = PolicySource(DENSITIES["projected"][0](), TensorDict({"observation": torch.zeros(4)}))
    certificate = published(source, tmp_path).manifest.certificate
    assert "action_log_prob: not the log-probability of the action" in " ".join(certificate["not_shown"])


def test_a_log_probability_that_is_asked_for_and_wrong_is_refused() -> None:
    wanted = PolicySource(DENSITIES["projected"][0](), TensorDict({"observation": torch.zeros(4)}),
                          outputs=("action", "action_log_prob"))  # fmt: skip
    with pytest.raises(CaptureFailed, match=r"action_log_prob: not the log-probability .* leave it out of the outputs"):
        capture(wanted)


def three_layers() -> PolicySource:
    torch.manual_seed(0)
    return from_module(MLP(in_features=4, out_features=3, num_cells=[32, 32]), torch.zeros(4), "argmax")


def test_an_int8_export_publishes_and_measures_both_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "AGREEMENT", 0.9)  # a network that was not trained is often undecided
    monkeypatch.setattr(narrow, "SAMPLES", 1024)
    wanted = ["tests.test_bounds:three_layers", "--name", "x", "--runtime", "onnx", "--int8", "--store", str(tmp_path)]
    answer = CliRunner().invoke(cli.commands, ["export", *wanted])
    assert answer.exit_code == 0, answer.output
    assert "of the actions equal the original's" in answer.output
    store = ModelStore(tmp_path)
    assert {name: store.versions(name) for name in ("x", "x-int8")} == {"x": [1], "x-int8": [1]}
    assert all((tmp_path / name / "1.tuning.json").exists() for name in ("x", "x-int8"))
    made = store.resolve("x-int8")
    assert made.manifest.certificate["int8"]["agreement"] >= 0.9
    assert made.manifest.programs["onnx"].rewrites[-1].startswith("int8: ")
    assert golden.check(made, load("onnx", made).run).holds
