"""Exploration of TorchRL in a served policy: specs of every kind, agents of a group, gSDE, draws of several heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, distributions, nn
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    Actor,
    AdditiveGaussianModule,
    EGreedyModule,
    MultiAgentMLP,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
)

from actserve.core.errors import CaptureFailed
from actserve_export.capture import TracedPolicy, capture
from actserve_export.capture.exploration import choices, random_action
from actserve_export.certify import distributions as statistics
from actserve_export.certify.distributions import chi_square, kolmogorov_smirnov
from actserve_export.sources import samples
from actserve_export.sources.policy_source import PolicySource
from tests import policies_agents, policies_heads

OBSERVATION = {"observation": torch.zeros(4)}
U = torch.rand(4096, 8, generator=torch.Generator().manual_seed(0))


def source(policy: Any, example: Any = None) -> PolicySource:
    return PolicySource(policy, TensorDict(OBSERVATION) if example is None else example)


SPECS: dict[str, tuple[TensorSpec, tuple[int, ...]]] = {
    "categorical": (Categorical(3), ()),
    "categorical of shape (1,)": (Categorical(3, shape=(1,)), (1,)),
    "categorical of agents": (Categorical(3, shape=(2,)), (2,)),
    "one-hot": (OneHot(3), (3,)),
    "one-hot of agents": (OneHot(3, shape=(2, 3)), (2, 3)),
    "several one-hot": (MultiOneHot((2, 3)), (5,)),
    "several categorical": (MultiCategorical((2, 3)), (2,)),
    "binary": (Binary(3), (3,)),
    "integers": (Bounded(-1, 2, (2,), dtype=torch.int64), (2,)),
}


@pytest.mark.parametrize("name", SPECS)
def test_random_actions_are_those_of_the_spec_in_equal_shares(name: str) -> None:
    spec, inner = SPECS[name]
    found = random_action(spec, U[:, : choices(spec, inner)], inner, None)
    assert found.shape == (len(U), *inner)
    assert spec.is_in(found[0].to(spec.dtype))
    torch.manual_seed(0)
    expected = spec.rand((len(U),))
    kinds, counts = found.long().reshape(len(U), -1).unique(dim=0, return_counts=True)
    theirs = expected.long().reshape(len(U), -1).unique(dim=0)
    assert torch.equal(kinds, theirs)
    assert (counts - len(U) / len(kinds)).abs().max() < 5 * math.sqrt(len(U) / len(kinds))


def test_a_mask_allows_some_of_each_agents_actions() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]]).expand(len(U), 2, 3)
    found = random_action(Categorical(3, shape=(2,)), U[:, :2], (2,), mask)
    assert found[:, 0].unique().tolist() == [0, 2]
    assert found[:, 1].unique().tolist() == [1]
    several = torch.tensor([True, False, False, True, True]).expand(len(U), 5)
    for spec, inner in ((MultiCategorical((2, 3)), (2,)), (MultiOneHot((2, 3)), (5,))):
        kinds = random_action(spec, U[:, :2], inner, several).unique(dim=0)
        assert kinds.tolist() == ([[0, 1], [0, 2]] if inner == (2,) else [[1, 0, 0, 0, 1], [1, 0, 0, 1, 0]])


def test_a_spec_without_uniform_actions_is_refused_by_name() -> None:
    with pytest.raises(CaptureFailed, match=r"epsilon-greedy over UnboundedDiscrete\(torch.int64\)"):
        choices(Unbounded((2,), dtype=torch.int64), (2,))


def agents(own_size: bool) -> PolicySource:
    policy, _ = policies_agents.qmix()
    greedy = TensorDictModule(
        policies_agents.mlp(5), in_keys=[policies_agents.OBSERVATION], out_keys=[policies_agents.VALUES]
    )
    spec = policies_agents.spec(Categorical(5, shape=[policies_agents.AGENTS]))
    explore = EGreedyModule(spec, eps_init=0.5, eps_end=0.5, action_key=policies_agents.ACTION)
    policy = TensorDictSequential(*policies_agents.values(greedy).module, explore)
    group = {"observation": torch.zeros(policies_agents.AGENTS, 4)}
    return source(policy, TensorDict({"agents": TensorDict(group, [policies_agents.AGENTS] if own_size else [])}))


@pytest.mark.parametrize("own_size", [True, False])
def test_each_agent_explores_by_itself_if_the_group_has_a_batch_size(own_size: bool) -> None:
    captured = capture(agents(own_size))
    inputs = samples.collect(agents(own_size), captured.signature, 2000)
    one = {name: array[:1].repeat(2000, 0) for name, array in inputs.items() if name == "agents_observation"}
    inputs |= one | {"explore": np.ones(2000, bool), "epsilon": np.full(2000, 0.5, np.float32)}
    greedy = captured.run_reference(inputs | {"explore": np.zeros(2000, bool)})["agents_action"]
    moved = captured.run_reference(inputs)["agents_action"] != greedy
    together = (moved[:, 0] & moved[:, 1]).mean()  # 0.4 of the random actions are not the greedy one, 0.8 of 0.5
    assert abs(together - (0.4 * 0.4 if own_size else 0.5 * 0.8 * 0.8)) < 0.04


@pytest.mark.parametrize("noise", [AdditiveGaussianModule, OrnsteinUhlenbeckProcessModule])
def test_a_safe_noise_module_clamps_deterministic_actions_too(noise: Callable[..., Any]) -> None:
    spec = Bounded(-0.1, 0.1, (2,))
    torch.manual_seed(0)
    policy = TensorDictSequential(Actor(nn.Linear(4, 2)), noise(spec, safe=True))
    captured = capture(source(policy))
    inputs = samples.collect(source(policy), captured.signature, 16)
    inputs["explore"][:] = False
    found = captured.run_reference(inputs)["action"]
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = policy(TensorDict({"observation": torch.from_numpy(inputs["observation"])}, [16]))["action"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert np.abs(found).max() <= np.float32(0.1)


def test_gsde_keeps_its_noise_until_the_episode_begins_anew() -> None:
    policy, example = policies_heads.gsde()
    captured = capture(source(policy, example))
    assert [(state.spec.name, state.spec.shape) for state in captured.signature.state] == [("_eps_gSDE", (2, 4))]
    inputs = samples.collect(source(policy, example), captured.signature, 8)
    inputs["explore"][:] = True
    inputs["is_init"] = np.arange(8) % 2 == 0
    found = captured.run_reference(inputs)
    after = np.where(inputs["is_init"].reshape(-1, 1, 1), inputs["noise"], inputs["_eps_gSDE"])
    np.testing.assert_array_equal(found["next__eps_gSDE"], after)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        given = {"observation": inputs["observation"], "_eps_gSDE": after}
        expected = policy(TensorDict({name: torch.from_numpy(array) for name, array in given.items()}, [8]))
    np.testing.assert_allclose(found["action"], expected["action"].numpy(), atol=1e-5)
    inputs["explore"][:] = False
    sure = captured.run_reference(inputs)
    np.testing.assert_array_equal(sure["next__eps_gSDE"], inputs["_eps_gSDE"])


def heads() -> Iterator[tuple[str, Callable[[], Any], list[str]]]:
    yield "hybrid", policies_heads.hybrid, ["steer", "gear"]
    yield "several", policies_heads.heads_of_torchrl, ["move", "look", "rank", "grade", "choice", "token"]
    yield "mappo", policies_agents.mappo, ["agents_action"]


@pytest.mark.parametrize(("make", "actions"), [pytest.param(*rest, id=name) for name, *rest in heads()])
def test_the_actions_come_first_and_each_is_distributed_as_the_policys_own(
    make: Callable[[], Any], actions: list[str]
) -> None:
    made = source(*make())
    captured = capture(made)
    assert list(captured.signature.output_names[: len(actions)]) == actions
    found = statistics.compare(captured, made, samples.collect(made, captured.signature, 8), 4096)
    assert found["p"] > statistics.LEVEL


def test_a_distribution_that_cannot_be_drawn_from_inputs_acts_deterministically_and_the_certificate_says_so() -> None:
    policy, example = policies_heads.beta()
    captured = capture(source(policy, example))
    assert captured.signature.exploration == ("deterministic",)
    assert isinstance(captured, TracedPolicy)
    assert "torch._sample_dirichlet draws random numbers" in captured.deterministic_only
    with pytest.raises(CaptureFailed, match=r"torch\._sample_dirichlet draws random numbers"):
        capture(PolicySource(policy, example, exploration=("random",)))


class Rejecting(distributions.Distribution):
    """Draws until all numbers fit."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, loc: Tensor) -> None:
        super().__init__(loc.shape, validate_args=False)
        self.loc = loc

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn = torch.randn_like(self.loc)
        while (drawn < 0).any():
            drawn = torch.where(drawn < 0, torch.randn_like(self.loc), drawn)
        return self.loc + drawn

    @property
    def deterministic_sample(self) -> Tensor:
        return self.loc


def test_a_loop_that_draws_until_numbers_fit_acts_deterministically() -> None:
    module = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["loc"])
    captured = capture(source(ProbabilisticActor(module, in_keys=["loc"], distribution_class=Rejecting)))
    assert captured.signature.exploration == ("deterministic",)


def test_modules_inside_of_a_probabilistic_sequence_are_replaced() -> None:
    """TorchRL keeps a second list of them, and runs that one."""
    captured = capture(source(*policies_heads.gsde()))
    assert captured.signature.is_init
    assert captured.signature.max_batch == 256


def test_a_multi_agent_network_that_never_ran_is_refused() -> None:
    network = MultiAgentMLP(None, 2, 3, centralized=False, share_params=False)
    module = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
    with pytest.raises(CaptureFailed, match="never initialised"):
        capture(source(module, TensorDict({"observation": torch.zeros(3, 4)})))


def test_a_spec_may_be_composite() -> None:
    policy = TensorDictSequential(
        Actor(nn.Linear(4, 2)), EGreedyModule(Composite(action=Unbounded((2,))), eps_init=1.0, eps_end=1.0)
    )
    captured = capture(source(policy))
    assert [noise.distribution for noise in captured.signature.noise] == ["uniform", "normal"]


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_the_two_sample_tests_are_those_of_scipy(shift: float) -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=1500), rng.normal(size=1000) + shift
    expected = stats.ks_2samp(ours, theirs, method="asymp").pvalue
    assert kolmogorov_smirnov(ours, theirs) == pytest.approx(expected, rel=0.15)  # for finite samples
    for kinds in (2, 5):
        counts = [np.bincount(np.digitize(sample, np.linspace(-1, 1, kinds - 1))) for sample in (ours, theirs)]
        expected = stats.chi2_contingency(np.stack(counts)).pvalue
        assert chi_square(*counts) == pytest.approx(expected, rel=1e-9)
