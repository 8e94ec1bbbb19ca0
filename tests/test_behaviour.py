"""A policy's behaviour decides the export: draws, dependence on other items, hidden state.

Each policy here was once certified and then served wrong, or refused for the wrong reason.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.nn import functional
from torchrl.data import Categorical
from torchrl.modules import MLP, QValueModule

from actserve import wire
from actserve.cli.commands.artifacts import inspect
from actserve.core.errors import CaptureFailed, InvalidTensor
from actserve.core.settings import Settings
from actserve.core.signature import Arrays
from actserve.engine.policy import Policy
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export import PolicySource, from_module
from actserve_export.capture import capture
from actserve_export.publish import export
from tests import generated

ITEM = torch.zeros(4)
BATCH = np.random.default_rng(0).standard_normal((24, 4)).astype(np.float32)
ONE = TensorDict({"observation": ITEM})


def net() -> nn.Module:
    torch.manual_seed(0)
    return MLP(in_features=4, out_features=3, num_cells=[8])


class Function(nn.Module):
    """A module around a function of (itself, x), with a network, a buffer, and attributes of several kinds."""

    made = 0

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.net = function, net()
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0
        self.first = True
        self.memory: Tensor | None = None
        self.recent: deque[float] = deque(maxlen=1)
        self.other = SimpleNamespace(steps=0)
        self.array = np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def published(source: PolicySource, folder: Path) -> Artifact:
    return export(source, "x", ModelStore(folder), origin="x", runtimes=("onnx",)).artifact


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The text of `actserve inspect`, each sentence on one line."""
    capsys.readouterr()
    inspect("x", str(folder))
    return capsys.readouterr().out


def served(artifact: Artifact, observations: np.ndarray[Any, Any], **options: Any) -> list[Arrays]:
    """Every observation as a request of its own, all at the same time."""

    async def run() -> list[Arrays]:
        policy = Policy.load(artifact, Settings(runtime="onnx", max_wait_ms=60_000))
        policy.start()
        asked = (policy.act({"observation": item[None]}, 1, **options) for item in observations)
        acted = await asyncio.gather(*asked)
        await policy.close()
        return [each.outputs for each in acted]

    return asyncio.run(run())


def epsilon(self: Any, x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x)) < 0.3, torch.randint(3, (len(x),)), self.net(x).argmax(-1))


def denoised(self: Any, x: Tensor) -> Tensor:
    action = torch.randn(x.shape[0], 3)
    for _ in range(3):
        action = action - 0.1 * (action - self.net(x))
    return action


DRAWING = {
    "where": epsilon,
    "bernoulli": lambda self, x: torch.bernoulli(torch.sigmoid(self.net(x))),
    "multinomial": lambda self, x: torch.multinomial(self.net(x).softmax(-1), 1).squeeze(-1),
    "denoising": denoised,
    "gumbel_softmax": lambda self, x: functional.gumbel_softmax(self.net(x), hard=True),
    "dropout": lambda self, x: self.net(functional.dropout(x)),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_policy_that_always_draws_acts_at_random_only(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Function(DRAWING[name])
    artifact = published(from_module(module, ITEM, "identity"), tmp_path)
    assert artifact.manifest.signature.exploration == ("random",)
    shown = inspected(tmp_path, capsys)
    assert "  modes  random\n  draws  noise: " in shown
    assert "random actions have the policy's distribution" in shown
    assert "not shown: a deterministic mode: the policy draws whenever it acts" in shown
    drawn = np.stack([outputs["action"][0] for outputs in served(artifact, np.repeat(BATCH[:1], 400, 0))])
    with torch.no_grad():
        own = module(torch.from_numpy(np.repeat(BATCH[:1], 4000, 0))).numpy()
    assert len(np.unique(drawn)) > 1, "without a seed each request draws its own"
    np.testing.assert_allclose(drawn.mean(0), own.mean(0), atol=0.2)
    once, again = (served(artifact, BATCH[:4], seed=7) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one["action"], other["action"])


MIXING = {
    "largest": lambda self, x: self.net(x / x.abs().max()),
    "mean of all": lambda self, x: self.net(x) * 3 - self.net(x).mean() * torch.tensor([1.0, 2.0, 3.0]),
    "mean over the batch": lambda self, x: self.net(x - x.mean(0)),
    "softmax over the batch": lambda self, x: self.net(x).softmax(0),
    "sorted": lambda self, x: self.net(x.sort(0).values),
    "the one before": lambda self, x: self.net(x.roll(1, 0)),
    # No sample shows these.
    "a rare one": lambda self, x: torch.where((x > 1e3).any(), -self.net(x), self.net(x)),
    "a rare one, in place": lambda self, x: self.net(x).sub_((x > 1e3).sum()),
    "rare pairs": lambda self, x: self.net(x) + ((x[:, None] - x) > 1e3).any(1)[:, :3],
}


@pytest.mark.parametrize("name", MIXING)
def test_a_policy_that_mixes_items_takes_one_a_call(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Function(MIXING[name])
    artifact = published(from_module(module, ITEM, "argmax"), tmp_path)
    assert artifact.manifest.signature.max_batch == 1
    shown = inspected(tmp_path, capsys)
    assert "  modes  deterministic\n  batch  one item a call\n" in shown
    assert (
        "not shown: batches: the programs take one item a call, because an item's result depends on the other" in shown
    )
    for item, outputs in zip(BATCH, served(artifact, BATCH), strict=True):
        with torch.no_grad():
            alone = module(torch.from_numpy(item[None])).numpy()
        np.testing.assert_allclose(outputs["action_value"], alone, rtol=1e-4, atol=1e-4)


def count(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return self.net(x) + self.count


def attribute(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.net(x) * (self.calls % 2)


def flag(self: Any, x: Tensor) -> Tensor:
    scale, self.first = (0 if self.first else 1), False
    return self.net(x) * scale


def memory(self: Any, x: Tensor) -> Tensor:
    self.memory = self.net(x) if self.memory is None else 0.5 * self.memory + self.net(x)
    return self.memory


def entries(self: Any, x: Tensor) -> Tensor:
    self.recent.append(1.0)
    return self.net(x) * sum(self.recent)


def attribute_of_another(self: Any, x: Tensor) -> Tensor:
    self.other.steps += 1
    return self.net(x) * self.other.steps


def array(self: Any, x: Tensor) -> Tensor:
    self.array += 1
    return self.net(x) * float(self.array.sum())


def attribute_of_the_class(self: Any, x: Tensor) -> Tensor:
    type(self).made += 1
    return self.net(x) * type(self).made


HIDING = {
    "recent": entries,
    "other.steps": attribute_of_another,
    "array": array,
    "made": attribute_of_the_class,
    "count": count,
    "calls": attribute,
    "first": flag,
    "memory": memory,
}


@pytest.mark.parametrize("name", HIDING)
def test_hidden_state_is_refused_by_name(name: str) -> None:
    with pytest.raises(CaptureFailed, match=rf"changes .*\b{name}\b.*freeze it .*declare it as state"):
        capture(from_module(Function(HIDING[name]), ITEM, "argmax"))


def test_draws_outside_of_torch_are_refused() -> None:
    policy = Function(lambda self, x: self.net(x) + float(np.random.default_rng().random()))
    with pytest.raises(CaptureFailed, match=r"the same inputs give another action_value each time.*draw with torch"):
        capture(from_module(policy, ITEM, "argmax"))


def test_a_reference_is_not_changed_by_preprocessing_in_place(tmp_path: Path) -> None:
    module = Function(lambda self, x: self.net(x.sub_(0.5).div_(2.0)))
    artifact = published(from_module(module, ITEM, "argmax"), tmp_path)
    assert artifact.manifest.signature.max_batch > 1
    with torch.no_grad():
        expected = module(torch.from_numpy(BATCH.copy())).numpy()
    found = np.concatenate([outputs["action_value"] for outputs in served(artifact, BATCH)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_impossible_actions_have_no_value_and_a_certificate(tmp_path: Path) -> None:
    masked = Function(lambda self, x: self.net(x).masked_fill(torch.tensor([False, True, False]), -torch.inf))
    certificate = published(from_module(masked, ITEM, "argmax"), tmp_path).manifest.certificate
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    assert certificate["programs"]["onnx"]["action_disagreements"] == 0


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_an_observation_that_is_overwritten_is_an_observation() -> None:
    front = TensorDictModule(Doubled(), in_keys=["observation"], out_keys=["observation"])
    behind = (TensorDictModule(net(), ["observation"], ["action_value"]), QValueModule(spec=Categorical(3)))
    signature = capture(PolicySource(TensorDictSequential(front, *behind), ONE)).signature
    assert ([spec.name for spec in signature.observations], signature.state) == (["observation"], ())
    alone = capture(PolicySource(front, ONE)).signature
    assert [spec.name for spec in alone.observations] == ["observation"]


def test_the_previous_action_is_an_observation() -> None:
    policy = TensorDictModule(lambda x, a: (x + a).argmax(-1), ["observation", "action"], ["action"])
    signature = capture(PolicySource(policy, TensorDict({"observation": ITEM, "action": torch.zeros(4)}))).signature
    assert ([spec.name for spec in signature.observations], signature.state) == (["observation", "action"], ())
    assert signature.action.name == "action"


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.GRUCell(4, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        after = self.cell(x, h)
        return after.argmax(-1), after


def test_state_begins_as_the_example_has_it(tmp_path: Path) -> None:
    begin = torch.tensor([1.0, -2.0, 3.0])
    policy = TensorDictModule(Cell(), ["observation", "h"], ["action", ("next", "h")])
    artifact = published(PolicySource(policy, TensorDict({"observation": ITEM, "h": begin})), tmp_path)
    with torch.no_grad():
        _, after = policy.module(torch.from_numpy(BATCH), begin.expand(len(BATCH), 3))
    found = np.concatenate([outputs["h"] for outputs in served(artifact, BATCH)])
    np.testing.assert_allclose(found, after.numpy(), rtol=1e-4, atol=1e-5)


def test_the_action_comes_first_whatever_it_is_called() -> None:
    head = TensorDictModule(lambda x: (x[..., :2], x[..., 2:].exp()), ["observation"], ["loc", "scale"])
    draw = ProbabilisticTensorDictModule(
        in_keys=["loc", "scale"],
        out_keys=["torque"],
        distribution_class=torch.distributions.Normal,
        default_interaction_type="mean",
    )
    signature = capture(PolicySource(TensorDictSequential(head, draw), ONE)).signature
    assert signature.output_names[0] == "torque"


NAMES = ("observation.state", "robot-state", "a/b", "class", "self", "noise", "epsilon", "input", "1st", "ü")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_a_dictionary_can_have(name: str, tmp_path: Path) -> None:
    noisy = TensorDictModule(lambda x: x.argmax(-1) + torch.randint(2, (len(x),)), [name], ["action"])
    artifact = published(PolicySource(noisy, TensorDict({name: ITEM})), tmp_path)
    signature = artifact.manifest.signature
    assert [spec.name for spec in signature.observations] == [name]
    for content_type in (wire.JSON, wire.SAFETENSORS):
        body = wire.encode_request(content_type, wire.Payload({name: BATCH[:1]}, False), signature.request_inputs)
        assert list(wire.decode(content_type, body, signature).tensors) == [name]


def test_one_program_is_enough_unless_both_are_insisted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CaptureFailed("no compiler here")

    monkeypatch.setattr("actserve_export.programs.aoti.compile_program", fail)
    source = from_module(net(), ITEM, "argmax")
    done = export(source, "x", ModelStore(tmp_path), origin="x")
    assert list(done.artifact.manifest.programs) == ["onnx"]
    assert done.artifact.manifest.certificate["missing"] == {"pt2": "no compiler here"}
    assert "no .pt2: no compiler here\n" in inspected(tmp_path, capsys)
    assert not export(source, "x", ModelStore(tmp_path), origin="x").published
    with pytest.raises(CaptureFailed, match="no compiler here"):
        export(source, "y", ModelStore(tmp_path), origin="x", runtimes=("onnx", "pt2"))


def test_numbers_beyond_float64_are_refused_and_infinity_is_a_word() -> None:
    signature = capture(from_module(net(), ITEM, "argmax")).signature
    with pytest.raises(InvalidTensor, match="a larger number"):
        wire.decode(wire.JSON, b'{"observation": [1e400, 0, 0, 0]}', signature)
    found = wire.decode(wire.JSON, b'{"observation": ["Infinity", 0, 0, 0]}', signature)
    assert found.tensors["observation"][0, 0] == np.inf


@pytest.mark.parametrize("seed", range(12))
def test_generated_policies_are_served_as_they_act_or_refused_by_name(seed: int) -> None:
    assert generated.check(seed) in ("served", "refused")
