from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import actserve_export
from actserve.core.errors import CaptureFailed, UsageError
from actserve_export.capture import capture
from actserve_export.targets import find_source

BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class QNetwork(nn.Module):
    """As CleanRL's dqn.py has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.network(x)
        return values


class Agent(nn.Module):
    """As CleanRL's ppo_continuous_action.py has it: its forward is not the policy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.critic = nn.Linear(4, 1)
        self.actor_mean = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.actor_logstd = nn.Parameter(torch.full((1, 2), -1.0))

    def get_action_and_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean = self.actor_mean(x)
        probs = Normal(mean, torch.exp(self.actor_logstd.expand_as(mean)))
        action = probs.sample()
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), self.critic(x)


class Two(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left - right, left + right


def q_network() -> Any:
    return QNetwork(), torch.zeros(4)


def answers(source: Any, **inputs: Any) -> Any:
    return capture(source).run_reference({name: value.numpy() for name, value in inputs.items()})


def test_the_largest_value_is_the_action() -> None:
    network = QNetwork()
    given = answers(actserve_export.from_module(network, torch.zeros(4), "argmax"), observation=BATCH)
    values = network(BATCH).detach().numpy()
    np.testing.assert_array_equal(given["action"], values.argmax(1))
    np.testing.assert_array_equal(given["action_value"], values)


def test_inputs_by_name_go_in_in_their_order_and_a_function_takes_the_action_out() -> None:
    items = {"there": torch.zeros(4), "here": torch.zeros(4)}
    source = actserve_export.from_module(Two(), items, lambda output: output[0].clamp(-1, 1))
    given = answers(source, there=BATCH, here=BATCH / 3)
    np.testing.assert_allclose(given["action"], (BATCH - BATCH / 3).clamp(-1, 1).numpy())


def test_an_agent_acts_both_ways() -> None:
    agent = Agent()
    source = actserve_export.from_module(
        agent,
        torch.zeros(4),
        "identity",
        call=lambda agent, x: agent.actor_mean(x),
        sample=lambda agent, x: agent.get_action_and_value(x)[0],
    )
    captured = capture(source)
    assert captured.signature.exploration == ("deterministic", "random")
    noise = np.full((6, 2), 0.5, np.float32)
    inputs = {"observation": BATCH.numpy(), "explore": np.arange(6) % 2 == 0, "noise": noise}
    expected = agent.actor_mean(BATCH).detach().numpy()
    expected[::2] += 0.5 * np.exp(-1)
    np.testing.assert_allclose(captured.run_reference(inputs)["action"], expected, atol=1e-6)


def test_an_action_that_is_none_is_refused() -> None:
    with pytest.raises(CaptureFailed, match="expected an action of argmax, identity or a function; got 'mean'"):
        actserve_export.from_module(QNetwork(), torch.zeros(4), "mean")
    with pytest.raises(CaptureFailed, match="expected a module that gives a tensor; got tuple"):
        capture(actserve_export.from_module(Two(), {"a": torch.zeros(4), "b": torch.zeros(4)}, "identity"))


def test_a_factory_of_a_plain_module_needs_an_action() -> None:
    with pytest.raises(UsageError, match="say what its output is, with --action argmax or identity"):
        find_source("tests.test_modules:q_network")
    name, source = find_source("tests.test_modules:q_network", action="argmax")
    assert name == "q-network"
    assert answers(source, observation=BATCH)["action"].shape == (6,)
    with pytest.raises(UsageError, match="--action is for plain modules"):
        find_source("tests.policies:cart", action="argmax")


def test_a_checkpoint_is_the_modules_own(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor * 0 + 0.5 for name, tensor in QNetwork().state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    _, source = find_source("tests.test_modules:q_network", tmp_path / "weights.safetensors", "argmax")
    assert answers(source, observation=BATCH * 0)["action_value"].tolist() == [[0.5 * 16 * 0.5 + 0.5] * 3] * 6


def test_the_names_that_factories_use() -> None:
    assert {name: getattr(actserve_export, name).__name__ for name in actserve_export.__all__} == {
        name: name
        for name in (
            *("Chunk", "OnnxSource", "PolicySource", "export", "from_module", "from_sb3"),
            *("from_lerobot", "from_rl_games", "from_rsl_rl", "from_skrl", "read_robot"),
        )
    }
    with pytest.raises(AttributeError, match="nothing"):
        _ = actserve_export.nothing
