"""The training of the network of `pong-lstm`: as in `student.py`, but on windows of consecutive screens.

The network starts with the weights of the feed-forward student, and its last layer sees features and memory. It first
plays like that student, and then learns to use the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import set_recurrent_mode

from actserve_export.training import pong_lstm
from actserve_export.training.bundled import WEIGHTS
from actserve_export.training.games import Games
from actserve_export.training.student import Student, StudentRecipe, centre, centred

STATE = ("recurrent_state_h", "recurrent_state_c")


@dataclass(frozen=True)
class RecurrentRecipe(StudentRecipe):
    """A round of one game is a window, stored with the LSTM state at its start."""

    total_steps: int = 800_000
    steps_per_round: int = 24
    burn_in: int = 6  # steps at a window's start without loss, because its stored state comes from older weights
    updates_per_round: int = 4
    batch_size: int = 12
    buffer_size: int = 6_000
    learning_rate: float = 4e-4
    teacher_steps: int = 1


class RecurrentStudent(Student):
    """A student with an LSTM."""

    name = "pong-lstm"
    recipe: RecurrentRecipe

    def make(self) -> nn.Module:
        network = pong_lstm.recurrent_network()
        with torch.no_grad():
            pong_lstm.copy_feed_forward_weights(network, load_file(WEIGHTS["pong"]))
        centre(network)
        return network.to(memory_format=torch.channels_last)

    def playing(self, network: nn.Module) -> Callable[[Games], TensorDict]:
        shape = (1, pong_lstm.MEMORY)
        state: dict[str, Tensor] = {}

        def values(games: Games) -> TensorDict:
            count = len(games)
            before = {key: state.get(key, torch.zeros(count, *shape)) for key in STATE}
            pixels = torch.from_numpy(games.greys())
            restarted = torch.from_numpy(games.restarted.copy())[:, None]
            step = TensorDict({"pixels": centred(pixels), "is_init": restarted, **before}, batch_size=[count])
            with torch.no_grad():
                network(step)
            state.update({key: step["next", key] for key in STATE})
            found = step["action_value"][:, self.chosen]
            return TensorDict({"pixels": pixels, "is_init": restarted, "values": found, **before}, batch_size=[count])

        return values

    def arrange(self, data: TensorDict) -> TensorDict:
        windows = data.select("pixels", "target", "is_init")
        return TensorDict({"steps": windows, **{key: data[key][:, 0] for key in STATE}}, batch_size=[len(data)])

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        steps = batch["steps"]
        length = steps["pixels"].shape[1]
        features, *rest = self.network
        with torch.autocast("cpu", torch.bfloat16):
            seen = features.module(centred(steps["pixels"]).flatten(0, 1))
        data = TensorDict(
            {"features": seen.float().unflatten(0, (-1, length)), "is_init": steps["is_init"]},
            batch_size=steps["pixels"].shape[:2],
        )
        for key in STATE:
            data[key] = batch[key][:, None].expand(-1, length, -1, -1)
        with set_recurrent_mode(True):
            for module in rest:
                module(data)
        kept = slice(self.recipe.burn_in, None)
        return data["action_value"][:, kept], steps["target"][:, kept]
