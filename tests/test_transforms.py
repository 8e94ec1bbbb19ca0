from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded

from actserve_export.training.transforms import NearestResize

ROWS = np.arange(84) * 210 // 84
COLUMNS = np.arange(84) * 160 // 84


def picked(images: torch.Tensor) -> torch.Tensor:
    """The definition: row ⌊i·210/84⌋ and column ⌊j·160/84⌋."""
    return images[..., ROWS, :][..., COLUMNS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("leading", [(3,), (5, 3), (1, 1), (2, 5, 3), (2, 1, 4, 3)], ids=str)
def test_picks_rows_and_columns(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (*leading, 210, 160), generator=torch.Generator().manual_seed(0)).to(dtype)
    resized = NearestResize(84, 84)(TensorDict({"pixels": images}))["pixels"]
    assert resized.dtype == dtype
    assert torch.equal(resized, picked(images))


def test_height_and_width_are_not_swapped() -> None:
    images = torch.arange(12.0).reshape(1, 4, 3)
    assert NearestResize(2, 3)(TensorDict({"pixels": images}))["pixels"].tolist() == [[[0, 1, 2], [6, 7, 8]]]


def test_touches_only_its_keys() -> None:
    resize = NearestResize(84, 84, in_keys=["screen"])
    result = resize(TensorDict({"screen": torch.zeros(3, 210, 160), "pixels": torch.zeros(3, 210, 160)}))
    assert result["screen"].shape == (3, 84, 84)
    assert result["pixels"].shape == (3, 210, 160)


@pytest.mark.parametrize("leading", [(3,), (5, 3)], ids=str)
def test_spec_has_the_shape_and_bounds_of_the_result(leading: tuple[int, ...]) -> None:
    spec = Composite(
        pixels=Bounded(0, 1, shape=(*leading, 210, 160), dtype=torch.float32), other=Unbounded(shape=(210, 160))
    )
    transformed = NearestResize(84, 84).transform_observation_spec(spec)
    assert transformed["pixels"].shape == (*leading, 84, 84)
    assert transformed["pixels"].space.high.shape == (*leading, 84, 84)
    assert transformed["other"].shape == (210, 160)
    assert transformed["pixels"].is_in(torch.rand(*leading, 84, 84))


def test_spec_without_bounds() -> None:
    spec = Composite(pixels=Unbounded(shape=(3, 210, 160), dtype=torch.uint8))
    assert NearestResize(84, 84).transform_observation_spec(spec)["pixels"].shape == (3, 84, 84)


def test_exports_with_a_symbolic_batch() -> None:
    class Function(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resize = NearestResize(84, 84)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            resized: torch.Tensor = self.resize(TensorDict({"pixels": pixels}, [pixels.shape[0]]))["pixels"]
            return resized

    batch = torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(
        Function(), (torch.rand(64, 3, 210, 160),), dynamic_shapes=({0: batch},), strict=False
    ).module()
    for count in (1, 7):
        images = torch.rand(count, 3, 210, 160)
        assert torch.equal(program(images), picked(images))
