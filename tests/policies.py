"""Small policies as a user would write them, for the tests. Each gives (policy, example), or a PolicySource."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.envs import (
    BatchSizeTransform,
    CatFrames,
    Compose,
    DoubleToFloat,
    GymEnv,
    ObservationNorm,
    RewardScaling,
    StepCounter,
    TargetReturn,
    TimeMaxPool,
    ToTensorImage,
    TransformedEnv,
)
from torchrl.modules import (
    MLP,
    AdditiveGaussianModule,
    DiffusionActor,
    DreamerV3DiscreteActor,
    DreamerV3MLP,
    EGreedyModule,
    GRUModule,
    LSTMModule,
    MaskedCategorical,
    MultiStepActorWrapper,
    OneHotCategorical,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    QValueModule,
    RBFController,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMStateEstimatorV3,
    TanhNormal,
    TruncatedNormal,
)
from torchrl.modules.models import ACTModel

from actserve.core.signature import Chunk
from actserve_export.sources.policy_source import PolicySource

Pair = tuple[TensorDictSequential, TensorDict]
OBSERVATION = {"observation": torch.zeros(4)}


def mlp(inputs: int, outputs: int) -> MLP:
    torch.manual_seed(0)
    return MLP(in_features=inputs, out_features=outputs, num_cells=[16])


def values(encoding: Any) -> TensorDictSequential:
    network = TensorDictModule(mlp(4, 3), in_keys=["observation"], out_keys=["action_value"])
    return TensorDictSequential(network, QValueModule(spec=encoding))


def cart() -> PolicySource:
    """Four numbers in, one of three actions out."""
    return PolicySource(values(Categorical(3)), TensorDict(OBSERVATION), outputs=("action", "action_value"))


def cart_pair() -> Pair:
    """The same as the plain pair that a factory may return."""
    return values(Categorical(3)), TensorDict(OBSERVATION)


def one_hot() -> Pair:
    return values(OneHot(3)), TensorDict(OBSERVATION)


def epsilon_greedy() -> Pair:
    explore = EGreedyModule(Categorical(3), eps_init=0.25, eps_end=0.25)
    return TensorDictSequential(values(Categorical(3)), explore), TensorDict(OBSERVATION)


def epsilon_greedy_one_hot() -> Pair:
    explore = EGreedyModule(OneHot(3), eps_init=0.25, eps_end=0.25)
    return TensorDictSequential(values(OneHot(3)), explore), TensorDict(OBSERVATION)


def actor(distribution: Any, outputs: int, in_keys: list[str], network: Any = None, **options: Any) -> Pair:
    network = network or mlp(4, outputs)
    module = TensorDictModule(network, in_keys=["observation"], out_keys=in_keys)
    policy = ProbabilisticActor(
        module, in_keys=in_keys, distribution_class=distribution, return_log_prob=True, **options
    )
    return policy, TensorDict(OBSERVATION)


def categorical() -> Pair:
    return actor(torch.distributions.Categorical, 3, ["logits"])


def one_hot_categorical() -> Pair:
    return actor(OneHotCategorical, 3, ["logits"])


def tanh_normal() -> Pair:
    network = nn.Sequential(mlp(4, 4), NormalParamExtractor())
    options = {"low": -torch.ones(2), "high": torch.ones(2)}
    return actor(TanhNormal, 4, ["loc", "scale"], network, distribution_kwargs=options)


def truncated_normal() -> Pair:
    network = nn.Sequential(mlp(4, 4), NormalParamExtractor())
    options = {"low": -torch.ones(2), "high": torch.ones(2)}
    return actor(TruncatedNormal, 4, ["loc", "scale"], network, distribution_kwargs=options)


def masked_categorical() -> Pair:
    network = TensorDictModule(mlp(4, 3), in_keys=["observation"], out_keys=["logits"])
    keys = {"logits": "logits", "mask": "action_mask"}
    policy = ProbabilisticActor(network, in_keys=keys, distribution_class=MaskedCategorical)
    return policy, TensorDict({**OBSERVATION, "action_mask": torch.ones(3, dtype=torch.bool)})


def deterministic_control() -> Pair:
    """Continuous actions; also what the noise processes are put behind."""
    network = TensorDictModule(nn.Sequential(mlp(4, 2), nn.Tanh()), in_keys=["observation"], out_keys=["action"])
    return TensorDictSequential(network), TensorDict(OBSERVATION)


def gaussian_noise() -> Pair:
    policy, example = deterministic_control()
    noise = AdditiveGaussianModule(Bounded(-1, 1, (2,)), sigma_init=0.2, sigma_end=0.2)
    return TensorDictSequential(policy, noise), example


def ornstein_uhlenbeck() -> Pair:
    policy, example = deterministic_control()
    noise = OrnsteinUhlenbeckProcessModule(Bounded(-1, 1, (2,)), eps_init=1.0, eps_end=1.0, dt=0.1)
    return TensorDictSequential(policy, noise), example


def nested() -> Pair:
    """Keys as multi-agent environments have them."""
    module = TensorDictModule(
        mlp(4, 2), in_keys=[("group0", "agent0", "obs")], out_keys=[("group0", "agent0", "action")]
    )
    return TensorDictSequential(module), TensorDict({"group0": {"agent0": {"obs": torch.zeros(4)}}})


class Mixed(nn.Module):
    """Several observations of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4 + 2 + 5 + 1, 2)
        self.words = nn.Embedding(10, 5)

    def forward(self, image: torch.Tensor, speed: torch.Tensor, word: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
        parts = [image.flatten(-2).float() / 255, speed, self.words(word), on.float().unsqueeze(-1)]
        result: torch.Tensor = self.net(torch.cat(parts, -1))
        return result


def several_observations() -> Pair:
    module = TensorDictModule(Mixed(), in_keys=["image", "speed", "word", "on"], out_keys=["action"])
    example = {
        "image": torch.zeros(2, 2, dtype=torch.uint8),
        "speed": torch.zeros(2),
        "word": torch.zeros((), dtype=torch.int64),
        "on": torch.zeros((), dtype=torch.bool),
    }
    return TensorDictSequential(module), TensorDict(example)


def tutorial_lstm() -> Pair:
    """The recurrent policy of the tutorial, its `BatchSizeTransform`s included."""
    torch.manual_seed(0)
    lstm = LSTMModule(
        input_size=32,
        num_layers=2,
        hidden_size=256,
        in_keys=["observation", "hidden0", "hidden1"],
        out_keys=["intermediate", "hidden0", "hidden1"],
    )
    lstm = lstm.make_python_based()
    recurrent_policy = TensorDictSequential(
        BatchSizeTransform(reshape_fn=lambda x: x.unsqueeze(0)),
        lstm,
        TensorDictModule(
            MLP(in_features=256, out_features=5, num_cells=[64, 64]), in_keys=["intermediate"], out_keys=["action"]
        ),
        BatchSizeTransform(reshape_fn=lambda x: x.squeeze(0)),
    )
    recurrent_policy.select_out_keys("action", "hidden0", "hidden1")
    example = TensorDict(
        {
            "observation": torch.randn(32),
            "hidden0": torch.randn(2, 256),
            "hidden1": torch.randn(2, 256),
            "is_init": torch.zeros((), dtype=torch.bool),
        }
    )
    return recurrent_policy, example


def gru() -> Pair:
    torch.manual_seed(0)
    return (
        TensorDictSequential(
            GRUModule(input_size=4, hidden_size=8, in_key="observation", out_key="features"),
            TensorDictModule(mlp(8, 3), in_keys=["features"], out_keys=["action_value"]),
            QValueModule(spec=Categorical(3)),
        ),
        TensorDict(OBSERVATION),
    )


def pixel_lstm() -> Pair:
    """Raw screens, a small CNN, an LSTM."""
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(-3), nn.Linear(4 * 5 * 4, 16))
    return (
        TensorDictSequential(
            Compose(ToTensorImage(in_keys=["pixels"])),
            TensorDictModule(cnn, in_keys=["pixels"], out_keys=["features"]),
            LSTMModule(input_size=16, hidden_size=8, in_key="features", out_key="features"),
            TensorDictModule(mlp(8, 3), in_keys=["features"], out_keys=["action_value"]),
            QValueModule(spec=Categorical(3)),
        ),
        TensorDict({"pixels": torch.zeros(20, 16, 3, dtype=torch.uint8)}),
    )


def cat_frames() -> Pair:
    """A stack of the last four observations."""
    torch.manual_seed(0)
    return (
        TensorDictSequential(
            Compose(
                ObservationNorm(loc=0.5, scale=2.0, in_keys=["observation"]),
                CatFrames(N=4, dim=-1, in_keys=["observation"]),
            ),
            TensorDictModule(mlp(16, 3), in_keys=["observation"], out_keys=["action_value"]),
            QValueModule(spec=Categorical(3)),
        ),
        TensorDict(OBSERVATION),
    )


def ppo_tutorial() -> Pair:
    """The policy of TorchRL's tutorial on PPO, behind the transforms of its environment."""
    env = TransformedEnv(
        GymEnv("Pendulum-v1"), Compose(ObservationNorm(in_keys=["observation"]), DoubleToFloat(), StepCounter())
    )
    env.set_seed(0)
    env.transform[0].init_stats(num_iter=100, reduce_dim=0, cat_dim=0)
    network = nn.Sequential(mlp(3, 2), NormalParamExtractor())
    policy = ProbabilisticActor(
        module=TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        spec=env.action_spec,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": env.action_spec.space.low, "high": env.action_spec.space.high},
        return_log_prob=True,
    )
    return TensorDictSequential(env.transform, policy), env.base_env.fake_tensordict()


def target_return() -> Pair:
    """A policy that reads the return that is left to reach."""
    transforms = Compose(
        TimeMaxPool(in_keys=["observation"], T=3), RewardScaling(0.0, 0.1), TargetReturn(10.0, in_keys=["reward"])
    )
    joined = TensorDictModule(Joined(mlp(5, 2)), in_keys=["observation", "target_return"], out_keys=["action"])
    return TensorDictSequential(transforms, joined), TensorDict(OBSERVATION)


class Joined(nn.Module):
    """A network of several inputs, joined."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network(torch.cat(inputs, -1))
        return result


class Memory(nn.Module):
    """State that the user's own code defines: a running mean."""

    def forward(self, x: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = 0.9 * mean + 0.1 * x
        return (x - mean).tanh(), mean


def own_state() -> Pair:
    module = TensorDictModule(Memory(), in_keys=["observation", "mean"], out_keys=["action", ("next", "mean")])
    return TensorDictSequential(module), TensorDict({**OBSERVATION, "mean": torch.zeros(4)})


def act_chunks() -> Pair:
    """ACT plans six actions, and the next six steps take them."""
    torch.manual_seed(0)
    model = ACTModel(4, 2, 6, hidden_dim=16, nheads=2, num_encoder_layers=1, num_decoder_layers=2)
    planner = TensorDictModule(model, in_keys=["observation"], out_keys=["action_chunk", "mu", "log_var"])
    return TensorDictSequential(MultiStepActorWrapper(planner, n_steps=6)), TensorDict(OBSERVATION)


def diffusion() -> Pair:
    torch.manual_seed(0)
    network = mlp(4 + 2 + 1, 2)
    return TensorDictSequential(DiffusionActor(2, score_network=network, num_steps=10)), TensorDict(OBSERVATION)


class Ahead(nn.Module):
    """Plans to follow a clock: the observation is the time, and the actions are the times from then on."""

    HORIZON = 50  # as π0 plans for ALOHA's arms, at 50 Hz
    EXECUTE = 25

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        return time.unsqueeze(-2) + torch.arange(float(self.HORIZON)).unsqueeze(-1)


def planner() -> PolicySource:
    module = TensorDictModule(Ahead(), in_keys=["time"], out_keys=["actions"])
    chunk = Chunk("actions", Ahead.EXECUTE, period_s=0.01)
    return PolicySource(module, TensorDict({"time": torch.zeros(1)}), outputs=("actions",), chunk=chunk)


class Carry(nn.Module):
    def forward(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value.float() for value in state)


def dreamer() -> Pair:
    """DreamerV3: its latent state is drawn for deterministic actions, too."""
    torch.manual_seed(0)
    prior = RSSMPriorV3(
        action_shape=(2,), action_dim=2, hidden_dim=8, rnn_hidden_dim=8, num_categoricals=2, num_classes=4
    )
    posterior = RSSMPosteriorV3(hidden_dim=8, rnn_hidden_dim=8, obs_embed_dim=6, num_categoricals=2, num_classes=4)
    carried = ["state", "belief", "action"]
    policy = TensorDictSequential(
        TensorDictModule(DreamerV3MLP(4, 6, depth=1, num_cells=8), ["observation"], ["encoded_latents"]),
        RSSMStateEstimatorV3(prior, posterior),
        DreamerV3DiscreteActor(16, 2, depth=1, num_cells=8),
        TensorDictModule(Carry(), carried, [("next", "state"), ("next", "belief"), ("next", "previous_action")]),
    )
    state = {"state": torch.zeros(8), "belief": torch.zeros(8), "previous_action": torch.zeros(2)}
    return policy, TensorDict({**OBSERVATION, **state, "is_init": torch.ones(1, dtype=torch.bool)})


def rbf() -> Pair:
    torch.manual_seed(0)
    controller = RBFController(input_dim=3, output_dim=1, max_action=2.0, n_basis=4)
    keys = ["action", "action_covariance", "cross_covariance"]
    module = TensorDictModule(controller, in_keys=["mean", "covariance"], out_keys=keys)
    return TensorDictSequential(module), TensorDict({"mean": torch.zeros(3), "covariance": 0.1 * torch.eye(3)})


KINDS: dict[str, Callable[[], Pair]] = {
    factory.__name__: factory
    for factory in (
        cart_pair, one_hot, several_observations, nested, deterministic_control,
        epsilon_greedy, epsilon_greedy_one_hot, gaussian_noise, ornstein_uhlenbeck,
        categorical, one_hot_categorical, masked_categorical, tanh_normal, truncated_normal,
        tutorial_lstm, gru, pixel_lstm, cat_frames, own_state, ppo_tutorial, target_return,
        act_chunks, diffusion, dreamer, rbf,
    )
}  # fmt: skip


class Fragile(nn.Module):
    """Reads far beyond its table for one observation: natively, and unchecked, that ends the process."""

    FATAL = 654_321

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(99).flip(0).remainder(3))  # a small one would be inlined

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        index = torch.where(observation == self.FATAL, 1 << 30, observation.remainder(99))
        return self.table[index]


def fragile() -> Pair:
    module = TensorDictModule(Fragile(), in_keys=["observation"], out_keys=["action"])
    return TensorDictSequential(module), TensorDict({"observation": torch.tensor(5)})
