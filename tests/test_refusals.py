"""Policies as people write them: what can be exported is, and the rest is refused with the line and what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from actserve.core.errors import CaptureFailed
from actserve.engine.runtimes.load import load
from actserve.store.local import ModelStore
from actserve_export import PolicySource, from_module
from actserve_export.capture import capture
from actserve_export.programs.reasons import explain
from actserve_export.publish import export

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


def test_an_example_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(CaptureFailed, match="speed: expected a tensor as the example; got str"):
        from_module(nn.Linear(4, 3), {"speed": "fast"}, "argmax")


@pytest.mark.parametrize("arguments", [("--debug", "export", "missing:x"), ("export", "missing:x", "--debug")])
def test_a_traceback_is_shown_when_it_is_asked_for(arguments: tuple[str, ...], tmp_path: Path) -> None:
    def said(*command: str) -> str:
        full = [sys.executable, "-m", "actserve", *command]
        return subprocess.run(full, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path).stderr

    assert "Traceback" in said(*arguments)
    assert "Traceback" not in said(*(argument for argument in arguments if argument != "--debug"))


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
