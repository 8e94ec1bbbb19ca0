from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rsl_rl.models import CNNModel, MLPModel, RNNModel
from tensordict import TensorDict

from actserve.core.errors import CaptureFailed
from actserve_export import from_rsl_rl
from tests.robots.episodes import assert_same_episodes, published

OBSERVED = TensorDict(
    {"policy": torch.zeros(4, 10), "history": torch.zeros(4, 6), "camera": torch.zeros(4, 3, 24, 24)}, batch_size=[4]
)
NORMAL = {"class_name": "GaussianDistribution", "init_std": 0.7}
OF_THE_STATE = {"class_name": "HeteroscedasticGaussianDistribution", "std_type": "log"}
BETA = {"class_name": "BetaDistribution"}
PICTURES = {"cnn_cfg": {"output_channels": [4], "kernel_size": 3, "stride": 4}}


def trained(kind: Any, groups: list[str], distribution: Any = NORMAL, **options: Any) -> Any:
    """An actor after some steps of training: it has statistics, and what the last call left."""
    torch.manual_seed(0)
    model = kind(
        OBSERVED, {"actor": groups}, "actor", 3, hidden_dims=[16], obs_normalization=True,
        distribution_cfg=distribution, **options,
    )  # fmt: skip
    for _ in range(3):
        observed = OBSERVED.apply(lambda tensor: 3 * torch.randn_like(tensor) + 1)
        if model.obs_groups:
            model.update_normalization(observed)
        model(observed, stochastic_output=distribution is not None)
    return model


MODELS = {
    "mlp": lambda: trained(MLPModel, ["policy"]),
    "two groups": lambda: trained(MLPModel, ["policy", "history"], OF_THE_STATE),
    "beta": lambda: trained(MLPModel, ["policy"], BETA),
    "no distribution": lambda: trained(MLPModel, ["policy"], None),
    "lstm, 1 layer": lambda: trained(RNNModel, ["policy"], rnn_hidden_dim=8),
    "lstm, 2 layers": lambda: trained(RNNModel, ["history", "policy"], rnn_hidden_dim=8, rnn_num_layers=2),
    "gru, 1 layer": lambda: trained(RNNModel, ["policy"], rnn_type="gru", rnn_hidden_dim=8),
    "gru, 2 layers": lambda: trained(RNNModel, ["policy"], BETA, rnn_type="gru", rnn_hidden_dim=8, rnn_num_layers=2),
    "camera": lambda: trained(CNNModel, ["policy", "camera"], **PICTURES),
    "camera only": lambda: trained(CNNModel, ["camera"], **PICTURES),
}
ALWAYS = ("two groups", "lstm, 2 layers")


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.wide) for kind in MODELS]
)
def test_an_actor_plays_as_its_inference_policy(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    artifact = published(from_rsl_rl(model, OBSERVED), tmp_path)
    certificate = artifact.manifest.certificate
    samples = model.distribution is not None and "beta" not in kind and kind != "gru, 2 layers"
    assert ("statistics" in certificate) == samples
    model.eval().reset()

    def act(observed: Any, begins: Any) -> Any:
        model.reset(begins)
        return model(TensorDict(observed, batch_size=len(begins)))

    assert_same_episodes(artifact, act)


class Runner:
    def __init__(self, model: Any) -> None:
        self.alg = self.env = self
        self.get_policy = lambda: model
        self.get_observations = lambda: OBSERVED


def test_a_runner_knows_the_observations() -> None:
    source = from_rsl_rl(Runner(MODELS["two groups"]()))
    assert {key: tuple(source.example[key].shape) for key in source.policy.in_keys} == {
        "policy": (10,),
        "history": (6,),
    }


def test_what_is_no_actor_is_refused() -> None:
    with pytest.raises(CaptureFailed, match=r"expected a runner or an actor of rsl_rl.*got a Linear"):
        from_rsl_rl(torch.nn.Linear(2, 2))
    with pytest.raises(CaptureFailed, match="the actor reads policy, history: give one observation of each"):
        from_rsl_rl(MODELS["two groups"]())
    with pytest.raises(CaptureFailed, match="the policy reads history; the example has policy"):
        from_rsl_rl(MODELS["two groups"](), {"policy": torch.zeros(10)})
    with pytest.raises(CaptureFailed, match=r"policy: expected 1 axes, or 2 with a batch; got \[2, 4, 10\]"):
        from_rsl_rl(MODELS["mlp"](), {"policy": torch.zeros(2, 4, 10)})
