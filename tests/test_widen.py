"""Policies that compute in float16 and bfloat16: the .onnx rounds where the policy does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from actserve_export.capture import capture
from actserve_export.sources import samples
from actserve_export.sources.policy_source import PolicySource


class Chain(nn.Module):
    """Small steps that are lost where a result is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1000
        for _ in range(8):
            y = y + 0.3
        return y - 1000


class InPlace(nn.Module):
    """Writes to a tensor, and to its copy in float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        y += 0.1
        y.mul_(y.sigmoid())
        wide = y.float()
        wide.add_(1.0)
        return (wide + torch.where(y > 0, y, 0.1).float()).to(x.dtype)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [Chain, InPlace, network])
def test_rounding_is_the_policys(make: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    module = TensorDictModule(make().to(dtype), ["x"], ["action"])
    source = PolicySource(module, TensorDict({"x": torch.zeros(4, dtype=dtype)}))
    captured = capture(source)
    assert captured.signature.action.dtype == str(dtype).removeprefix("torch.")
    program = captured.build("onnx", tmp_path, {})
    assert f"{captured.signature.action.dtype} computed in float32 and rounded" in program.rewrites
    inputs = samples.collect(source, captured.signature, 64)
    (ours,) = ort.InferenceSession(tmp_path / program.file).run(["action"], inputs)
    theirs = captured.run_reference(inputs)["action"]
    assert ours.dtype == theirs.dtype
    # Sums and functions differ by float32's own rounding; near the middle of two numbers the other one is the result.
    assert (ours == theirs).mean() > (0.99 if make is Chain else 0.9)
