from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actserve_export.capture import TracedPolicy, capture
from actserve_export.programs import onnx
from actserve_export.programs.onnx_session import open_session
from actserve_export.programs.rewrites.optimize import fold, optimize
from actserve_export.training import bundled
from tests.policies import cart

aten = torch.ops.aten
BATCH = torch.export.Dim("batch", min=1, max=256)


def export(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module, (example,), dynamic_shapes=({0: BATCH},), strict=False)


def targets(program: torch.export.ExportedProgram) -> set[Any]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def screens(count: int, height: int = 210, width: int = 160) -> Tensor:
    generator = torch.Generator().manual_seed(height * width + count)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


class Pictures(nn.Module):
    """The tutorial's preprocessing by other means: (B, H, W, 3) -> (B, 1, h, w) or, without grey, (B, 3, h, w)."""

    def __init__(self, size: tuple[int, int], grey: bool = True, planes: bool = False, shift: float = 0.0) -> None:
        super().__init__()
        self.size, self.grey, self.planes, self.shift = size, grey, planes, shift

    def forward(self, pixels: Tensor) -> Tensor:
        pictures = (pixels if self.planes else pixels.permute(0, 3, 1, 2)) / 255
        if self.shift:
            pictures = (pictures - self.shift).relu()
        pictures = nn.functional.interpolate(pictures, self.size, mode="nearest")
        if not self.grey:
            return pictures
        red, green, blue = pictures.unbind(1)
        return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


@pytest.fixture(scope="module")
def captured() -> TracedPolicy:
    return capture(bundled.policy("pong"))


@pytest.fixture(scope="module")
def optimized(captured: TracedPolicy) -> TracedPolicy:
    return replace(captured, program=optimize(captured.program)[0])


def test_the_rewrites_are_named(captured: TracedPolicy) -> None:
    _, applied = optimize(captured.program)
    assert "pick pixels before converting them: 210x160 -> 84x84" in applied
    assert "columns, scale and greyscale in one product: 120 -> 21" in applied
    assert any(name.startswith("drop what no output needs") for name in applied)
    _, tidied = optimize(captured.program, "pt2")
    assert tidied
    assert not any(name.startswith(("pick", "columns")) for name in tidied)


def test_the_batch_stays_symbolic_and_the_signature_as_it_was(captured: TracedPolicy, optimized: TracedPolicy) -> None:
    before, after = captured.program, optimized.program
    assert after.graph_signature.user_inputs == before.graph_signature.user_inputs
    assert [(r.lower, r.upper) for r in after.range_constraints.values()] == [(1, 256)]
    (pixels,) = [node for node in after.graph.nodes if node.name == "pixels"]
    assert isinstance(pixels.meta["val"].shape[0], torch.SymInt)
    assert aten.upsample_nearest2d.vec not in targets(after)
    assert aten.gather.default not in targets(after)


@pytest.mark.parametrize("count", [1, 2, 33])
def test_the_graph_gives_the_same_answers(captured: TracedPolicy, optimized: TracedPolicy, count: int) -> None:
    batch = screens(count)
    action, values = optimized.program.module()(batch)
    expected = captured.run_reference({"pixels": batch.numpy()})
    np.testing.assert_array_equal(action.numpy(), expected["action"])
    np.testing.assert_allclose(values.detach().numpy(), expected["action_value"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (210, 160, (84, 84)),
        (250, 160, (84, 84)),
        (251, 163, (84, 84)),
        (97, 101, (31, 97)),
        (64, 64, (64, 64)),
        (210, 160, (1, 1)),
        (90, 90, (30, 45)),
    ],
)
@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize("planes", [True, False])
def test_any_nearest_resize_of_bytes(height: int, width: int, size: tuple[int, int], grey: bool, planes: bool) -> None:
    check_picks(Pictures(size, grey, planes), height, width, planes)


@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize("planes", [True, False])
def test_steps_before_the_resize_are_done_after_it(grey: bool, planes: bool) -> None:
    check_picks(Pictures((31, 97), grey, planes, shift=0.25), 97, 101, planes)


def check_picks(module: Pictures, height: int, width: int, planes: bool) -> None:
    """The rewritten program gives what the module gives."""
    pixels = screens(4, height, width)
    pixels = pixels.permute(0, 3, 1, 2).contiguous() if planes else pixels
    program, applied = optimize(export(module, pixels))
    assert any(name.startswith("pick") for name in applied)
    found, expected = program.module()(pixels[:3]), module(pixels[:3])
    torch.testing.assert_close(found, expected, atol=2e-7 if module.grey else 0.0, rtol=0.0)


def test_picks_are_exact_where_nothing_else_changes() -> None:
    module = Pictures((84, 84), grey=False)
    program, _ = optimize(export(module, screens(4, 251, 163)))
    assert torch.equal(program.module()(screens(3, 251, 163)), module(screens(3, 251, 163)))
    assert aten.upsample_nearest2d.vec not in targets(program)


class Leaky(Pictures):
    """Greyscale with a part that is also used elsewhere."""

    def forward(self, pixels: Tensor) -> Tensor:
        red, green, blue = nn.functional.interpolate(pixels.permute(0, 3, 1, 2) / 255, self.size).unbind(1)
        half = 0.5 * red + 0.5 * green
        return (half + 0.1 * blue) * half


def test_a_sum_that_is_used_twice_is_not_folded() -> None:
    program, applied = optimize(export(Leaky((84, 84)), screens(4)))
    assert any(name.startswith("pick pixels") for name in applied)
    assert not any("product" in name for name in applied)
    assert torch.equal(program.module()(screens(3)), Leaky((84, 84))(screens(3)))


class Enlarged(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.interpolate(pixels.permute(0, 3, 1, 2) / 255, (256, 256))


class Smooth(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.interpolate(pixels.permute(0, 3, 1, 2) / 255, (84, 84), mode="bilinear")


class OfFloats(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.interpolate(pixels.permute(0, 3, 1, 2), (84, 84))


class Shared(nn.Module):
    """The converted screen is wanted whole as well."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        converted = pixels.permute(0, 3, 1, 2) / 255
        return nn.functional.interpolate(converted, (84, 84)), converted.mean((1, 2, 3))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return pixels / 255 + self.calls


@pytest.mark.parametrize("module", [Enlarged(), Smooth(), OfFloats(), Shared(), InPlace()], ids=lambda m: str(m)[:-2])
def test_what_is_not_known_is_left_untouched(module: nn.Module) -> None:
    example = screens(4).float() if isinstance(module, OfFloats) else screens(4)
    program = export(module, example)
    assert optimize(program) == (program, [])


def test_a_policy_without_pictures_is_only_tidied() -> None:
    captured = capture(cart())
    program, applied = optimize(captured.program)
    assert not any("pick" in name for name in applied)
    batch = torch.randn(5, 4)
    action, values = program.module()(batch)
    expected = captured.run_reference({"observation": batch.numpy()})
    np.testing.assert_array_equal(action.numpy(), expected["action"])
    np.testing.assert_array_equal(values.detach().numpy(), expected["action_value"])


def test_nothing_is_left_for_a_second_time(optimized: TracedPolicy) -> None:
    assert optimize(optimized.program) == (optimized.program, [])


class Twice(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels / 255).sum(-1) * (pixels / 255).sum(-1) + (pixels / 255.5).sum(-1)


def test_what_is_computed_twice_is_shared() -> None:
    program, applied = optimize(export(Twice(), screens(4)))
    assert applied == ["share what is computed twice: 2"]
    assert torch.equal(program.module()(screens(2)), Twice()(screens(2)))


class IntegerAndFloat(nn.Module):
    """1 and 1.0 are equal in Python, and give another dtype here; torch's `CSEPass` merges the two sums."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels + 1, pixels + 1.0


def test_numbers_of_another_type_are_not_the_same() -> None:
    program, applied = optimize(export(IntegerAndFloat(), screens(4)))
    assert applied == []
    assert [result.dtype for result in program.module()(screens(2))] == [torch.uint8, torch.float32]


class WrittenTo(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        first, second = torch.zeros(3), torch.zeros(3)
        first.add_(1.0)
        return pixels + first + 10 * second


def test_what_is_written_to_is_not_shared() -> None:
    program, applied = optimize(export(WrittenTo(), screens(4)))
    assert not any(name.startswith("share") for name in applied)
    assert torch.equal(program.module()(screens(2)), WrittenTo()(screens(2)))


class Random(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return torch.rand_like(pixels, dtype=torch.float32) - torch.rand_like(pixels, dtype=torch.float32)


def test_random_numbers_are_not_shared() -> None:
    program, applied = optimize(export(Random(), screens(4)))
    assert applied == []
    assert program.module()(screens(2)).abs().max() > 0


def test_the_program_agrees_with_the_policy(captured: TracedPolicy, optimized: TracedPolicy, tmp_path: Path) -> None:
    """The `.onnx`, which is rewritten the most; `.pt2` and all the certificate says: `tests/e2e`."""
    onnx.convert_program(optimized.program, optimized.signature, tmp_path / "policy.onnx")
    session = open_session((tmp_path / "policy.onnx").read_bytes())
    pixels = screens(256).numpy()
    expected = captured.run_reference({"pixels": pixels})
    for size in (1, 8, 256):
        parts = [session.run(list(expected), {"pixels": batch}) for batch in np.split(pixels, 256 // size)]
        action, values = (np.concatenate(found) for found in zip(*parts, strict=True))
        np.testing.assert_array_equal(action, expected["action"])
        np.testing.assert_allclose(values, expected["action_value"], atol=1e-4, rtol=1e-4)


# Batch norms.


class Normalised(nn.Module):
    """Batch norms behind a convolution, a linear layer, nothing that they can be folded into, and a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, bias=False)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.linear, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.shared = nn.Conv2d(4, 4, 1)
        for norm in (self.first, self.second, self.last):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.uniform_(norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(self.convolution(x))))
        x = self.second(self.shared(self.shared(x)))
        return self.last(self.linear(x.mean((2, 3))))


def test_batch_norms_are_folded_where_the_layer_is_their_own() -> None:
    torch.manual_seed(0)
    network = Normalised().eval()
    program = exported_with_batch(network, torch.zeros(2, 3, 6, 6))
    folded, names = fold(program)
    assert names == ["fold batch norms into the layers before them: 2"]
    x = torch.rand(7, 3, 6, 6)
    torch.testing.assert_close(folded.module()(x), network(x), rtol=1e-5, atol=1e-5)
    shapes = sorted(tuple(tensor.shape) for tensor in folded.state_dict.values() if tensor.dim() > 1)
    assert shapes == [(4, 3, 3, 3), (4, 4, 1, 1), (5, 4)]
    assert fold(folded) == (folded, [])


@pytest.mark.parametrize("network", [nn.BatchNorm1d(4).train(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval()])
def test_without_batch_norms_to_fold_the_program_stays(network: nn.Module) -> None:
    program = exported_with_batch(network, torch.zeros(2, 4))
    assert fold(program) == (program, [])


def exported_with_batch(module: nn.Module, x: Tensor) -> Any:
    return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},))
