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


def camera() -> Pair:
    """Without memory, with two cameras and a state."""
    torch.manual_seed(0)
    module = TensorDictModule(Eyes(), in_keys=[*CAMERAS, STATE], out_keys=["features"])
    hand = TensorDictModule(nn.Linear(12, DIM), in_keys=["features"], out_keys=["actions"])
    return TensorDictSequential(module, hand), robot()[1]


def vision() -> Pair:
    """Without memory, with one camera of 128 x 128 pixels. 18 million multiply-adds."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.Flatten(-3), nn.LazyLinear(256), nn.ReLU(), nn.Linear(256, DIM),
    )  # fmt: skip

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            actions: torch.Tensor = self.layers(image.movedim(-1, -3).float() / 255)
            return actions

    net, image = Net().eval(), torch.zeros(128, 128, 3, dtype=torch.uint8)
    net(image[None])  # gives the lazy layer its size
    module = TensorDictModule(net, in_keys=[CAMERAS[0]], out_keys=["actions"])
    return TensorDictSequential(module), TensorDict({"observation": {"image": image}})


class ActionHead(nn.Module):
    """(B, 32) and (B, 512) -> a chunk of actions (B, 16, 7): a transformer decoder with 25 million weights.

    Its one query attends to the state and to what a vision encoder saw, and becomes the whole chunk.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state, self.scene = nn.Linear(32, 512), nn.Linear(512, 512)
        self.query = nn.Parameter(torch.randn(1, 512))
        layer = nn.TransformerDecoderLayer(512, 8, 2048, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerDecoder(layer, 6)
        self.actions = nn.Sequential(nn.Linear(512, 16 * 7), nn.Unflatten(-1, (16, 7)))

    def forward(self, state: torch.Tensor, scene: torch.Tensor) -> torch.Tensor:
        memory = torch.stack([self.state(state), self.scene(scene)], -2)
        query = self.query.expand(*state.shape[:-1], 1, -1)
        actions: torch.Tensor = self.actions(self.layers(query, memory)[..., 0, :])
        return actions


def head() -> Pair:
    """Without memory. The weights, 102 MB, do not fit into a cache."""
    torch.manual_seed(0)
    module = TensorDictModule(ActionHead().eval(), in_keys=[STATE, ("observation", "scene")], out_keys=["actions"])
    example = {"state": torch.zeros(32), "scene": torch.zeros(512)}
    return TensorDictSequential(module), TensorDict({"observation": example})
