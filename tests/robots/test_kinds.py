"""One policy of each library, as both programs: the rows of the table of kinds that need these libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from torchrl.modules import DTActor, OnlineDTActor, TanhDelta, TanhNormal

from actserve.core.completion import complete
from actserve.core.signature import Arrays
from actserve.engine.runtimes.load import load
from actserve.store.local import ModelStore
from actserve_export import PolicySource, from_lerobot, from_rl_games, from_rsl_rl, from_skrl
from actserve_export.publish import RUNTIMES, export
from tests import kinds
from tests.robots import test_lerobot, test_rl_games, test_rsl_rl, test_skrl
from tests.robots.test_transformers import decision_transformer

ROWS, STEPS = 5, 200


def act_of_lerobot() -> PolicySource:
    seen = test_lerobot.STATE | test_lerobot.PLACES
    configuration = ACTConfig(input_features=seen, chunk_size=8, n_action_steps=5, **test_lerobot.SMALL)
    return from_lerobot(*test_lerobot.made(ACTPolicy, configuration))


def diffusion_of_lerobot() -> PolicySource:
    configuration = DiffusionConfig(
        input_features=test_lerobot.STATE | test_lerobot.PLACES, output_features=test_lerobot.ACTION, device="cpu",
        down_dims=(16, 32), diffusion_step_embed_dim=8, num_train_timesteps=5, n_groups=4,
    )  # fmt: skip
    return from_lerobot(*test_lerobot.made(DiffusionPolicy, configuration))


SOURCES: dict[str, Callable[[], PolicySource]] = {
    "rsl_rl_mlp": lambda: from_rsl_rl(test_rsl_rl.MODELS["mlp"](), test_rsl_rl.OBSERVED),
    "rsl_rl_lstm": lambda: from_rsl_rl(test_rsl_rl.MODELS["lstm, 2 layers"](), test_rsl_rl.OBSERVED),
    "rsl_rl_cnn": lambda: from_rsl_rl(test_rsl_rl.MODELS["camera"](), test_rsl_rl.OBSERVED),
    "skrl_gaussian": lambda: from_skrl(test_skrl.Gaussian()),
    "skrl_recurrent": lambda: from_skrl(test_skrl.Recurrent()),
    "skrl_choice": lambda: from_skrl(test_skrl.Choice()),
    "rl_games_ppo": lambda: from_rl_games(test_rl_games.PLAYERS["lstm, 2 layers"]()),
    "rl_games_sac": lambda: from_rl_games(test_rl_games.PLAYERS["sac"]()),
    "lerobot_act": act_of_lerobot,
    "lerobot_diffusion": diffusion_of_lerobot,
    "decision_transformer": lambda: decision_transformer(DTActor, ["param"], TanhDelta),
    "online_decision_transformer": lambda: decision_transformer(OnlineDTActor, ["loc", "scale"], TanhNormal),
}


@pytest.mark.wide
@pytest.mark.parametrize("kind", SOURCES)
def test_a_kind_is_exported_and_acts_singly_and_batched(kind: str, tmp_path: Path) -> None:
    """The certificate compares both programs with the library's own policy."""
    torch.manual_seed(0)
    artifact = export(SOURCES[kind](), "robot", ModelStore(tmp_path), origin="x", runtimes=RUNTIMES).artifact
    signature = artifact.manifest.signature
    assert set(artifact.manifest.certificate["programs"]) == set(RUNTIMES)
    programs = {runtime: load(runtime, artifact) for runtime in RUNTIMES}
    rows = min(ROWS, signature.max_batch)
    for exploration in signature.exploration:
        rng = np.random.default_rng(0)
        state: Arrays = {}
        for step in range(STEPS if signature.state else 2):
            given = {spec.name: spec.sample(rng, rows) for spec in signature.observations}
            if signature.is_init:
                given["is_init"] = (rng.random(rows) < 0.05) | (step == 0)
            inputs = complete(signature, given | state, rows, exploration, step).inputs
            expected = programs["onnx"].run(inputs)
            first = {name: array[:1] for name, array in inputs.items()}
            for program in programs.values():
                assert_near(program.run(inputs), expected)
                assert_near(program.run(first), {name: array[:1] for name, array in expected.items()})
            state = {each.spec.name: expected[each.output] for each in signature.state}
        for runtime in RUNTIMES:
            kinds.record(kind, runtime, exploration, signature.max_batch)


def assert_near(ours: Arrays, theirs: Arrays) -> None:
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, atol=1e-4, rtol=1e-4)


def test_every_row_of_these_libraries_is_made() -> None:
    assert set(kinds.TITLES_OF_LIBRARIES) == set(SOURCES) | set(kinds.OF_LIBRARIES)
