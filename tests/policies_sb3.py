"""One model of each algorithm of Stable-Baselines3 and sb3-contrib, as `from_sb3` reads it from its file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from actserve_export import PolicySource, from_sb3
from tests.sb3_models import MODELS

ALGORITHMS = {
    "sb3_ppo": ("PPO", "ppo"),
    "sb3_a2c": ("A2C", "a2c, several choices"),
    "sb3_dqn": ("DQN", "dqn, images"),
    "sb3_sac": ("SAC", "sac"),
    "sb3_her": ("SAC with HER", "sac, HER"),
    "sb3_td3": ("TD3", "td3"),
    "sb3_ddpg": ("DDPG", "ddpg"),
    "sb3_qrdqn": ("QR-DQN", "qr-dqn"),
    "sb3_tqc": ("TQC", "tqc"),
    "sb3_crossq": ("CrossQ", "crossq"),
    "sb3_trpo": ("TRPO", "trpo"),
    "sb3_ars": ("ARS", "ars"),
    "sb3_maskable_ppo": ("MaskablePPO", "maskable ppo"),
    "sb3_recurrent_ppo": ("RecurrentPPO (state)", "recurrent ppo"),
}


def _read(kind: str) -> Callable[[], PolicySource]:
    def source() -> PolicySource:
        with tempfile.TemporaryDirectory() as folder:
            MODELS[kind]().save(Path(folder) / "model.zip")
            return from_sb3(Path(folder) / "model.zip")

    return source


KINDS = {name: _read(kind) for name, (_, kind) in ALGORITHMS.items()}
TITLES = {name: f"Stable-Baselines3: {title}" for name, (title, _) in ALGORITHMS.items()}


def __getattr__(name: str) -> Callable[[], PolicySource]:
    """The factories are attributes of the module, so that `tests.policies_sb3:sb3_ppo` names one."""
    try:
        return KINDS[name]
    except KeyError:
        raise AttributeError(name) from None
