"""Models that Stable-Baselines3 saved (`model.save`) -> PolicySource: what `model.predict` does, as tensors.

A saved model holds pickled Python, and opening it runs what is in there: open your own only. That happens here,
offline; what is published holds tensors and operators alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.save_util import load_from_pkl, load_from_zip_file
from stable_baselines3.common.vec_env import VecNormalize
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Categorical
from torchrl.modules import EGreedyModule

from actserve.core.errors import CaptureFailed, UsageError
from actserve_export.sources.interfaces import Original
from actserve_export.sources.policy_source import PolicySource
from actserve_export.sources.sb3_predict import Actions, Observations, Predict, RecurrentPredict

LIBRARY = f"Stable-Baselines3 {stable_baselines3.__version__}"
# The policies that are known, and which part of each acts; None: the policy itself.
_ACTING = {
    "ActorCriticPolicy": None,  # PPO, A2C, TRPO, RecurrentPPO
    "DQNPolicy": "q_net",
    "QRDQNPolicy": "quantile_net",
    "SACPolicy": "actor",
    "TD3Policy": "actor",  # and DDPG
    "TQCPolicy": "actor",
    "CrossQPolicy": "actor",
}
_NEEDED = ("policy_class", "policy_kwargs", "observation_space", "action_space")
# What only training needs, and what another version of Python may be unable to read.
_UNREAD = dict.fromkeys(
    ("lr_schedule", "learning_rate", "clip_range", "clip_range_vf", "exploration_schedule", "action_noise",
     "ep_info_buffer", "ep_success_buffer", "replay_buffer_class", "rollout_buffer_class")
)  # fmt: skip


def from_sb3(path: Path | str, *, statistics: Path | str | None = None, channels_last: bool = False) -> PolicySource:
    """The policy of a saved model (`.zip`), acting as `model.predict` does: images divided by 255, actions clipped or
    scaled to the action space. At random it acts as `predict(deterministic=False)`; `epsilon` is DQN's exploration
    rate.

    `statistics` is what `VecNormalize.save` wrote (`.pkl`): the artifact then takes raw observations. `channels_last`:
    images come as (H, W, C), as most environments give them, not as (C, H, W), as the model takes them.
    Both files hold pickled Python, which opening them runs. Raises `UsageError` for a file that cannot be read, and
    `CaptureFailed` for a policy that is not known.
    """
    saved, weights = _read(Path(path))
    policy = _policy(saved, weights)
    part = next(_ACTING[kind] for kind in _kinds(type(policy)) if kind in _ACTING)
    acting = policy if part is None else getattr(policy, part)
    normalize = None if statistics is None else _statistics(Path(statistics))
    make = RecurrentPredict if hasattr(policy, "lstm_actor") else Predict
    module = make(acting, Observations(policy.observation_space, normalize, channels_last), Actions(policy))
    network: Any = TensorDictModule(module, in_keys=module.in_keys, out_keys=module.out_keys)
    if "exploration_rate" in saved:
        rate = float(saved["exploration_rate"])
        network = TensorDictSequential(network, EGreedyModule(Categorical(policy.action_space.n), rate, rate))
    return PolicySource(
        network,
        TensorDict(module.example()),
        exploration=("deterministic",) if getattr(acting, "use_sde", False) else None,
        observe=module.observations.sample,
        library=LIBRARY,
        original=Original(f"{LIBRARY}, predict(deterministic=True)", module.original(policy)),
        observed_in="observation space",
    )


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(what the model knows of itself, the policy's weights)."""
    try:
        saved, weights, _ = load_from_zip_file(path, custom_objects=_UNREAD, device="cpu")
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{path.name} is no model of Stable-Baselines3 that can be read: {error}") from error
    known = {**(saved or {}), "weights": weights.get("policy")}
    if missing := [name for name in (*_NEEDED, "weights") if known.get(name) is None]:
        raise UsageError(f"{path.name} is no model of Stable-Baselines3 that can be read: no {', '.join(missing)}")
    return saved, weights["policy"]


def _policy(saved: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
    """The policy as its algorithm makes it, without the buffers that loading the whole model would allocate."""
    kind = saved["policy_class"]
    if not any(name in _ACTING for name in _kinds(kind)):
        raise CaptureFailed(f"expected one of {', '.join(_ACTING)}, or a subclass; the model has a {kind.__name__}")
    if not isinstance(saved["observation_space"], spaces.Space):
        raise CaptureFailed("the model was saved with gym's spaces; load it and save it again with gymnasium's")
    options = {name: value for name, value in saved["policy_kwargs"].items() if name != "device"}
    if saved.get("use_sde"):
        options["use_sde"] = True
    with torch.no_grad():  # what gSDE draws at first could not be copied with its history
        policy = kind(saved["observation_space"], saved["action_space"], lambda _: 0.0, **options)
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise CaptureFailed(f"the weights do not fit the policy that {LIBRARY} makes: {error}") from error
    policy.set_training_mode(False)
    return policy


def _kinds(policy_class: type) -> list[str]:
    return [parent.__name__ for parent in policy_class.__mro__]


def _statistics(path: Path) -> VecNormalize:
    try:
        found = load_from_pkl(path)
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, VecNormalize):
        raise UsageError(f"{path.name}: expected what VecNormalize.save wrote; got a {type(found).__name__}")
    return found
