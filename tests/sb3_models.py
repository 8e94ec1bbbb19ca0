"""Small models of Stable-Baselines3, untrained, of every kind that is exported. Each comes with its random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3, HerReplayBuffer

NUMBERS = spaces.Box(-np.inf, np.inf, (5,), np.float32)
DOUBLES = spaces.Box(-3.4e38, 3.4e38, (5,), np.float64)
IMAGE = spaces.Box(0, 255, (40, 36, 3), np.uint8)
SEVERAL = spaces.Dict({"screen": IMAGE, "speed": NUMBERS, "room": spaces.Discrete(3)})
GOALS = spaces.Dict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), NUMBERS))
# Names that mean something else to requests, to the policy or to Python.
ODD = spaces.Dict(dict.fromkeys(("is_init", "action", "seed", "logits", "a/b c", "class", "next", "é"), NUMBERS))
CHOICE = spaces.Discrete(4)
CHOICES = spaces.MultiDiscrete([2, 3])
SWITCHES = spaces.MultiBinary(3)
FORCES = spaces.Box(np.array([-2, 0], np.float32), np.array([1, 5], np.float32))


class Dice(gymnasium.Env):
    """An environment that means nothing: every observation is random. An episode has `length` steps, or no end."""

    def __init__(self, observation_space: Any, action_space: Any, length: int = 0) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.length, self.steps = length, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample(), 0.0, bool(self.length) and self.steps % self.length == 0, False, {}


def _model(
    algorithm: Any, observation_space: Any, action_space: Any, policy: str = "MlpPolicy", **options: Any
) -> Callable[[], Any]:
    if algorithm in (DDPG, DQN, QRDQN, SAC, TD3, TQC, CrossQ):
        options["buffer_size"] = 1

    def make() -> Any:
        model = algorithm(policy, Dice(observation_space, action_space), seed=0, device="cpu", **options)
        if algorithm is ARS:  # which begins with weights of zero
            generator = torch.Generator().manual_seed(0)
            for weight in model.policy.parameters():
                weight.data.normal_(generator=generator)
        return model

    return make


LSTM = {"lstm_hidden_size": 8, "n_lstm_layers": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "ppo": _model(PPO, NUMBERS, CHOICE),
    "ppo, clipped forces": _model(PPO, NUMBERS, FORCES, policy_kwargs={"log_std_init": 1.0}),
    "ppo, float64": _model(PPO, DOUBLES, CHOICE),
    "ppo, a number of a few": _model(PPO, CHOICE, CHOICE),
    "ppo, several numbers of a few": _model(PPO, CHOICES, CHOICE),
    "ppo, switches": _model(PPO, SWITCHES, CHOICE),
    "ppo, images among others": _model(PPO, SEVERAL, CHOICE, "MultiInputPolicy"),
    "ppo, gSDE": _model(PPO, NUMBERS, FORCES, use_sde=True),
    "ppo, gSDE, squashed": _model(PPO, NUMBERS, FORCES, use_sde=True, policy_kwargs={"squash_output": True}),
    "a2c, several choices": _model(A2C, NUMBERS, CHOICES),
    "a2c, switches": _model(A2C, NUMBERS, SWITCHES),
    "dqn": _model(DQN, NUMBERS, CHOICE),
    "dqn, images": _model(DQN, IMAGE, CHOICE, "CnnPolicy"),
    "sac": _model(SAC, NUMBERS, FORCES),
    "sac, gSDE": _model(SAC, NUMBERS, FORCES, use_sde=True),
    "td3": _model(TD3, NUMBERS, FORCES),
    "sac, HER": _model(SAC, GOALS, FORCES, "MultiInputPolicy", replay_buffer_class=HerReplayBuffer),
    "ddpg": _model(DDPG, NUMBERS, FORCES),
    "ppo, odd names": _model(PPO, ODD, CHOICE, "MultiInputPolicy"),
    "ars": _model(ARS, NUMBERS, CHOICE),
    "ars, forces": _model(ARS, NUMBERS, FORCES),
    "ars, linear": _model(ARS, NUMBERS, FORCES, "LinearPolicy"),
    "maskable ppo": _model(MaskablePPO, NUMBERS, CHOICE),
    "maskable ppo, several choices": _model(MaskablePPO, SEVERAL, CHOICES, "MultiInputPolicy"),
    "maskable ppo, switches": _model(MaskablePPO, NUMBERS, SWITCHES),
    "qr-dqn": _model(QRDQN, NUMBERS, CHOICE),
    "tqc": _model(TQC, NUMBERS, FORCES),
    "crossq": _model(CrossQ, NUMBERS, FORCES),
    "trpo": _model(TRPO, NUMBERS, CHOICE),
    "recurrent ppo": _model(RecurrentPPO, NUMBERS, CHOICE, "MlpLstmPolicy", policy_kwargs=LSTM),
    "recurrent ppo, forces": _model(RecurrentPPO, NUMBERS, FORCES, "MlpLstmPolicy", policy_kwargs=LSTM),
}
