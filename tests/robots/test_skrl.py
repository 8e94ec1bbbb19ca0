from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from skrl.agents.torch.dqn import DQN, DQN_CFG
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model, MultiCategoricalMixin
from skrl.resources.preprocessors.torch import RunningStandardScaler
from torch import nn

from actserve.core.errors import CaptureFailed
from actserve_export import from_skrl
from tests.robots.episodes import assert_same_episodes, published

SEEN, WORLD = gymnasium.spaces.Box(-10, 10, (6,)), gymnasium.spaces.Box(-1, 1, (3,))
FORCES = gymnasium.spaces.Box(-1, 1, (2,))
CHOICE, CHOICES = gymnasium.spaces.Discrete(4), gymnasium.spaces.MultiDiscrete([2, 3])


class Gaussian(GaussianMixin, Model):
    def __init__(self) -> None:
        Model.__init__(self, observation_space=SEEN, action_space=FORCES, device="cpu")
        GaussianMixin.__init__(self, clip_actions=True, clip_mean_actions=True)
        self.network = nn.Sequential(nn.Linear(6, 16), nn.ELU(), nn.Linear(16, 2))
        self.log_std = nn.Parameter(torch.full((2,), -0.5))

    def compute(self, inputs: Any, role: str) -> Any:
        return self.network(inputs["observations"]), {"log_std": self.log_std}


class Recurrent(GaussianMixin, Model):
    def __init__(self) -> None:
        Model.__init__(self, observation_space=SEEN, state_space=WORLD, action_space=FORCES, device="cpu")
        GaussianMixin.__init__(self)
        self.lstm, self.head = nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(11, 2)
        self.log_std = nn.Parameter(torch.zeros(2))

    def get_specification(self) -> Any:
        return {"rnn": {"sequence_length": 4, "sizes": [(2, 1, 8), (2, 1, 8)]}}

    def compute(self, inputs: Any, role: str) -> Any:
        output, after = self.lstm(inputs["observations"].unsqueeze(1), tuple(inputs["rnn"]))
        features = torch.cat([output.squeeze(1), inputs["states"]], -1)
        return torch.tanh(self.head(features)), {"log_std": self.log_std, "rnn": list(after)}


class Choice(CategoricalMixin, Model):
    def __init__(self) -> None:
        Model.__init__(self, observation_space=SEEN, action_space=CHOICE, device="cpu")
        CategoricalMixin.__init__(self)
        self.network = nn.Linear(6, 4)

    def compute(self, inputs: Any, role: str) -> Any:
        return self.network(inputs["observations"]), {}


class Choices(MultiCategoricalMixin, Model):
    def __init__(self) -> None:
        Model.__init__(self, observation_space=SEEN, action_space=CHOICES, device="cpu")
        MultiCategoricalMixin.__init__(self)
        self.network = nn.Linear(6, 5)

    def compute(self, inputs: Any, role: str) -> Any:
        return self.network(inputs["observations"]), {}


class Values(DeterministicMixin, Model):
    def __init__(self) -> None:
        Model.__init__(self, observation_space=SEEN, action_space=CHOICE, device="cpu")
        DeterministicMixin.__init__(self)
        self.network = nn.Linear(6, 4)

    def compute(self, inputs: Any, role: str) -> Any:
        return self.network(inputs["observations"]), {}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.wide
def test_an_agents_statistics_are_a_part_of_it(tmp_path: Path) -> None:
    configuration = PPO_CFG(
        observation_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs={"size": SEEN, "device": "cpu"},
    )
    models = {"policy": Gaussian(), "value": Gaussian()}
    agent = PPO(models=models, observation_space=SEEN, action_space=FORCES, device="cpu", cfg=configuration)
    agent._observation_preprocessor(3 * torch.randn(100, 6) + 1, train=True)
    agent.act(torch.randn(3, 6), None, timestep=0, timesteps=1)  # its results have a history and cannot be copied
    artifact = published(from_skrl(agent), tmp_path)
    assert "statistics" in artifact.manifest.certificate

    def act(observed: Any, begins: Any) -> Any:
        return agent.act(observed["observation"], None, timestep=0, timesteps=1)[1]["mean_actions"]

    assert_same_episodes(artifact, act)


def test_a_recurrent_policy_that_reads_the_environments_state(tmp_path: Path) -> None:
    model = Recurrent()
    artifact = published(from_skrl(model), tmp_path)
    memory = [torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)]

    def act(observed: Any, begins: Any) -> Any:
        for tensor in memory:
            tensor[:, begins] = 0
        inputs = {"observations": observed["observation"], "states": observed["states"], "rnn": memory}
        _, outputs = model.act(inputs, role="policy")
        memory[:] = outputs["rnn"]
        return outputs["mean_actions"]

    assert_same_episodes(artifact, act)


@pytest.mark.wide
def test_a_choice_is_the_most_likely_one(tmp_path: Path) -> None:
    model = Choice()
    artifact = published(from_skrl(model), tmp_path)
    assert_same_episodes(artifact, lambda observed, begins: model.network(observed["observation"]).argmax(1))


@pytest.mark.wide
def test_several_choices(tmp_path: Path) -> None:
    model = Choices()

    def act(observed: Any, begins: Any) -> Any:
        return torch.stack([part.argmax(1) for part in model.network(observed["observation"]).split([2, 3], 1)], 1)

    assert_same_episodes(published(from_skrl(model), tmp_path), act)


@pytest.mark.wide
def test_the_largest_value_is_the_action(tmp_path: Path) -> None:
    models = {"q_network": Values(), "target_q_network": Values()}
    agent = DQN(models=models, observation_space=SEEN, action_space=CHOICE, device="cpu", cfg=DQN_CFG())
    artifact = published(from_skrl(agent), tmp_path)
    assert artifact.manifest.signature.output_names == ("action", "action_value")

    def act(observed: Any, begins: Any) -> Any:
        return agent.act(observed["observation"], None, timestep=0, timesteps=1)[0].reshape(-1)

    assert_same_episodes(artifact, act)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(CaptureFailed, match="expected an agent or a model of skrl, on PyTorch; got a Linear"):
        from_skrl(nn.Linear(2, 2))
