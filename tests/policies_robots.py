"""A robot's policy, for the tests of robots' wires: two cameras and a state in, recurrent, a chunk of actions out."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import GRUModule

from tests.policies import Pair

SIZE = 24  # rows and columns of a camera
HORIZON, DIM = 4, 3
CAMERAS = (("observation", "image"), ("observation", "wrist_image"))
STATE = ("observation", "state")


class Eyes(nn.Module):
    """(B, SIZE, SIZE, 3) uint8 twice and (B, 5) float32 -> features (B, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.cameras = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Tanh(), nn.Flatten(-3)) for _ in CAMERAS)
        self.join = nn.Linear(2 * 4 * 9 + 5, 12)

    def forward(self, image: torch.Tensor, wrist: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        seen = [
            camera(picture.movedim(-1, -3).float() / 255)
            for camera, picture in zip(self.cameras, (image, wrist), strict=True)
        ]
        features: torch.Tensor = self.join(torch.cat([*seen, state], -1)).tanh()
        return features


class Hand(nn.Module):
    """Features (B, 8) -> a chunk of actions (B, HORIZON, DIM), in -1 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, HORIZON * DIM)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (3 * self.net(features)).tanh().unflatten(-1, (HORIZON, DIM))


def robot() -> Pair:
    """Inputs `observation_image`, `observation_wrist_image` and `observation_state`."""
    torch.manual_seed(0)
    example = {
        "image": torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8),
        "wrist_image": torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8),
        "state": torch.zeros(5),
    }
    return (
        TensorDictSequential(
            TensorDictModule(Eyes(), in_keys=[*CAMERAS, STATE], out_keys=["features"]),
            GRUModule(input_size=12, hidden_size=8, in_key="features", out_key="features"),
            TensorDictModule(Hand(), in_keys=["features"], out_keys=["action"]),
        ),
        TensorDict({"observation": TensorDict(example)}),
    )


class Large(nn.Module):
    """(B, 32) -> a chunk of actions (B, 16, 7). 9 million weights, as policies on embeddings have them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
            nn.Linear(2048, 16 * 7), nn.Unflatten(-1, (16, 7)),
        )  # fmt: skip

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        actions: torch.Tensor = self.net(state)
        return actions


def arm() -> Pair:
    """Without memory, and with a state of 32 numbers."""
    torch.manual_seed(0)
    module = TensorDictModule(Large(), in_keys=[STATE], out_keys=["actions"])
    return TensorDictSequential(module), TensorDict({"observation": {"state": torch.zeros(32)}})


def camera() -> Pair:
    """Without memory, with two cameras and a state."""
    torch.manual_seed(0)
    module = TensorDictModule(Eyes(), in_keys=[*CAMERAS, STATE], out_keys=["features"])
    hand = TensorDictModule(nn.Linear(12, DIM), in_keys=["features"], out_keys=["actions"])
    return TensorDictSequential(module, hand), robot()[1]
