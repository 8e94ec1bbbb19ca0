"""Decision transformers, whose network is of the package transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    DecisionTransformerInferenceWrapper,
    DTActor,
    OnlineDTActor,
    ProbabilisticActor,
    TanhDelta,
    TanhNormal,
)

from actserve_export import PolicySource
from tests.robots.episodes import assert_same_episodes, published

CONTEXT = 5
HISTORY = {
    "observation": torch.zeros(CONTEXT, 4),
    "action": torch.zeros(CONTEXT, 2),
    "return_to_go": torch.zeros(CONTEXT, 1),
}
SMALL = {
    "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 32, "n_positions": 32, "activation": "relu",
    "resid_pdrop": 0.1, "attn_pdrop": 0.1,
}  # fmt: skip


def decision_transformer(network: Any, keys: list[str], distribution: Any) -> PolicySource:
    module = TensorDictModule(network(4, 2, SMALL), in_keys=list(HISTORY), out_keys=keys)
    actor = ProbabilisticActor(module, in_keys=keys, distribution_class=distribution)
    policy = DecisionTransformerInferenceWrapper(actor, inference_context=CONTEXT).eval()
    return PolicySource(policy, TensorDict(HISTORY))


@pytest.mark.parametrize(
    ("network", "keys", "distribution"),
    [(DTActor, ["param"], TanhDelta), (OnlineDTActor, ["loc", "scale"], TanhNormal)],
)
def test_a_decision_transformer_reads_its_history(
    network: Any, keys: list[str], distribution: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = decision_transformer(network, keys, distribution)
    artifact = published(source, tmp_path)

    def act(observed: dict[str, Tensor], _: Tensor) -> Tensor:
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            action: Tensor = source.policy(TensorDict(observed, [len(observed["observation"])]))["action"]
        return action

    assert_same_episodes(artifact, act)
