from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors

from actserve.core.errors import CaptureFailed, UsageError
from actserve.core.signature import Chunk
from actserve_export import from_lerobot
from tests.robots.episodes import assert_same_episodes, published

STATE = {"observation.state": PolicyFeature(FeatureType.STATE, (5,))}
PLACES = {"observation.environment_state": PolicyFeature(FeatureType.ENV, (3,))}
CAMERA = {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 40))}
ACTION = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
SMALL = {
    "dim_model": 32, "n_heads": 4, "dim_feedforward": 32, "n_encoder_layers": 1, "n_vae_encoder_layers": 1,
    "pretrained_backbone_weights": None, "output_features": ACTION, "device": "cpu",
}  # fmt: skip


def statistics(features: Any) -> Any:
    found = {}
    for name, feature in features.items():
        shape = feature.shape if len(feature.shape) == 1 else (3, 1, 1)
        mean, spread = torch.rand(shape), torch.rand(shape) + 0.5
        found[name] = {"mean": mean, "std": spread, "min": mean - spread, "max": mean + spread}
    return found


def made(kind: Any, configuration: Any) -> tuple[Any, Any, Any]:
    """A policy with random weights, and its processors with random statistics."""
    features = {**configuration.input_features, **configuration.output_features}
    return kind(configuration), *make_pre_post_processors(configuration, dataset_stats=statistics(features))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def plays(policy: Any, preprocess: Any, postprocess: Any) -> Any:
    def act(observed: Any, begins: Any) -> Any:
        if bool(begins):
            policy.reset()
        return postprocess(policy.select_action(preprocess(dict(observed))))

    return act


@pytest.mark.parametrize("ensemble", [None, pytest.param(0.01, marks=pytest.mark.wide)])
def test_act_plays_its_chunks(ensemble: float | None, tmp_path: Path) -> None:
    steps = 5 if ensemble is None else 1
    configuration = ACTConfig(
        input_features=STATE | PLACES, chunk_size=8, n_action_steps=steps, temporal_ensemble_coeff=ensemble, **SMALL
    )
    parts = made(ACTPolicy, configuration)
    artifact = published(from_lerobot(*parts), tmp_path)
    assert_same_episodes(artifact, plays(*parts), rows=1)


def test_act_plans_whole_chunks(tmp_path: Path) -> None:
    """Each chunk is what `select_action` would take, one action after the other."""
    configuration = ACTConfig(input_features=STATE | PLACES, chunk_size=8, n_action_steps=5, **SMALL)
    policy, preprocess, postprocess = made(ACTPolicy, configuration)
    source = from_lerobot(policy, preprocess, postprocess, whole_chunks=True)
    artifact = published(source, tmp_path)
    signature = artifact.manifest.signature
    assert signature.chunk == Chunk("action", 5)
    assert (signature.action.shape, signature.state) == ((8, 2), ())

    def chunk(observed: Any, begins: Any) -> Any:
        policy.reset()
        first = [policy.select_action(preprocess(dict(observed))) for _ in range(5)]
        whole = policy.predict_action_chunk(preprocess(dict(observed)))
        assert torch.equal(torch.stack(first, 1), whole[:, :5])
        return postprocess(whole)

    assert_same_episodes(artifact, chunk, rows=1)


@pytest.mark.wide
def test_a_saved_policy_takes_what_cameras_give(tmp_path: Path) -> None:
    configuration = ACTConfig(input_features=STATE | CAMERA, chunk_size=8, n_action_steps=5, **SMALL)
    parts = made(ACTPolicy, configuration)
    for part in parts:
        part.save_pretrained(tmp_path / "saved")
    artifact = published(from_lerobot(tmp_path / "saved", channels_last=True), tmp_path / "store")
    signature = artifact.manifest.signature
    assert [str(spec) for spec in signature.observations] == ["float32[5]", "uint8[32, 40, 3]"]
    act = plays(*parts)

    def seen(observed: Any, begins: Any) -> Any:
        name = "observation.images.top"
        return act({**observed, name: observed[name].permute(0, 3, 1, 2).float() / 255}, begins)

    assert_same_episodes(artifact, seen, rows=1)


@pytest.mark.wide
def test_diffusion_plans_whole_chunks_from_the_last_observations(tmp_path: Path) -> None:
    configuration = DiffusionConfig(
        input_features=STATE | PLACES, output_features=ACTION, horizon=8, n_action_steps=4, down_dims=(16, 32),
        diffusion_step_embed_dim=16, n_groups=4, num_train_timesteps=10, num_inference_steps=2, device="cpu",
    )  # fmt: skip
    artifact = published(from_lerobot(*made(DiffusionPolicy, configuration), whole_chunks=True), tmp_path)
    signature = artifact.manifest.signature
    assert signature.chunk == Chunk("action", 4)
    assert (signature.action.shape, signature.state) == ((4, 2), ())
    assert [str(spec) for spec in signature.observations] == ["float32[2, 5]", "float32[2, 3]"]
    assert artifact.manifest.certificate["original"]["action_disagreements"] == 0


@pytest.mark.wide
@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM"])
def test_the_noise_of_diffusion_is_an_input(scheduler: str, tmp_path: Path) -> None:
    configuration = DiffusionConfig(
        input_features=STATE | PLACES, output_features=ACTION, horizon=8, n_action_steps=4, down_dims=(16, 32),
        diffusion_step_embed_dim=16, n_groups=4, num_train_timesteps=10, num_inference_steps=3,
        noise_scheduler_type=scheduler, device="cpu",
    )  # fmt: skip
    artifact = published(from_lerobot(*made(DiffusionPolicy, configuration)), tmp_path)
    signature = artifact.manifest.signature
    assert signature.exploration == ("random",)
    assert len(signature.noise) == (3 if scheduler == "DDPM" else 1)
    # `select_action` got the same noise, the same observations of two steps, and the same chunk.
    assert artifact.manifest.certificate["original"]["action_disagreements"] == 0


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureFailed, match="expected a policy of LeRobot of the types act, diffusion; got a Linear"):
        from_lerobot(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"is no saved policy of LeRobot: it has no config\.json"):
        from_lerobot(tmp_path)
