"""ResNet-18 on screens: a policy with 11 million weights, as robots have, in plain torch.nn.

From He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actserve_export import from_module
from actserve_export.sources.policy_source import PolicySource

NAME = "resnet"
SCREEN = (240, 320, 3)  # uint8
ACTIONS = 8


class Block(nn.Module):
    """Two convolutions around a shortcut: (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.shortcut(x))


class ResNet18(nn.Module):
    """Screens (B, 240, 320, 3) uint8 -> the values of the actions (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        self.blocks = nn.Sequential(
            *(layer for inputs, outputs, stride in widths
              for layer in (Block(inputs, outputs, stride), Block(outputs, outputs, 1)))
        )  # fmt: skip
        self.head = nn.Linear(512, ACTIONS)

    def forward(self, screen: Tensor) -> Tensor:
        x = self.stem(screen.permute(0, 3, 1, 2).float() / 255)
        return self.head(self.blocks(x).mean((2, 3)))


def resnet() -> PolicySource:
    """With random weights, and statistics as after training: no variance is 1 and no mean 0."""
    torch.manual_seed(0)
    network = ResNet18()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return from_module(network, torch.zeros(SCREEN, dtype=torch.uint8), "argmax")
