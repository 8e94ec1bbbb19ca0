"""What Stable-Baselines3's `predict` does, the exported policy does: before it is traced, and as it is captured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from actserve.core.errors import CaptureFailed, Disagreement, UsageError
from actserve.core.signature import Arrays
from actserve.store.local import ModelStore
from actserve_export.capture import capture
from actserve_export.publish import export
from actserve_export.sources.policy_source import PolicySource
from actserve_export.sources.sb3 import from_sb3
from actserve_export.targets import load
from tests.sb3_models import CHOICE, FORCES, MODELS, NUMBERS, SEVERAL, Dice

ITEMS = 32


def saved(model: Any, folder: Path) -> Path:
    model.save(folder / "model.zip")
    return folder / "model.zip"


def act(source: PolicySource, inputs: dict[str, Any]) -> Any:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return source.policy(TensorDict(inputs, batch_size=[ITEMS]))


def seen(observed: TensorDict) -> Any:
    """As `predict` wants it: an array, or arrays by name."""
    arrays = {name: tensor.numpy() for name, tensor in observed.items()}
    return arrays.get("observation", arrays)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if "recurrent" not in kind])
def test_a_saved_model_acts_as_it_predicts(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    source = from_sb3(saved(model, tmp_path))
    assert source.observe is not None
    observed = source.observe(ITEMS)
    expected, _ = model.predict(seen(observed), deterministic=True)
    action = act(source, observed.to_dict())["action"].numpy()
    assert action.dtype == expected.dtype
    np.testing.assert_allclose(action, expected, atol=1e-6)
    assert len(np.unique(expected, axis=0)) > 1, "or it proves little"


@pytest.mark.parametrize("kind", ["recurrent ppo", "recurrent ppo, forces"])
def test_a_recurrent_model_carries_its_state_and_forgets_it_where_an_episode_begins(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    source = from_sb3(saved(model, tmp_path))
    rng = np.random.default_rng(0)
    theirs: Any = None
    ours = {name: torch.zeros(ITEMS, 2, 8) for name in ("hidden", "cell")}
    for step in range(4):
        observation = rng.standard_normal((ITEMS, 5)).astype(np.float32)
        begins = rng.random(ITEMS) < (0.3 if step else 1.0)
        expected, theirs = model.predict(observation, theirs, begins, deterministic=True)
        seen = {"observation": torch.from_numpy(observation), "is_init": torch.from_numpy(begins), **ours}
        result = act(source, seen)
        np.testing.assert_allclose(result["action"].numpy(), expected, atol=1e-6)
        ours = {name: result["next", name] for name in ours}
        np.testing.assert_allclose(ours["hidden"].transpose(0, 1).numpy(), theirs[0], atol=1e-6)
        np.testing.assert_allclose(ours["cell"].transpose(0, 1).numpy(), theirs[1], atol=1e-6)


@pytest.mark.parametrize("kind", ["dqn, images", "ppo, images among others"])
def test_images_may_come_as_environments_give_them(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    source = from_sb3(saved(model, tmp_path), channels_last=True)
    assert source.observe is not None
    observed = source.observe(ITEMS)
    assert [tensor.shape[1:] for tensor in observed.values() if tensor.dtype == torch.uint8] == [(40, 36, 3)]
    expected, _ = model.predict(seen(observed), deterministic=True)
    np.testing.assert_array_equal(act(source, observed.to_dict())["action"].numpy(), expected)


@pytest.mark.parametrize(("space", "keys"), [(NUMBERS, None), (SEVERAL, ["speed"])])
def test_with_its_statistics_a_model_takes_raw_observations(space: Any, keys: Any, tmp_path: Path) -> None:
    environment = VecNormalize(DummyVecEnv([lambda: Dice(space, CHOICE)]), norm_obs_keys=keys, clip_obs=1.5)
    algorithm = MODELS["ppo" if keys is None else "ppo, images among others"]().__class__
    model = algorithm("MlpPolicy" if keys is None else "MultiInputPolicy", environment, seed=0, device="cpu")
    environment.reset()
    for _ in range(20):
        environment.step([0])
    environment.save(str(tmp_path / "statistics.pkl"))
    source = from_sb3(saved(model, tmp_path), statistics=tmp_path / "statistics.pkl")
    assert source.observe is not None
    observed = source.observe(ITEMS)
    normalized: Any = environment.normalize_obs(seen(observed))
    expected, _ = model.predict(normalized, deterministic=True)
    np.testing.assert_array_equal(act(source, observed.to_dict())["action"].numpy(), expected)
    plain, _ = model.predict(seen(observed), deterministic=True)
    assert (plain != expected).any(), "or the statistics do nothing"


def test_the_captured_signature(tmp_path: Path) -> None:
    signature = capture(from_sb3(saved(MODELS["dqn"](), tmp_path))).signature
    assert [f"{spec.name} {spec}" for spec in signature.observations] == ["observation float32[5]"]
    assert [f"{spec.name} {spec}" for spec in signature.outputs] == ["action int64[]", "action_value float32[4]"]
    assert signature.exploration == ("deterministic", "random")
    assert [parameter.name for parameter in signature.parameters] == ["epsilon"]


def test_a_policy_that_is_not_what_predict_does_is_not_published(tmp_path: Path) -> None:
    source = from_sb3(saved(MODELS["td3"](), tmp_path))
    assert source.original is not None
    honest = source.original

    def other(inputs: Arrays) -> Arrays:
        return {"action": honest.act(inputs)["action"] + 0.01}

    lying = dataclasses.replace(source, original=dataclasses.replace(honest, act=other))
    with pytest.raises(Disagreement, match="what was captured is not the policy"):
        export(lying, "td3", ModelStore(tmp_path / "store"), origin="x", runtimes=["onnx"])


def test_what_is_no_saved_model_is_refused(tmp_path: Path) -> None:
    from sb3_contrib import MaskablePPO

    (tmp_path / "junk.zip").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"junk\.zip is no model of Stable-Baselines3 that can be read"):
        load(str(tmp_path / "junk.zip"))
    with pytest.raises(UsageError, match="there is no file"):
        load(str(tmp_path / "none.zip"))
    masked = saved(MaskablePPO("MlpPolicy", Dice(NUMBERS, CHOICE), device="cpu"), tmp_path)
    with pytest.raises(CaptureFailed, match="the model has a MaskableActorCriticPolicy"):
        load(str(masked))
    save_to_pkl(tmp_path / "other.pkl", {"mean": 0})
    with pytest.raises(UsageError, match=r"expected what VecNormalize\.save wrote; got a dict"):
        from_sb3(saved(MODELS["ppo"](), tmp_path), statistics=tmp_path / "other.pkl")


def test_only_a_bounded_action_is_scaled(tmp_path: Path) -> None:
    source = from_sb3(saved(MODELS["sac"](), tmp_path))
    assert source.observe is not None
    action = act(source, source.observe(ITEMS).to_dict())["action"].numpy()
    assert (action >= FORCES.low).all()
    assert (action <= FORCES.high).all()
    assert (np.abs(action - [-0.5, 2.5]) < 0.5).all(), "untrained, it is near the middle of the space"
