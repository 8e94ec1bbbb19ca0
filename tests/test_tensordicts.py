"""TensorDicts and named arrays, without a service."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from actserve.client.tensordicts import read_tensordict, wanted_exploration, write_tensordict
from actserve.core.signature import Signature, State, TensorSpec

AGENTS = 3
SIGNATURE = Signature(
    observations=(TensorSpec("agents_observation", "float32", (AGENTS, 2)),),
    outputs=(TensorSpec("agents_action", "int64", (AGENTS,)), TensorSpec("value", "float32", ())),
    max_batch=16,
    state=(State(TensorSpec("agents_memory", "float32", (AGENTS, 4)), "next_agents_memory"),),
)


@pytest.mark.parametrize("batch", [(), (5,), (2, 4)])
def test_results_go_into_the_nested_tensordicts_of_their_names(batch: tuple[int, ...]) -> None:
    group = TensorDict({"observation": torch.randn(*batch, AGENTS, 2)}, [*batch, AGENTS])
    tensordict = TensorDict({"agents": group}, batch)
    items = batch and (int(np.prod(batch)),)
    given = read_tensordict(tensordict, SIGNATURE)["agents_observation"]
    assert given.shape == (*items, AGENTS, 2)
    np.testing.assert_array_equal(given.reshape(*batch, AGENTS, 2), group["observation"].numpy())
    results = {
        "agents_action": np.arange(np.prod((*items, AGENTS), dtype=int)).reshape(*items, AGENTS),
        "value": np.ones(items, np.float32),
        "agents_memory": np.ones((*items, AGENTS, 4), np.float32),
    }
    written = write_tensordict(tensordict, results, SIGNATURE, 7)
    assert written is tensordict
    assert written["agents", "action"].flatten().tolist() == list(range(results["agents_action"].size))
    assert written["agents", "action"].shape == (*batch, AGENTS)
    assert written["next", "agents", "memory"].shape == (*batch, AGENTS, 4)
    assert written["value"].shape == batch
    assert written["policy_version"].tolist() == np.full(batch, 7).tolist()


def test_a_mode_that_the_policy_lacks_is_left_to_the_service() -> None:
    assert SIGNATURE.exploration == ("deterministic",)
    assert wanted_exploration(SIGNATURE) is None
