from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.modules import MLP
from typer.testing import CliRunner

from actserve.core.errors import CaptureFailed, UsageError
from actserve.engine import golden
from actserve.engine.runtimes import preflight
from actserve.engine.runtimes.load import load
from actserve.store.local import ModelStore
from actserve_export import PolicySource, cli, from_module, narrow
from actserve_export.capture import capture
from actserve_export.capture.tensordict_policy import TracedPolicy
from actserve_export.programs import aoti
from actserve_export.programs.quantize import quantize as quantization
from actserve_export.programs.rewrites.narrow import layers_in_bfloat16
from actserve_export.programs.rewrites.optimize import optimize
from actserve_export.training.pong_lstm import pong_lstm

HAS_BF16 = bool(set(aoti.BF16_FLAGS) & preflight.this_host().cpu_flags)


def layers() -> PolicySource:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Unflatten(-1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(),
        MLP(in_features=288, out_features=3, num_cells=[64, 64]),
    )  # fmt: skip
    return from_module(network, torch.zeros(64), "argmax")


def narrowed(source: PolicySource) -> tuple[TracedPolicy, torch.export.ExportedProgram, list[str]]:
    captured = capture(source)
    assert isinstance(captured, TracedPolicy)
    program, applied = optimize(captured.program, "pt2", layers_in_bfloat16)
    return captured, program, applied


def test_all_layers_but_the_last_compute_with_16_bits() -> None:
    captured, program, applied = narrowed(layers())
    assert applied[-1] == "bfloat16: 3 of 4 layers with weights"
    inputs = torch.randn(32, 64)
    _, values = program.module()(inputs)
    _, exact = captured.program.module()(inputs)
    assert values.dtype == torch.float32
    difference = (values - exact).abs().max().item()
    assert 0 < difference < 0.05 * exact.abs().max().item()


def test_state_and_the_last_layer_are_computed_with_32_bits() -> None:
    """A rounded state would be rounded again with every step, and rounded values make equals of near equals."""
    _, program, applied = narrowed(pong_lstm())
    assert applied[-1] == "bfloat16: 4 of 5 layers with weights"
    dtypes: dict[str, list[torch.dtype]] = {}
    for node in program.graph.nodes:
        value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], torch.fx.Node) else None
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            dtypes.setdefault(node.target.__name__.partition(".")[0], []).append(value.dtype)
    assert dtypes["conv2d"] == [torch.bfloat16] * 3
    assert dtypes["linear"] == [torch.bfloat16, torch.float32]
    assert dtypes["lstm"] == [torch.float32]


def test_a_policy_of_one_layer_has_nothing_to_narrow(tmp_path: Path) -> None:
    _, _, applied = narrowed(one_layer())
    assert not any(name.startswith("bfloat16") for name in applied)
    answer = CliRunner().invoke(
        cli.commands,
        ["export", "tests.test_bf16:one_layer", "--runtime", "onnx", "--precision", "bf16", "--store", str(tmp_path)],
    )
    assert isinstance(answer.exception, CaptureFailed)
    assert "the last layers stay in float32" in answer.exception.message
    assert list(ModelStore(tmp_path).names()) == ["one-layer"]


def one_layer() -> PolicySource:
    return from_module(nn.Linear(4, 2), torch.zeros(4), "argmax")


def test_a_processor_without_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti, "_host_flags", lambda: {"avx2"})
    captured = capture(layers())
    assert isinstance(captured, TracedPolicy)
    with pytest.raises(CaptureFailed, match="expected a processor with avx512_bf16 or bf16"):
        aoti.compile_program(captured.program, tmp_path / "policy.pt2", bf16=True)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_architecture_on_record_is_the_one_that_is_compiled_for(
    machine: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    march, options = aoti._options(native=False, bf16=bf16)
    assert march == options["cpp.march"]
    assert options.get("freezing", False) == bf16
    assert "cpp.march" not in aoti._options(native=True, bf16=bf16)[1]


def test_both_precisions_at_once_are_refused() -> None:
    answer = CliRunner().invoke(cli.commands, ["export", "pong", "--int8", "--precision", "bf16"])
    assert isinstance(answer.exception, UsageError)


@pytest.mark.skipif(not HAS_BF16, reason="needs a processor with AVX512_BF16")
def test_an_export_publishes_a_program_that_repeats_its_golden_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "AGREEMENT", 0.9)  # a network that was not trained is often undecided
    monkeypatch.setattr(narrow, "SAMPLES", 512)
    wanted = ["export", "tests.test_bf16:layers", "--name", "x", "--runtime", "onnx", "--precision", "bf16"]
    answer = CliRunner().invoke(cli.commands, [*wanted, "--store", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    assert "bf16: " in answer.output
    made = ModelStore(tmp_path).resolve("x-bf16")
    assert list(made.manifest.programs) == ["pt2"]
    assert made.manifest.provenance["narrowed_from"] == "x@1"
    found = made.manifest.certificate["bf16"]
    assert 0.9 <= found["agreement"] <= 1
    assert found["batch_sizes"] == [1, 8, 32]
    assert set(aoti.BF16_FLAGS) & set(made.manifest.programs["pt2"].requires["cpu_flags"])
    runtime = load("pt2", made)
    assert golden.check(made, runtime.run).holds
    exact = load("onnx", ModelStore(tmp_path).resolve("x"))
    inputs = {name: value[:8] for name, value in golden.read(made)[0].items()}
    value = made.manifest.signature.outputs[1].name
    difference = np.abs(runtime.run(inputs)[value] - exact.run(inputs)[value]).max()
    assert 0 < difference <= found["largest_difference"][value] * 1.5
    again = CliRunner().invoke(cli.commands, [*wanted, "--store", str(tmp_path)])
    assert "nothing to do" in again.output
