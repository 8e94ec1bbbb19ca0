"""Policies as people write them: what can be exported is, and the rest is refused with the line and what to do."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchrl.modules import MultiAgentMLP

from actserve.core.errors import ActserveError, CaptureFailed
from actserve.engine.runtimes.load import load
from actserve.store.local import ModelStore
from actserve_export import PolicySource, from_module
from actserve_export.capture import capture
from actserve_export.programs.reasons import explain
from actserve_export.publish import export
from actserve_export.targets import find_source
from tests.command_line import actserve

ITEM = torch.zeros(4)
BATCH = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)


class Function(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function, self.net = function, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def decides(self: Any, x: Tensor) -> Any:
    if x.sum() > 0:
        return self.net(x)
    return -self.net(x)


def counts(self: Any, x: Tensor) -> Any:
    return self.net(x)[:, int(x.sum()) % 3]


def leaves_torch(self: Any, x: Tensor) -> Any:
    return self.net(torch.from_numpy(np.tanh(x.numpy())))


REFUSED: dict[Any, str] = {
    decides: r"depends on the values of a tensor \(test_refusals.py, line \d+: if x.sum\(\) > 0:\).*torch.where",
    counts: r"depends on the values of a tensor \(test_refusals.py, line \d+: return self.net\(x\)\[:, int",
    leaves_torch: r"leaves torch for numpy \(test_refusals.py, line \d+: .*x.numpy\(\)\)\)\)\).*torch's functions",
}


def test_a_refusal_is_one_sentence_without_graphs(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureFailed):
        capture(from_module(Function(decides), ITEM, "argmax"))
    assert "def forward" not in capfd.readouterr().err


@pytest.mark.parametrize("function", REFUSED)
def test_what_a_program_cannot_do_is_refused_with_the_line(function: Callable[[Any, Tensor], Any]) -> None:
    with pytest.raises(CaptureFailed, match=REFUSED[function]):
        capture(from_module(Function(function), ITEM, "identity"))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda self, x: self.net(x)[:, :1].squeeze(), r"\[\]"),
        (lambda self, x: self.net(x).argmax(-1).squeeze(0), r"\[\]"),
        (lambda self, x: self.net(x[x[:, 0] > 0]), r"\[0, 3\]"),
        (lambda self, x: self.net(x).mean(), r"\[\]"),
    ],
)
def test_a_batch_that_is_dropped_is_refused(function: Any, shape: str) -> None:
    with pytest.raises(
        CaptureFailed, match=rf"a result for each item of a batch .*got the shape {shape}.*squeeze\(-1\)"
    ):
        capture(from_module(Function(function), ITEM, "identity"))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_and_parameters_without_values_are_refused() -> None:
    for module in (torch.jit.script(nn.Linear(4, 3)), nn.Sequential(torch.jit.trace(nn.Linear(4, 3), ITEM[None]))):
        with pytest.raises(CaptureFailed, match=r"is a TorchScript module, .*export the nn.Module"):
            capture(from_module(module, ITEM, "argmax"))
    with pytest.raises(CaptureFailed, match="weight is on the device meta, without values: load the weights"):
        capture(from_module(nn.Linear(4, 3, device="meta"), ITEM, "argmax"))


def test_an_error_of_the_users_code_keeps_its_reason() -> None:
    with pytest.raises(CaptureFailed, match=r"example: division by zero \(test_refusals.py, line \d+: .*1 / 0"):
        capture(from_module(Function(lambda self, x: 1 / 0), ITEM, "argmax"))
    assert explain(ValueError("\x1b[96mthis\x1b[0m  and\n that")) == "this and that"


def pruned() -> nn.Module:
    module = nn.Linear(4, 3)
    prune.l1_unstructured(module, "weight", 0.5)
    return module


def used(module: nn.Module) -> nn.Module:
    module(ITEM[None])
    return module


class Attending(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 1, 2, 2)
        share = 0.5 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=share).flatten(1)


class Stepping(nn.Module):
    """A recurrent network of torch over a window of observations."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(x.reshape(-1, 2, 2))[0][:, -1]
        return result


IN_EVALUATION_MODE: dict[str, Callable[[], nn.Module]] = {
    "attention": Attending,
    "TransformerEncoderLayer": lambda: nn.Sequential(
        nn.Unflatten(-1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 8, batch_first=True), nn.Flatten()
    ),
    "RNN": lambda: Stepping(nn.RNN(2, 4, num_layers=2, dropout=0.5, batch_first=True)),
    "GRU": lambda: Stepping(nn.GRU(2, 4, num_layers=2, dropout=0.5, batch_first=True)),
    "Dropout": nn.Dropout,
    "Dropout2d": lambda: nn.Sequential(nn.Unflatten(-1, (1, 2, 2)), nn.Dropout2d(), nn.Flatten()),
    "AlphaDropout": nn.AlphaDropout,
    "FeatureAlphaDropout": nn.FeatureAlphaDropout,
    "RReLU": nn.RReLU,
}


@pytest.mark.parametrize("name", IN_EVALUATION_MODE)
def test_what_draws_in_training_only_is_deterministic(name: str) -> None:
    torch.manual_seed(0)
    module = IN_EVALUATION_MODE[name]().eval()
    captured = capture(from_module(module, ITEM, "identity"))
    assert captured.signature.noise == ()
    assert captured.single_item_reason is None
    with torch.no_grad():
        expected = module(torch.from_numpy(BATCH)).numpy()
    np.testing.assert_allclose(captured.run_reference({"observation": BATCH})["action"], expected, atol=1e-5)


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "weight_norm, used": lambda: used(nn.utils.weight_norm(nn.Linear(4, 3))),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "spectral_norm, used": lambda: used(nn.utils.spectral_norm(nn.Linear(4, 3))),
    "parametrized weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "parametrized spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "pruned": lambda: used(pruned()),
    "compiled": lambda: torch.compile(nn.Linear(4, 3)),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_computed_are_exported_as_they_are(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(WEIGHTS[name](), nn.ReLU(), nn.Linear(3, 2)).eval()
    kept = {path: tensor.clone() for path, tensor in module.state_dict().items()}
    source = from_module(module, ITEM, "identity")
    artifact = export(source, "x", ModelStore(tmp_path), origin="x", runtimes=("onnx",)).artifact
    runtime = load("onnx", artifact)
    with torch.no_grad():
        own = module(torch.from_numpy(BATCH)).numpy()
    np.testing.assert_allclose(runtime.run({"observation": BATCH})["action"], own, rtol=1e-4, atol=1e-5)
    runtime.close()
    after = module.state_dict()
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[path], tensor) for path, tensor in kept.items()), "the user's module is not changed"


@pytest.mark.parametrize("example", [np.zeros(4, np.float32), [0.0] * 4, {"observation": np.zeros(4, np.float32)}])
def test_an_example_may_be_arrays_and_numbers(example: Any) -> None:
    observations = capture(from_module(nn.Linear(4, 3), example, "argmax")).signature.observations
    assert [f"{spec.name} {spec}" for spec in observations] == ["observation float32[4]"]
    policy = TensorDictModule(nn.Linear(4, 3), ["observation"], ["action"])
    named: Any = example if isinstance(example, dict) else {"observation": example}
    assert capture(PolicySource(policy, named)).signature.observations == observations


def test_a_policy_that_gives_nan_is_refused(tmp_path: Path) -> None:
    policy = from_module(Function(lambda self, x: self.net(x).log()), ITEM, "identity")
    with pytest.raises(CaptureFailed, match=r"own action is NaN for \d+ of \d+ samples"):
        export(policy, "x", ModelStore(tmp_path), origin="x", runtimes=("onnx",))


def test_a_draw_that_cannot_be_an_input_is_refused_by_name() -> None:
    policy = from_module(Function(lambda self, x: self.net(nn.functional.rrelu(x, training=True))), ITEM, "identity")
    with pytest.raises(CaptureFailed, match="draws with torch's rrelu_with_noise"):
        capture(policy)


def test_an_example_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(CaptureFailed, match="speed: expected a tensor as the example; got str"):
        from_module(nn.Linear(4, 3), {"speed": "fast"}, "argmax")


class Keyed(nn.Module):
    """A module for `TensorDictModule`, whose result is any value."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: None, "another number of results than it has out_keys"),
        (lambda x: (x, x), "another number of results than it has out_keys"),
        (lambda x: {"a": x}, "action: expected a plain tensor; the policy gives TensorDict"),
        (lambda x: "up", "action: expected a plain tensor; the policy gives NonTensor"),
        (lambda x: torch.fft.fft(x), "action: expected one of uint8, .*got complex64: .*convert it in the policy"),
        (lambda x: x.reshape(4), r"reshape\(4\).*it got a batch of \d+ of observation float32\[4\]"),
        (lambda x: x * random.random(), "draws random numbers from Python's random"),
        (lambda x: x + np.random.rand(), "draws random numbers from numpy.random"),
    ],
)
def test_results_that_a_program_cannot_give_are_refused(function: Callable[[Tensor], Any], reason: str) -> None:
    policy = TensorDictModule(Keyed(function), ["observation"], ["action"])
    with pytest.raises(CaptureFailed, match=reason):
        capture(PolicySource(policy, TensorDict({"observation": ITEM})))


def test_inputs_of_other_dtypes_are_refused_before_they_are_run() -> None:
    with pytest.raises(CaptureFailed, match=r"observation: expected one of .*got complex64: .*convert"):
        capture(from_module(nn.Linear(4, 3, dtype=torch.complex64), ITEM.to(torch.complex64), "argmax"))


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_an_example_of_another_dtype_than_the_weights_is_refused(layer: nn.Module, dtype: torch.dtype) -> None:
    name = str(dtype)[6:]
    with pytest.raises(CaptureFailed, match=rf"another dtype than its weights: .*of observation {name}\[4\]"):
        capture(from_module(layer, ITEM.to(dtype), "argmax"))


FACTORIES = """
import torch
from torch import nn
X = torch.zeros(4)
def raises(): raise RuntimeError("no weights")
def ends(): raise SystemExit("give weights")
def nothing(): pass
def kind(): return nn.Linear, X
def weights(): return nn.Linear(4, 3).state_dict(), X
def function(): return (lambda x: x), X
def alone(): return nn.Linear(4, 3)
def needs(size): return nn.Linear(size, 3), X
number = 5
module = nn.Linear(4, 3)
"""


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("made:raises", r"raised RuntimeError: no weights \(made.py, line 5: "),
        ("made:ends", "raised SystemExit: give weights"),
        ("made:nothing", "must return .*got None: does it lack a return"),
        ("made:kind", r"must return .*got \(the class Linear, not an instance of it, Tensor\)"),
        ("made:weights", r"must return .*got \(OrderedDict, Tensor\)"),
        ("made:function", r"must return .*got \(function, Tensor\)"),
        ("made:alone", r"must return .*got a module \(Linear\)"),
        ("made:needs", "called without arguments; give them defaults"),
        ("made:number", "must return .*got int"),
        ("made:module", r"must return .*got a module \(Linear\)"),
        ("made:missing", "cannot be imported: module 'made' has no attribute 'missing'"),
        ("made.py:alone", "leave out .py"),
        ("./made:alone", "expected module:factory, such as"),
        ("wrong_syntax:x", r"SyntaxError: .*wrong_syntax.py, line 1"),
        ("wrong_import:x", r"No module named 'no_such_library' \(wrong_import.py, line 1: import no_such_library\)"),
        ("wrong_end:x", "cannot be imported: it ends the program, with 3"),
        ("no_such_module:x", "cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_a_target_that_gives_no_policy_is_refused_in_a_sentence(
    target: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "made": FACTORIES,
        "wrong_syntax": "def x(:",
        "wrong_import": "import no_such_library",
        "wrong_end": "raise SystemExit(3)",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ActserveError, match=reason):
        find_source(target)


def test_names_that_requests_use_get_an_underscore() -> None:
    signature = capture(from_module(nn.Bilinear(4, 4, 3), {"seed": ITEM, "explore": ITEM}, "argmax")).signature
    assert [spec.name for spec in signature.observations] == ["seed_", "explore_"]
    policy = TensorDictModule(nn.Linear(4, 3), ["observation"], ["session"])
    assert capture(PolicySource(policy, TensorDict({"observation": ITEM}))).signature.action.name == "session_"


class Ensemble(nn.Module):
    """The mean of three networks that run side by side."""

    def __init__(self) -> None:
        super().__init__()
        weights, _ = torch.func.stack_module_state([nn.Linear(4, 3) for _ in range(3)])
        self.weights = nn.ParameterDict({name: nn.Parameter(value) for name, value in weights.items()})
        self.__dict__["empty"] = nn.Linear(4, 3, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        def one(weights: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(self.empty, weights, (x,))

        result: Tensor = torch.vmap(one)(dict(self.weights)).mean(0)
        return result


class Constants(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.vmap(lambda row: row * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.ones(4))(x)


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.expand_as(x)


def agents(centralized: bool, share_params: bool) -> nn.Module:
    return MultiAgentMLP(4, 2, 3, centralized=centralized, share_params=share_params, depth=1, num_cells=8)


SHARING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "agents": (lambda: agents(False, False), (3, 4)),
    "agents that see all": (lambda: agents(True, False), (3, 4)),
    "agents of one network": (lambda: agents(False, True), (3, 4)),
    "agents that see all, of one network": (lambda: agents(True, True), (3, 4)),
    "an ensemble": (Ensemble, (4,)),
    "constants inside of vmap": (Constants, (4,)),
    "an expanded parameter": (Expanded, (4,)),
}


@pytest.mark.parametrize("name", SHARING)
def test_networks_that_share_a_call_are_exported_and_stay_usable(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = SHARING[name]
    module = make()
    batch = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)
    with torch.no_grad():
        own = module(torch.from_numpy(batch)).numpy()
    policy = TensorDictModule(module, [("agents", "observation")], [("agents", "action")])
    source = PolicySource(policy, TensorDict({"agents": {"observation": torch.zeros(shape)}}))
    artifact = export(source, "x", ModelStore(tmp_path), origin="x", runtimes=("onnx",)).artifact
    runtime = load("onnx", artifact)
    np.testing.assert_allclose(runtime.run({"agents_observation": batch})["agents_action"], own, rtol=1e-4, atol=1e-5)
    runtime.close()
    with torch.no_grad():
        np.testing.assert_array_equal(module(torch.from_numpy(batch)).numpy(), own)


@pytest.mark.parametrize("arguments", [("--debug", "export", "missing:x"), ("inspect", "missing", "--debug")])
def test_a_traceback_is_shown_when_it_is_asked_for(arguments: tuple[str, ...], tmp_path: Path) -> None:
    plain = (argument for argument in arguments if argument != "--debug")
    assert "Traceback" in actserve(*arguments, cwd=tmp_path).stderr
    assert "Traceback" not in actserve(*plain, cwd=tmp_path).stderr


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from actserve.cli import main

    def fail() -> None:
        raise KeyError("nobody expected this")

    monkeypatch.setattr(main, "cli", fail)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: KeyError: 'nobody expected this' (unexpected: --debug shows where it was raised)\n"
    )
