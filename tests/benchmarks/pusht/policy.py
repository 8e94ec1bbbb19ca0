"""A small network that plans chunks of actions for gym-pusht: first where to push, then how the agent goes there.

It plans for the time when its answer comes, as real-time chunking does: it reads how many periods that takes, and which
actions the agent takes until then.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.benchmarks.pusht.block import CONTACTS, NORMALS
from tests.benchmarks.pusht.expert import GOAL

STEPS, HORIZON = 2, 16  # observations that it reads, actions that it plans
LATE = 3  # periods that an answer may take, at most
WIDTH = 192
PIXELS = 100.0  # of a unit of the network
MOVE = 50.0  # the same, of its outputs


class Planner(nn.Module):
    """The last observations, (n, STEPS, 5) f32 -> the agent's next targets, (n, HORIZON, 2) f32.

    `left_over` (n, HORIZON, 2) f32 is what the agent does meanwhile, and `delay` (n,) i64 how much of it counts. Both
    parts of the network see the scene from the block.
    """

    def __init__(self) -> None:
        super().__init__()
        scene = 4 * STEPS + 6 + 3 * LATE
        self.chooser = perceptron(scene, len(CONTACTS))  # scene -> logits of the contacts
        self.mover = perceptron(scene + 4, 2 * HORIZON)  # scene and contact -> moves from where the agent is
        self.register_buffer("goal", torch.tensor(GOAL, dtype=torch.float32))
        contacts = np.column_stack([CONTACTS / PIXELS, NORMALS])
        self.register_buffer("contacts", torch.tensor(contacts, dtype=torch.float32))

    def forward(self, observation: Tensor, left_over: Tensor, delay: Tensor) -> Tensor:
        scene, turn = self._scene(observation, left_over, delay)
        return self._plan(observation, scene, turn, self.chooser(scene).argmax(-1))

    def loss(self, observation: Tensor, left_over: Tensor, delay: Tensor, plan: Tensor, contact: Tensor) -> Tensor:
        """How far it is from an expert's `plan` (n, HORIZON, 2) and `contact` (n,) i64.

        Actions before `delay` do not count, and of the others the next ones count most.
        """
        scene, turn = self._scene(observation, left_over, delay)
        choice = nn.functional.cross_entropy(self.chooser(scene), contact)
        missed = (self._plan(observation, scene, turn, contact) - plan).abs().mean(-1)
        periods = torch.arange(HORIZON)
        weights = 0.9**periods * (periods >= delay.unsqueeze(-1))
        return choice + (missed * weights).sum() / weights.sum() / MOVE

    def _scene(self, observation: Tensor, left_over: Tensor, delay: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs of both parts (n, 4 * STEPS + 6 + 3 * LATE), rotation from the world to the block (n, 2, 2))."""
        agents, blocks = observation[..., :2], observation[..., 2:4]
        block, angle = blocks[..., -1, :], observation[..., -1, 4]
        cos, sin = torch.cos(angle), torch.sin(angle)
        turn = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
        counts = (torch.arange(LATE) < delay.unsqueeze(-1)).to(observation.dtype)
        meanwhile = (left_over[..., :LATE, :] - agents[..., -1:, :]) * counts.unsqueeze(-1)
        places = torch.cat([agents, blocks, self.goal[:2].expand_as(block).unsqueeze(-2)], -2) - block.unsqueeze(-2)
        inside = torch.cat([places, meanwhile], -2) @ turn.transpose(-1, -2) / PIXELS
        missing = angle - self.goal[2]
        rest = [torch.cos(missing).unsqueeze(-1), torch.sin(missing).unsqueeze(-1), (block - self.goal[:2]) / PIXELS]
        return torch.cat([inside.flatten(-2), *rest, counts], -1), turn

    def _plan(self, observation: Tensor, scene: Tensor, turn: Tensor, contact: Tensor) -> Tensor:
        moves = self.mover(torch.cat([scene, self.contacts[contact]], -1)).unflatten(-1, (HORIZON, 2)) * MOVE
        return (observation[..., -1:, :2] + moves @ turn).clamp(0, 512)


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into in (inputs, WIDTH, WIDTH):
        layers += [nn.Linear(into, WIDTH), nn.LayerNorm(WIDTH), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))
