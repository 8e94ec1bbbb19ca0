"""Models that Stable-Baselines3 saved (`model.save`) -> PolicySource: `model.predict` as a function of tensors.

A saved model holds pickled Python, and opening it runs that code. Open only your own models. This happens offline, in
this module; a published artifact holds tensors and operators only.
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
from actserve_export.sources.interfaces import OriginalPolicy
from actserve_export.sources.policy_source import PolicySource
from actserve_export.sources.sb3_observations import Observations
from actserve_export.sources.sb3_predict import Actions, MaskedPredict, Predict, RecurrentPredict, ValuePredict

LIBRARY = f"Stable-Baselines3 {stable_baselines3.__version__}"
# The supported policies: the part of each that acts (None: the policy itself), and how. Subclasses come first.
_POLICIES: dict[str, tuple[str | None, type[Predict]]] = {
    "RecurrentActorCriticPolicy": (None, RecurrentPredict),
    "MaskableActorCriticPolicy": (None, MaskedPredict),
    "ActorCriticPolicy": (None, Predict),  # PPO, A2C, TRPO
    "ARSPolicy": (None, Predict),
    "DQNPolicy": ("q_net", ValuePredict),
    "QRDQNPolicy": ("quantile_net", ValuePredict),
    "SACPolicy": ("actor", Predict),
    "TD3Policy": ("actor", Predict),  # and DDPG
    "TQCPolicy": ("actor", Predict),
    "CrossQPolicy": ("actor", Predict),
}
_NEEDED = ("policy_class", "policy_kwargs", "observation_space", "action_space")
# Only training uses these, and another version of Python may be unable to read them.
_UNREAD = dict.fromkeys(
    ("lr_schedule", "learning_rate", "clip_range", "clip_range_vf", "exploration_schedule", "action_noise",
     "ep_info_buffer", "ep_success_buffer", "replay_buffer_class", "rollout_buffer_class")
)  # fmt: skip


def from_sb3(
    path: Path | str,
    *,
    statistics: Path | str | None = None,
    channels_last: bool = False,
    frame_stack: int = 1,
) -> PolicySource:
    """The policy of a saved model (`.zip`), acting as `model.predict` does.

    That includes dividing images by 255 and clipping or scaling actions to the action space. In random mode it acts as
    `predict(deterministic=False)`. The parameter `epsilon` is DQN's exploration rate. The masks of MaskablePPO are an
    observation, `action_masks`. A key of a Dict space that has another meaning here gets an underscore: `action_`.
    `statistics` is the file that `VecNormalize.save` wrote (`.pkl`). With it, the artifact takes raw observations.
    `channels_last`: the artifact takes images as (H, W, C), as most environments return them, instead of (C, H, W), as
    the model takes them.
    `frame_stack` is the `n_stack` of a `VecFrameStack`. With it, the artifact takes single observations, and the stack
    is state, `frames`. Frames are stacked as `VecFrameStack` does without `channels_order`. `VecNormalize` may be
    around it or inside.
    Opening either file runs the pickled Python in it. Raises `UsageError` for a file that cannot be read, and
    `CaptureFailed` for an unsupported policy.
    """
    saved, weights = _read(Path(path))
    policy = _policy(saved, weights)
    part, make = next(_POLICIES[name] for name in _class_names(type(policy)) if name in _POLICIES)
    acting = policy if part is None else getattr(policy, part)
    normalize = None if statistics is None else _statistics(Path(statistics))
    observations = Observations(policy.observation_space, normalize, channels_last, frame_stack)
    module = make(acting, observations, Actions(policy))
    network: Any = TensorDictModule(module, in_keys=module.in_keys, out_keys=module.out_keys)
    if "exploration_rate" in saved:
        rate = float(saved["exploration_rate"])
        network = TensorDictSequential(network, EGreedyModule(Categorical(policy.action_space.n), rate, rate))
    return PolicySource(
        network,
        TensorDict(module.example()),
        exploration=("deterministic",) if getattr(acting, "use_sde", False) else None,
        observe=module.sample,
        library=LIBRARY,
        original=OriginalPolicy(f"{LIBRARY}, predict(deterministic=True)", module.original(policy)),
        observed_in="observation space",
        spec=observations.spec(),
    )


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(the model's attributes, the policy's weights)."""
    try:
        saved, weights, _ = load_from_zip_file(path, custom_objects=_UNREAD, device="cpu")
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{path.name} is no model of Stable-Baselines3 that can be read: {error}") from error
    found = {**(saved or {}), "weights": weights.get("policy")}
    if missing := [name for name in (*_NEEDED, "weights") if found.get(name) is None]:
        raise UsageError(f"{path.name} is no model of Stable-Baselines3 that can be read: no {', '.join(missing)}")
    return saved, weights["policy"]


def _policy(saved: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
    """The policy alone: loading the whole model would allocate its replay buffer."""
    policy_class = saved["policy_class"]
    if not any(name in _POLICIES for name in _class_names(policy_class)):
        raise CaptureFailed(
            f"expected one of {', '.join(_POLICIES)}, or a subclass; the model has a {policy_class.__name__}"
        )
    if not isinstance(saved["observation_space"], spaces.Space):
        raise CaptureFailed("the model was saved with gym's spaces; load it and save it again with gymnasium's")
    options = {name: value for name, value in saved["policy_kwargs"].items() if name != "device"}
    if saved.get("use_sde"):
        options["use_sde"] = True
    schedule = [] if "ARSPolicy" in _class_names(policy_class) else [lambda _: 0.0]
    with torch.no_grad():  # gSDE's first draw would have an autograd history, which cannot be copied
        policy = policy_class(saved["observation_space"], saved["action_space"], *schedule, **options)
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise CaptureFailed(f"the weights do not fit the policy that {LIBRARY} makes: {error}") from error
    policy.set_training_mode(False)
    return policy


def _class_names(policy_class: type) -> list[str]:
    return [parent.__name__ for parent in policy_class.__mro__]


def _statistics(path: Path) -> VecNormalize:
    try:
        found = load_from_pkl(path)
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, VecNormalize):
        raise UsageError(f"{path.name}: expected what VecNormalize.save wrote; got a {type(found).__name__}")
    return found
