"""An exported policy of Stable-Baselines3 acts as `predict` does, before it is traced and as it is captured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.save_util import load_from_zip_file, save_to_pkl, save_to_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from actserve.core.errors import CaptureFailed, Disagreement, UsageError
from actserve.core.signature import Arrays
from actserve.store.local import ModelStore
from actserve_export.capture import capture
from actserve_export.publish import export
from actserve_export.sources import samples
from actserve_export.sources.policy_source import PolicySource
from actserve_export.sources.sb3 import from_sb3
from actserve_export.targets import load
from tests.sb3_models import CHOICE, FORCES, IMAGE, MODELS, NUMBERS, SEVERAL, Dice

ITEMS = 32


def saved(model: Any, folder: Path) -> Path:
    model.save(folder / "model.zip")
    return folder / "model.zip"


def act(source: PolicySource, inputs: dict[str, Any]) -> Any:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return source.policy(TensorDict(inputs, batch_size=[ITEMS]))


def seen(observed: TensorDict, model: Any) -> Any:
    """As `predict` wants it: an array, or arrays by name."""
    arrays = [tensor.numpy() for name, tensor in observed.items() if name != "action_masks"]
    space = model.observation_space
    return dict(zip(space.spaces, arrays, strict=True)) if isinstance(space, spaces.Dict) else arrays[0]


@pytest.mark.parametrize("kind", [kind for kind in MODELS if "recurrent" not in kind])
def test_a_saved_model_acts_as_it_predicts(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    source = from_sb3(saved(model, tmp_path))
    assert source.observe is not None
    observed = source.observe(ITEMS)
    masks = {"action_masks": observed["action_masks"].numpy()} if "action_masks" in observed.to_dict() else {}
    expected, _ = model.predict(seen(observed, model), deterministic=True, **masks)
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
    expected, _ = model.predict(seen(observed, model), deterministic=True)
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
    normalized: Any = environment.normalize_obs(seen(observed, model))
    expected, _ = model.predict(normalized, deterministic=True)
    np.testing.assert_array_equal(act(source, observed.to_dict())["action"].numpy(), expected)
    plain, _ = model.predict(seen(observed, model), deterministic=True)
    assert (plain != expected).any(), "or the statistics do nothing"


@pytest.mark.parametrize("around", ["nothing", "stack", "observation"])
@pytest.mark.parametrize("space", [NUMBERS, spaces.Dict({"near": NUMBERS, "a/b": NUMBERS})], ids=["box", "dict"])
def test_the_frame_stack_is_state(space: Any, around: str, tmp_path: Path) -> None:
    environment: Any = DummyVecEnv([lambda: Dice(space, CHOICE, length=5)] * 2)
    if around == "observation":
        environment = VecNormalize(environment, clip_obs=1.5)
    environment = VecFrameStack(environment, 3)
    if around == "stack":
        environment = VecNormalize(environment, clip_obs=1.5)
    model = PPO(
        "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy", environment, seed=0, device="cpu"
    )
    environment.reset()
    for _ in range(20):
        environment.step([0, 0])
    saved(model, tmp_path)
    normalizes = around != "nothing"
    if normalizes:
        normalizer = environment if around == "stack" else environment.venv
        normalizer.training = False
        normalizer.save(str(tmp_path / "statistics.pkl"))
    source = from_sb3(
        tmp_path / "model.zip", statistics=tmp_path / "statistics.pkl" if normalizes else None, frame_stack=3
    )
    frames = {key: torch.zeros(2, *source.example[key].shape) for key in source.policy.in_keys if "frames" in key}
    assert len(frames) == (2 if isinstance(space, spaces.Dict) else 1)
    stacked = environment.reset()
    begins = torch.ones(2, dtype=torch.bool)
    for _ in range(12):
        raw = environment.unwrapped.buf_obs
        names = list(space.spaces) if isinstance(space, spaces.Dict) else [None]
        seen = {name or "observation": torch.from_numpy(raw[name].copy()) for name in names}
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            result = source.policy(TensorDict({**seen, **frames, "is_init": begins}, batch_size=[2]))
        np.testing.assert_array_equal(result["action"].numpy(), model.predict(stacked, deterministic=True)[0])
        frames = {key: result["next", key] for key in frames}
        stacked, _, done, _ = environment.step(result["action"].numpy())
        begins = torch.from_numpy(done.copy())


@pytest.mark.parametrize("kind", ["ppo, odd names", "maskable ppo, several choices", "ars"])
def test_it_is_published_as_it_predicts(kind: str, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    artifact = export(from_sb3(saved(MODELS[kind](), tmp_path)), "sb3", store, origin="x", runtimes=["onnx"]).artifact
    certificate = artifact.manifest.certificate
    assert certificate["original"]["action_disagreements"] == 0
    assert ("statistics" in certificate) == ("ars" not in kind)


def test_frames_may_come_as_environments_give_them(tmp_path: Path) -> None:
    environment = VecFrameStack(DummyVecEnv([lambda: Dice(IMAGE, CHOICE)]), 2)
    source = from_sb3(
        saved(PPO("CnnPolicy", environment, seed=0, device="cpu"), tmp_path), channels_last=True, frame_stack=2
    )
    assert {key: tuple(source.example[key].shape) for key in source.policy.in_keys[:2]} == {
        "observation": (40, 36, 3),
        "frames": (6, 40, 36),
    }
    inputs = samples.collect(source, capture(source).signature, ITEMS)
    assert source.original is not None
    expected = source.original.act(inputs)
    found = act(source, {key: torch.from_numpy(inputs[key]) for key in source.policy.in_keys})
    np.testing.assert_array_equal(found["action"].numpy(), expected["action"])
    assert len(np.unique(expected["action"])) > 1, "or it proves little"


def test_every_algorithm_is_tried() -> None:
    listed = {name for library in (stable_baselines3, sb3_contrib) for name in library.__all__}
    tried = {type(make()).__name__ for make in MODELS.values()}
    assert listed - tried == {"HerReplayBuffer", "get_system_info"}


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
    (tmp_path / "junk.zip").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"junk\.zip is no model of Stable-Baselines3 that can be read"):
        load(str(tmp_path / "junk.zip"))
    with pytest.raises(UsageError, match="there is no file"):
        load(str(tmp_path / "none.zip"))
    data, weights, _ = load_from_zip_file(saved(MODELS["ppo"](), tmp_path))
    save_to_zip_file(tmp_path / "odd.zip", data={**data, "policy_class": BaseModel}, params=weights)
    with pytest.raises(CaptureFailed, match="the model has a BaseModel"):
        load(str(tmp_path / "odd.zip"))
    with pytest.raises(CaptureFailed, match=r"holds no 3 stacked observations"):
        from_sb3(tmp_path / "model.zip", frame_stack=3)
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
