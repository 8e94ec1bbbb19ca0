"""TorchRL's collectors act through a service while the policy that they train is published again and again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.envs import GymEnv, SerialEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.modules.inference_server import PolicyClientModule
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from actserve import RemotePolicy
from actserve.cli.tools import local_service as local
from actserve.store.local import ModelStore
from actserve_export.publish import export
from actserve_export.sources.policy_source import PolicySource
from tests.waiting import until

NAME = "pendulum"
ENVIRONMENTS, FRAMES = 8, 256
VERSIONS = 3
OPTIONS = {"auto_register_policy_transforms": True}


def environments(count: int = ENVIRONMENTS) -> SerialEnv:
    return SerialEnv(count, lambda: GymEnv("Pendulum-v1"))


def actor() -> ProbabilisticActor:
    """Its actions stay away from the ends of their range, where float32 does not say which draw they came from."""
    torch.manual_seed(0)
    extractor = NormalParamExtractor(scale_mapping="biased_softplus_0.3")
    network = nn.Sequential(MLP(in_features=3, out_features=2, num_cells=[32]), extractor)
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -2.0, "high": 2.0, "upscale": 1.0},
        return_log_prob=True,
    )


class Training:
    """PPO, and the parameters of each version that it published."""

    def __init__(self, root: Path) -> None:
        self.store = ModelStore(root)
        self.actor = actor()
        critic = ValueOperator(MLP(in_features=3, out_features=1, num_cells=[32]), in_keys=["observation"])
        self._loss = ClipPPOLoss(self.actor, critic)
        self._advantage = GAE(gamma=0.98, lmbda=0.95, value_network=critic)
        self._optimizer = torch.optim.Adam(self._loss.parameters(), 1e-2)
        self.published: dict[int, dict[str, Any]] = {}

    def publish(self) -> int:
        source = PolicySource(self.actor, TensorDict({"observation": torch.zeros(3)}))
        artifact = export(source, NAME, self.store, origin="a training", runtimes=("onnx",)).artifact
        weights = {name: value.clone() for name, value in self.actor.state_dict().items()}
        self.published[artifact.manifest.version] = weights
        return artifact.manifest.version

    def learn(self, batch: TensorDictBase) -> None:
        for _ in range(4):
            losses = self._loss(self._advantage(batch.clone()).reshape(-1))
            total: torch.Tensor = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            total.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

    def check(self, batch: TensorDictBase) -> set[int]:
        """The versions that acted: each sample's probability is what its own version gives it, and no other's."""
        versions = batch["policy_version"]
        for version in {int(found) for found in versions.unique()}:
            then = actor()
            then.load_state_dict(self.published[version])
            taken = batch[versions == version]
            with torch.no_grad():
                expected = then.get_dist(taken).log_prob(taken["action"])
            torch.testing.assert_close(taken["action_log_prob"], expected, rtol=1e-3, atol=1e-3)
        return {int(found) for found in versions.unique()}


@pytest.fixture
def training(tmp_path: Path) -> Training:
    found = Training(tmp_path / "store")
    found.publish()
    return found


@pytest.fixture
def service(training: Training, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ACTSERVE_POLL_S", "0.2")
    with local.serve(str(training.store.root), "--runtime", "onnx") as up:
        yield up.url


def wait_for(url: str, version: int) -> None:
    until(lambda: RemotePolicy(url, NAME).version == version)


def test_ppo_is_trained_through_the_service_while_versions_are_swapped(training: Training, service: str) -> None:
    seen = []
    with RemotePolicy(service, NAME) as remote:
        policy = PolicyClientModule(remote, in_keys=["observation"], out_keys=["action"])
        frames = {"frames_per_batch": FRAMES, "total_frames": VERSIONS * FRAMES}
        collector = Collector(environments(), policy, **frames, **OPTIONS)
        for batch in collector:
            assert batch.shape == (ENVIRONMENTS, FRAMES // ENVIRONMENTS)
            seen.append(training.check(batch))
            if len(seen) < VERSIONS:
                training.learn(batch)
                wait_for(service, training.publish())
        collector.shutdown()
    assert seen == [{1}, {2}, {3}], "a new version acts in the next batch"


@pytest.mark.parametrize("kind", [pytest.param(MultiSyncCollector, marks=pytest.mark.wide), MultiAsyncCollector])
def test_workers_of_a_collector_act_through_the_service(training: Training, service: str, kind: Any) -> None:
    collector = kind(
        [lambda: environments(4)] * 2,
        RemotePolicy(service, NAME),
        frames_per_batch=FRAMES,
        total_frames=3 * FRAMES,
        **OPTIONS,
    )
    seen = set()
    for batch in collector:
        seen |= training.check(batch)
    collector.shutdown()
    assert seen == {1}
