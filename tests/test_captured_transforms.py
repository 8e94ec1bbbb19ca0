"""Policies behind transforms, compared with TorchRL's environments step by step: 200 steps, with new episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded, Unbounded
from torchrl.envs import TransformedEnv
from torchrl.envs import transforms as torchrl
from torchrl.envs.transforms.transforms import _InvertTransform
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal

from actserve.core.completion import complete
from actserve.core.errors import CaptureFailed
from actserve.core.signature import Arrays
from actserve_export.capture import TracedPolicy, capture
from actserve_export.certify import distributions
from actserve_export.sources import samples
from actserve_export.sources.policy_source import PolicySource
from tests import policies
from tests.replay import ReplayEnv

STEPS, ROWS = 200, 3
ACTION = Bounded(-1, 1, (2,))
FOUR = {"observation": Unbounded((4,))}
DOUBLE = {"observation": Unbounded((4,), dtype=torch.float64)}
SCREEN = {"pixels": Bounded(0, 255, (8, 8, 3), dtype=torch.uint8)}
PAIR = {"a": Unbounded((2,)), "b": Unbounded((2,))}


class Joined(nn.Module):
    """(B, ...) each -> (B, outputs)."""

    def __init__(self, inputs: int, outputs: int, last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = MLP(in_features=inputs, out_features=outputs, num_cells=[16])
        self.last = last

    def forward(self, *inputs: Tensor) -> Any:
        together = torch.cat([x.to(torch.float32) for x in inputs], -1)
        return self.last(self.network(together))


@dataclass(frozen=True)
class Case:
    """Transforms, the environment's observations, and the keys that the policy reads, with their total width."""

    transforms: Callable[[], list[Any]]
    width: int = 4
    reads: tuple[str, ...] = ("observation",)
    observations: Any = None
    state: tuple[str, ...] = ()  # of the program

    def environment(self, seed: int = 0, ends: tuple[int, ...] = ()) -> TransformedEnv:
        base = ReplayEnv(self.observations or FOUR, ACTION, seed, ends)
        return TransformedEnv(base, torchrl.Compose(*self.transforms(), torchrl.StepCounter(step_count_key="steps")))

    def policy(self) -> TensorDictSequential:
        network = Joined(self.width, 2, nn.Tanh())
        return TensorDictSequential(TensorDictModule(network, in_keys=list(self.reads), out_keys=["action"]))

    def source(self, policy: Any) -> PolicySource:
        """As TorchRL's tutorial on export has it: the transforms, all but the last, in front of the policy."""
        environment = self.environment()
        environment.rollout(2)  # its transforms find their keys
        return PolicySource(
            TensorDictSequential(environment.transform[:-1], policy), environment.base_env.fake_tensordict()
        )


CASES = {
    "StepCounter": Case(lambda: [torchrl.StepCounter(max_steps=500)]),
    "StepCounter, read": Case(lambda: [torchrl.StepCounter()], 5, ("observation", "step_count"), None, ("step_count",)),
    "InitTracker": Case(lambda: [torchrl.InitTracker()]),
    "InitTracker, read": Case(lambda: [torchrl.InitTracker(init_key="first")], 5, ("observation", "first")),
    "TensorDictPrimer": Case(lambda: [torchrl.TensorDictPrimer(hidden=Unbounded((3,)))]),
    "TensorDictPrimer, read": Case(
        lambda: [torchrl.TensorDictPrimer(goal=Unbounded((3,)), default_value=0.5)], 7, ("observation", "goal")
    ),
    "RewardSum": Case(lambda: [torchrl.RewardSum()]),
    "RewardSum, read": Case(
        lambda: [torchrl.RewardSum()], 5, ("observation", "episode_reward"), None, ("episode_reward",)
    ),
    "rewards": Case(
        lambda: [
            torchrl.RewardScaling(0.0, 0.1),
            torchrl.RewardClipping(-1, 1),
            torchrl.SignTransform(in_keys=["reward"]),
            torchrl.BinarizeReward(),
            torchrl.VecNormV2(in_keys=["reward"]),
            torchrl.Timer(),
        ]
    ),
    "checks": Case(
        lambda: [
            torchrl.FiniteTensorDictCheck(),
            torchrl.TrajCounter(),
            torchrl.RemoveEmptySpecs(),
            torchrl.DeviceCastTransform("cpu"),
            torchrl.TerminateTransform(lambda td: td["observation"][..., 0] > 100),
            torchrl.ConditionalSkip(lambda td: torch.zeros((), dtype=torch.bool)),
            torchrl.NextObservationDelta(in_keys=["observation"]),
        ]
    ),
    "ObservationNorm": Case(
        lambda: [torchrl.ObservationNorm(loc=0.5, scale=2.0, in_keys=["observation"], in_keys_inv=["action"])]
    ),
    "DoubleToFloat": Case(lambda: [torchrl.DoubleToFloat()], observations=DOUBLE),
    "CatFrames": Case(lambda: [torchrl.CatFrames(N=4, dim=-1, in_keys=["observation"])], 16, state=("frames",)),
    "TimeMaxPool": Case(lambda: [torchrl.TimeMaxPool(in_keys=["observation"], T=3)], state=("pool",)),
    "TargetReturn": Case(
        lambda: [torchrl.RewardScaling(0.0, 0.1), torchrl.TargetReturn(10.0)],
        5,
        ("observation", "target_return"),
        None,
        ("target_return",),
    ),
    "TargetReturn, constant": Case(
        lambda: [torchrl.TargetReturn(10.0, mode="constant")], 5, ("observation", "target_return")
    ),
    "screens": Case(
        lambda: [
            torchrl.ToTensorImage(in_keys=["pixels"]),
            torchrl.PermuteTransform((-1, -2, -3), in_keys=["pixels"]),
            torchrl.CatFrames(N=2, dim=-3, in_keys=["pixels"]),
            torchrl.FlattenObservation(0, 2, in_keys=["pixels"], allow_positive_dim=True),
        ],
        384,
        ("pixels",),
        SCREEN,
        ("frames",),
    ),
    "CatTensors": Case(lambda: [torchrl.CatTensors(in_keys=["a", "b"], out_key="both")], 4, ("both",), PAIR),
    "Stack": Case(
        lambda: [
            torchrl.Stack(in_keys=["a", "b"], out_key="both", dim=0, allow_positive_dim=True),
            torchrl.FlattenObservation(-2, -1, in_keys=["both"]),
        ],
        4,
        ("both",),
        PAIR,
    ),
    "Rename, Select, Exclude": Case(
        lambda: [
            torchrl.RenameTransform(["observation"], ["renamed"]),
            torchrl.ExcludeTransform("other"),
            torchrl.SelectTransform("renamed"),
        ],
        4,
        ("renamed",),
        {**FOUR, "other": Unbounded((3,))},
    ),
    "functions": Case(
        lambda: [
            torchrl.UnaryTransform(in_keys=["observation"], out_keys=["square"], fn=torch.square),
            torchrl.ClipTransform(in_keys=["square", "reward"], low=-1.0, high=1.0),
        ],
        4,
        ("square",),
    ),
}


def played(case: Case, seed: int) -> tuple[list[Any], list[Tensor]]:
    """The observations of TorchRL's environment in `STEPS` steps, and the policy's actions."""
    environment = case.environment(seed, ends=(40 + seed, 41 + seed, 120))
    policy, actions = case.policy(), []
    environment.base_env.recording.steps.clear()
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        tensordict = environment.reset()
        for _ in range(STEPS):
            tensordict = policy(tensordict)
            actions.append(tensordict["action"])
            _, tensordict = environment.step_and_maybe_reset(tensordict)
    return environment.base_env.recording.steps[:STEPS], actions


def served(captured: TracedPolicy, seen: list[list[Any]]) -> list[Arrays]:
    """The captured policy's results for several recordings at once, its state fed back."""
    signature = captured.signature
    state = {part.spec.name: part.initial_value(len(seen)) for part in signature.state}
    results = []
    for row in zip(*seen, strict=True):
        given: Arrays = {}
        for spec in signature.observations:
            values = [step.observation.get(spec.name, step.reward).numpy() for step in row]
            given[spec.name] = np.stack(values).astype(spec.numpy_dtype)
        if signature.is_init:
            given["is_init"] = np.array([step.is_init for step in row])
        results.append(captured.run_reference(given | state))
        state = {part.spec.name: results[-1][part.output] for part in signature.state}
    return results


@pytest.mark.parametrize("name", CASES)
def test_a_policy_behind_transforms_acts_as_in_torchrls_environment(name: str) -> None:
    case = CASES[name]
    captured = capture(case.source(case.policy()))
    assert captured.single_item_reason is None
    assert tuple(part.spec.name for part in captured.signature.state) == case.state
    episodes = [played(case, seed) for seed in range(ROWS)]
    ours = served(captured, [seen for seen, _ in episodes])
    for row, (_, actions) in enumerate(episodes):
        for step, action in enumerate(actions):
            np.testing.assert_allclose(ours[step]["action"][row], action.numpy(), atol=1e-5, err_msg=f"step {step}")


@pytest.mark.parametrize("name", ["StepCounter", "InitTracker", "CatFrames", "TimeMaxPool", "TargetReturn", "checks"])
def test_random_actions_behind_transforms_are_compared_with_the_policys_own(name: str) -> None:
    case = CASES[name]
    network = TensorDictModule(
        Joined(case.width, 4, NormalParamExtractor()), in_keys=list(case.reads), out_keys=["loc", "scale"]
    )
    actor = ProbabilisticActor(network, in_keys=["loc", "scale"], distribution_class=TanhNormal)
    source = case.source(actor)
    captured = capture(source)
    inputs = samples.collect(source, captured.signature, 32)
    assert distributions.compare(captured, source, inputs, 1000)["p"] > distributions.LEVEL


def test_a_function_in_front_reads_what_it_uses() -> None:
    double = torchrl.Compose(lambda td: td.set("double", td["observation"] * 2), torchrl.RewardClipping(-1, 1))
    policy = TensorDictModule(Joined(4, 2, nn.Tanh()), in_keys=["double"], out_keys=["action"])
    example = TensorDict({"observation": torch.zeros(4), "unused": torch.zeros(3)})
    source = PolicySource(TensorDictSequential(double, policy), example)
    captured = capture(source)
    assert [spec.name for spec in captured.signature.observations] == ["observation"]
    observation = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    with torch.no_grad():
        expected = policy(TensorDict({"double": 2 * torch.from_numpy(observation)}, [5]))["action"]
    np.testing.assert_allclose(captured.run_reference({"observation": observation})["action"], expected.numpy())


class Remembers(nn.Module):
    """(observation, the action before, a memory) -> (action, the new memory)."""

    def forward(self, x: Tensor, action: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return (0.1 * x[..., :2] + action + memory[..., :2]).tanh(), 0.5 * memory + 0.1


def test_what_a_primer_primes_and_the_policy_changes_is_state_and_begins_anew_with_each_episode() -> None:
    primer = {"memory": Unbounded((3,)), "action": ACTION}
    transforms = torchrl.Compose(torchrl.TensorDictPrimer(primer, default_value=0.5, reset_key="_reset"))
    policy = TensorDictModule(Remembers(), ["observation", "action", "memory"], ["action", ("next", "memory")])
    captured = capture(
        PolicySource(TensorDictSequential(transforms, policy), TensorDict({"observation": torch.zeros(4)}))
    )
    assert {part.spec.name for part in captured.signature.state} == {"previous_action", "memory"}
    environment = TransformedEnv(ReplayEnv(FOUR, ACTION, ends=(40, 41, 120)), transforms)
    tensordict, actions = environment.reset(), []
    for _ in range(STEPS):
        tensordict = policy(tensordict)
        actions.append(tensordict["action"].numpy())
        _, tensordict = environment.step_and_maybe_reset(tensordict)
    ours = served(captured, [environment.base_env.recording.steps[:STEPS]])
    np.testing.assert_allclose(np.concatenate([step["action"] for step in ours]), np.stack(actions), atol=1e-5)


def test_a_clipped_observation_in_both_modes_converts(tmp_path: Path) -> None:
    case = Case(lambda: [torchrl.ClipTransform(in_keys=["observation"], low=-1.0, high=1.0)])
    network = TensorDictModule(Joined(4, 4, NormalParamExtractor()), in_keys=["observation"], out_keys=["loc", "scale"])
    actor = ProbabilisticActor(network, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)
    program = capture(case.source(actor)).build("onnx", tmp_path, {})
    assert (tmp_path / program.file).exists()


def test_what_a_transform_computes_can_be_an_output() -> None:
    square = torchrl.UnaryTransform(in_keys=["observation"], out_keys=["square"], fn=torch.square)
    policy = TensorDictModule(Joined(4, 2, nn.Tanh()), in_keys=["observation"], out_keys=["action"])
    example = TensorDict({"observation": torch.zeros(4)})
    source = PolicySource(TensorDictSequential(torchrl.Compose(square), policy), example, outputs=("action", "square"))
    observation = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    np.testing.assert_allclose(capture(source).run_reference({"observation": observation})["square"], observation**2)


def behind(transform: Any, width: int = 4) -> PolicySource:
    policy = TensorDictModule(Joined(width, 2, nn.Tanh()), in_keys=["observation"], out_keys=["action"])
    return PolicySource(TensorDictSequential(policy, transform), TensorDict({"observation": torch.zeros(4)}))


def test_a_transform_backwards_is_applied_to_the_action() -> None:
    norm = torchrl.ObservationNorm(loc=0.5, scale=4.0, in_keys=[], in_keys_inv=["action"], standard_normal=True)
    source = behind(_InvertTransform(norm))
    observation = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    action = capture(source).run_reference({"observation": observation})["action"]
    with torch.no_grad():
        expected = source.policy(TensorDict({"observation": torch.from_numpy(observation)}, [5]))["action"]
    np.testing.assert_allclose(action, expected.numpy(), atol=1e-6)


def test_a_projected_action_is_the_policys_or_drawn_from_the_environments() -> None:
    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x.argmax(-1), 4)

    policy = TensorDictModule(Choice(), in_keys=["observation"], out_keys=["action"])
    backwards = _InvertTransform(torchrl.DiscreteActionProjection(num_actions_effective=3, max_actions=4))
    source = PolicySource(TensorDictSequential(policy, backwards), TensorDict({"observation": torch.zeros(4)}))
    captured = capture(source)
    observation = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 3, 3]]
    noise = np.array([0.9, 0.9, 0.1, 0.1, 0.5, 0.99], np.float32)
    action = captured.run_reference({"observation": observation, "noise": noise})["action"]
    assert action.argmax(-1).tolist() == [0, 1, 2, 0, 1, 2]
    assert action.shape == (6, 3)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda: torchrl.Hash(in_keys=["observation"], out_keys=["observation"]), "Hash reads text"),
        (lambda: torchrl.RandomCropTensorDict(5), "RandomCropTensorDict is for replay buffers"),
        (lambda: torchrl.ConditionalPolicySwitch(lambda td: td, lambda td: False), "has another policy act"),
        (lambda: torchrl.VecNormV2(in_keys=["observation"]), r"still gathers statistics: call \.freeze\(\)"),
        (lambda: torchrl.VecNormV2(in_keys=["observation"]).freeze(), "has no statistics of 'observation'"),
        (lambda: torchrl.ObservationNorm(in_keys=["observation"]), "ObservationNorm has no statistics"),
        (lambda: torchrl.CatFrames(N=2, dim=-1, in_keys=["observation"], future=True), "needs whole trajectories"),
    ],
)
def test_a_transform_that_cannot_act_step_by_step_is_refused_by_name(
    transform: Callable[[], Any], message: str
) -> None:
    policy = TensorDictModule(Joined(4, 2, nn.Tanh()), in_keys=["observation"], out_keys=["action"])
    example = TensorDict({"observation": torch.zeros(4)})
    with pytest.raises(CaptureFailed, match=message):
        capture(PolicySource(TensorDictSequential(torchrl.Compose(transform()), policy), example))


def test_the_policy_of_the_ppo_tutorial_scores_what_it_scores_in_torchrl() -> None:
    """As a reader exports it: ``TensorDictSequential(env.transform, policy)``."""
    policy, example = policies.ppo_tutorial()
    captured = capture(PolicySource(policy, example))
    assert [spec.name for spec in captured.signature.observations] == ["observation"]
    scores = []
    for act in (_torchrl(policy), _served(captured)):
        world = gymnasium.make("Pendulum-v1", max_episode_steps=STEPS)
        observation, _ = world.reset(seed=3)
        score, over = 0.0, False
        while not over:
            observation, reward, _, over, _ = world.step(act(observation))
            score += float(reward)
        scores.append(score)
    assert scores[0] == pytest.approx(scores[1], abs=1e-2)


def _torchrl(policy: Any) -> Callable[[Any], Any]:
    norm, actor = policy.module[0][0], policy.module[1]

    def act(observation: Any) -> Any:
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            seen = norm(TensorDict({"observation": torch.from_numpy(observation)}))
            return actor(seen)["action"].numpy()

    return act


def _served(captured: TracedPolicy) -> Callable[[Any], Any]:
    def act(observation: Any) -> Any:
        full = complete(captured.signature, {"observation": observation[None]}, 1, "deterministic").inputs
        return captured.run_reference(full)["action"][0]

    return act
