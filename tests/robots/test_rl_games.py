from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rl_games.algos_torch.players import PpoPlayerContinuous, PpoPlayerDiscrete, SACPlayer

from actserve.core.errors import CaptureFailed
from actserve_export import from_rl_games
from tests.robots.episodes import ROWS, assert_same_episodes, published

SEEN = spaces.Box(-10, 10, (6,), np.float32)
FORCES = spaces.Box(np.array([-2, 0], np.float32), np.array([1, 3], np.float32))
LAYERS = {"units": [16, 8], "activation": "elu", "initializer": {"name": "default"}}
NORMAL = {
    "continuous": {
        "mu_activation": "None",
        "sigma_activation": "None",
        "mu_init": {"name": "default"},
        "sigma_init": {"name": "const_initializer", "val": -1.0},
        "fixed_sigma": True,
    }
}


def rnn(name: str, layers: int) -> dict[str, Any]:
    return {"rnn": {"name": name, "units": 8, "layers": layers, "concat_input": False, "layer_norm": True}}


def player(kind: Any, model: str, network: dict[str, Any], action_space: Any = FORCES) -> Any:
    """A player with random weights and statistics."""
    torch.manual_seed(0)
    network = {"name": "actor_critic", "separate": False, "mlp": LAYERS, **network}
    config = {
        "env_name": "robot",
        "env_info": {"observation_space": SEEN, "action_space": action_space},
        "device_name": "cpu",
        "normalize_input": True,
        "normalize_value": True,
    }
    made = kind({"model": {"name": model}, "network": network, "config": config})
    for name, statistics in made.model.named_buffers():
        if "running" in name:
            statistics.copy_(torch.rand(statistics.shape) + 0.5)
    return made


SOFT = {"name": "soft_actor_critic", "separate": True, "space": {"continuous": {}}, "log_std_bounds": [-5, 2]}
PLAYERS = {
    "mlp": lambda: player(PpoPlayerContinuous, "continuous_a2c_logstd", {"space": NORMAL}),
    "lstm, 2 layers": lambda: player(PpoPlayerContinuous, "continuous_a2c_logstd", {"space": NORMAL, **rnn("lstm", 2)}),
    "gru, separate critic": lambda: player(
        PpoPlayerContinuous, "continuous_a2c_logstd", {"space": NORMAL, **rnn("gru", 1), "separate": True}
    ),
    "choice": lambda: player(PpoPlayerDiscrete, "discrete_a2c", {"space": {"discrete": {}}}, spaces.Discrete(4)),
    "sac": lambda: player(SACPlayer, "soft_actor_critic", SOFT, spaces.Box(-1, 1, (2,), np.float32)),
}
ALWAYS = ("lstm, 2 layers",)


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.wide) for kind in PLAYERS]
)
def test_a_player_plays_as_it_acts(kind: str, tmp_path: Path) -> None:
    original = PLAYERS[kind]()
    artifact = published(from_rl_games(original), tmp_path)
    assert "statistics" in artifact.manifest.certificate
    original.has_batch_dimension, original.batch_size = True, ROWS
    original.reset()

    def act(observed: Any, begins: Any) -> Any:
        for state in original.states or ():
            state[:, begins] = 0
        return original.get_action(observed["observation"], is_deterministic=True)

    assert_same_episodes(artifact, act)


def test_what_is_no_player_is_refused() -> None:
    with pytest.raises(CaptureFailed, match=r"expected a player of rl_games.*got a Linear"):
        from_rl_games(torch.nn.Linear(2, 2))
