"""The replacements against TorchRL's own modules: 200 steps, resets in some rows, each with its own state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.envs import CatFrames, Compose, GymEnv, TransformedEnv
from torchrl.envs.transforms import VecNormV2
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import GRUModule, LSTMModule, OrnsteinUhlenbeckProcessModule
from torchrl.modules.tensordict_module.exploration import AdditiveGaussianModule

from actserve.core.errors import CaptureFailed
from actserve.core.signature import Arrays
from actserve_export.capture import TracedPolicy, capture
from actserve_export.sources.keys import key_name, keys_by_name
from actserve_export.sources.policy_source import PolicySource
from tests import policies

STEPS, ROWS = 200, 6


def steps(captured: TracedPolicy, seed: int = 0) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    made = []
    for step in range(STEPS):
        inputs = {spec.name: spec.sample(rng, ROWS) for spec in captured.signature.observations}
        made.append(inputs | {"is_init": (rng.random(ROWS) < 0.05) | (step == 0)})
    return made


def roll(captured: TracedPolicy, sequence: list[Arrays]) -> list[Arrays]:
    signature = captured.signature
    state = {s.spec.name: s.spec.zeros(ROWS) for s in signature.state}
    results = []
    for step in sequence:
        results.append(captured.run_reference(step | state))
        state = {s.spec.name: results[-1][s.output] for s in signature.state}
    return results


def roll_torchrl(policy: Any, captured: TracedPolicy, sequence: list[Arrays]) -> list[Any]:
    """The policy as TorchRL runs it, one tensordict after the other, state under its own keys."""
    carried: dict[Any, torch.Tensor] = {}
    results = []
    for step in sequence:
        tensordict = TensorDict({}, batch_size=[ROWS])
        for name, key in captured.layout.observations.items():
            tensordict.set(key, torch.from_numpy(step[name]))
        tensordict.set("is_init", torch.from_numpy(step["is_init"]).unsqueeze(-1))
        for key, tensor in carried.items():
            tensordict.set(key, tensor)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            result = policy(tensordict)
        results.append(result)
        for state in captured.signature.state:
            value = result.get(("next", state.spec.name), None)
            carried[state.spec.name] = result.get(state.spec.name) if value is None else value
    return results


@pytest.mark.parametrize("kind", ["tutorial_lstm", "gru", "pixel_lstm"])
def test_recurrent_policies_are_torchrls_step_by_step(kind: str) -> None:
    policy, example = policies.KINDS[kind]()
    captured = capture(PolicySource(policy, example))
    sequence = steps(captured)
    for ours, theirs in zip(roll(captured, sequence), roll_torchrl(policy, captured, sequence), strict=True):
        np.testing.assert_allclose(ours["action"], theirs["action"].numpy(), atol=1e-5)


@pytest.mark.parametrize("make", [LSTMModule, GRUModule])
@pytest.mark.parametrize("python_based", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_cells_of_any_depth_and_kind(make: Any, python_based: bool, layers: int) -> None:
    torch.manual_seed(0)
    module = make(input_size=4, hidden_size=5, num_layers=layers, in_key="observation", out_key="action")
    module = module.make_python_based() if python_based else module
    captured = capture(PolicySource(TensorDictSequential(module), TensorDict(policies.OBSERVATION)))
    sequence = steps(captured)
    for ours, theirs in zip(roll(captured, sequence), roll_torchrl(module, captured, sequence), strict=True):
        np.testing.assert_allclose(ours["action"], theirs["action"].numpy(), atol=1e-6)


def test_an_lstm_with_a_projection_has_a_narrower_hidden_state() -> None:
    torch.manual_seed(0)
    module = LSTMModule(input_size=4, hidden_size=5, proj_size=3, num_layers=2, in_key="observation", out_key="action")
    captured = capture(PolicySource(TensorDictSequential(module), TensorDict(policies.OBSERVATION)))
    assert [state.spec.shape for state in captured.signature.state] == [(2, 3), (2, 5)]
    sequence = steps(captured)
    hidden, cell = torch.zeros(2, ROWS, 3), torch.zeros(2, ROWS, 5)
    for step, ours in zip(sequence, roll(captured, sequence), strict=True):
        # By torch's own cell: TorchRL 0.14 cannot reset two states of different widths.
        starts = torch.from_numpy(step["is_init"]).reshape(1, -1, 1)
        state = (hidden.masked_fill(starts, 0.0), cell.masked_fill(starts, 0.0))
        action, (hidden, cell) = module.lstm(torch.from_numpy(step["observation"])[:, None], state)
        np.testing.assert_allclose(ours["action"], action[:, 0].detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("make", [LSTMModule, GRUModule])
def test_a_bidirectional_module_is_refused(make: Any) -> None:
    module = make(input_size=4, hidden_size=5, bidirectional=True, in_key="observation", out_key="action")
    with pytest.raises(CaptureFailed, match=f"{make.__name__} of 'observation' is bidirectional.*one step at a time"):
        capture(PolicySource(TensorDictSequential(module), TensorDict(policies.OBSERVATION)))


def test_is_init_resets_exactly_the_rows_that_it_marks() -> None:
    captured = capture(PolicySource(*policies.gru()))
    sequence = [step | {"is_init": np.zeros(ROWS, bool)} for step in steps(captured)[:3]]
    before = roll(captured, sequence)
    marked = np.array([True, False, False, True, False, False])
    sequence[2] = sequence[2] | {"is_init": marked}
    after = roll(captured, sequence)
    changed = (before[2]["next_recurrent_state"] != after[2]["next_recurrent_state"]).reshape(ROWS, -1).any(-1)
    np.testing.assert_array_equal(changed, marked)


@pytest.mark.parametrize("padding", ["same", "constant"])
def test_a_frame_stack_is_catframes(padding: str) -> None:
    def make() -> CatFrames:
        return CatFrames(N=4, dim=-1, in_keys=["observation"], padding=padding, padding_value=0.25)

    identity = TensorDictModule(torch.nn.Identity(), in_keys=["observation"], out_keys=["action"])
    captured = capture(PolicySource(TensorDictSequential(Compose(make()), identity), TensorDict(policies.OBSERVATION)))
    sequence = steps(captured)
    theirs = make()
    for step, ours in zip(sequence, roll(captured, sequence), strict=True):
        tensordict = TensorDict({"observation": torch.from_numpy(step["observation"])}, batch_size=[ROWS])
        reset = torch.from_numpy(step["is_init"])
        expected = theirs._call(tensordict.clone(), _reset=None if not reset.any() else reset)["observation"]
        if reset.any() and not reset.all():  # TorchRL resets some rows in one call and steps the others in another
            expected = _stepped(theirs, tensordict, reset, expected)
        np.testing.assert_array_equal(ours["action"], expected.numpy())


def _stepped(stack: Any, tensordict: Any, reset: torch.Tensor, after_reset: torch.Tensor) -> torch.Tensor:
    """Move the rows that were not reset on by one, as a step of the environment does."""
    buffer = stack._cat_buffers_observation
    rows = ~reset
    buffer[rows] = torch.cat([buffer[rows][:, 4:], tensordict["observation"][rows]], -1)
    result = after_reset.clone()
    result[rows] = buffer[rows]
    return result


def test_ornstein_uhlenbeck_is_torchrls_process() -> None:
    policy, example = policies.ornstein_uhlenbeck()
    captured = capture(PolicySource(policy, example, exploration=("random",)))
    rng = np.random.default_rng(0)
    module = policy.module[-1]
    assert isinstance(module, OrnsteinUhlenbeckProcessModule)
    process, base = module.ou, policy.module[0]
    noise, age = np.zeros((ROWS, 2), np.float32), np.zeros(ROWS, np.int64)
    kept: dict[str, torch.Tensor] = {}
    for step in steps(captured):
        drawn = rng.standard_normal((ROWS, 2)).astype(np.float32)
        inputs = step | {"noise": drawn, "ou_noise": noise, "ou_steps": age, "epsilon": np.ones(ROWS, np.float32)}
        ours = captured.run_reference(inputs)
        noise, age = ours["next_ou_noise"], ours["next_ou_steps"]
        tensordict = TensorDict({"observation": torch.from_numpy(step["observation"])}, batch_size=[ROWS])
        with torch.no_grad():
            tensordict = base(tensordict)
            tensordict.update(kept)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randn_like", lambda like, drawn=drawn: torch.from_numpy(drawn))
                process.add_sample(tensordict, 1.0, is_init=torch.from_numpy(step["is_init"]))
        kept = {key: tensordict[key] for key in (process.noise_key, process.steps_key)}
        np.testing.assert_allclose(noise, kept[process.noise_key].numpy(), atol=1e-6)
        np.testing.assert_allclose(ours["action"], tensordict["action"].clamp(-1, 1).numpy(), atol=1e-6)


def test_epsilon_greedy_explores_as_often_as_epsilon_says_and_obeys_the_mask() -> None:
    captured = capture(PolicySource(*policies.epsilon_greedy()))
    rng = np.random.default_rng(0)
    count = 20_000
    observation = np.repeat(rng.standard_normal((1, 4)).astype(np.float32), count, 0)
    noise = rng.random((count, 2), np.float32)
    for epsilon in (0.0, 0.1, 0.6, 1.0):
        inputs = {"observation": observation, "noise": noise, "explore": np.ones(count, bool)}
        actions = captured.run_reference(inputs | {"epsilon": np.full(count, epsilon, np.float32)})["action"]
        greedy = np.bincount(actions).argmax() if epsilon < 1 else actions[0]
        assert abs((actions != greedy).mean() - epsilon * 2 / 3) < 0.02


def test_gaussian_noise_is_scaled_and_clamped() -> None:
    policy, example = policies.gaussian_noise()
    captured = capture(PolicySource(policy, example, exploration=("random",)))
    noise = np.array([[1.0, -1.0], [100.0, -100.0]], np.float32)
    sigma = np.full(2, 0.2, np.float32)
    observation = np.zeros((2, 4), np.float32)
    actions = captured.run_reference({"observation": observation, "noise": noise, "sigma": sigma})["action"]
    base = capture(PolicySource(*policies.deterministic_control())).run_reference({"observation": observation})[
        "action"
    ]
    np.testing.assert_allclose(actions[0], np.clip(base[0] + [0.2, -0.2], -1, 1), atol=1e-6)
    np.testing.assert_array_equal(actions[1], [1, -1])
    assert isinstance(policy.module[-1], AdditiveGaussianModule)


def test_a_frozen_vecnorm_becomes_constants() -> None:
    norm = VecNormV2(in_keys=["observation"], decay=0.9)
    env = TransformedEnv(GymEnv("CartPole-v1"), norm)
    env.rollout(20)
    norm.freeze()
    module = TensorDictModule(torch.nn.Identity(), in_keys=["observation"], out_keys=["action"])
    policy = TensorDictSequential(Compose(norm.frozen_copy()), module)
    captured = capture(PolicySource(policy, TensorDict(policies.OBSERVATION)))
    raw = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    expected = norm._norm(TensorDict({"observation": torch.from_numpy(raw)}, [5]), norm._loc, norm._var, norm._count)
    actions = captured.run_reference({"observation": raw})["action"]
    np.testing.assert_allclose(actions, expected["observation"].numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([("a", "b"), "a_b"], r"\('a', 'b'\) and 'a_b' would both be named 'a_b'"),
        (["seed"], "would be named 'seed', which requests use"),
    ],
)
def test_key_collisions_are_refused_by_name(keys: list[Any], message: str) -> None:
    with pytest.raises(CaptureFailed, match=message):
        keys_by_name(keys, "input")


def test_keys_join_with_an_underscore() -> None:
    assert key_name(("group0", "agent0", "obs")) == "group0_agent0_obs"
    assert key_name(("next", "h")) == "h"
    assert key_name("x") == "x"


def test_random_numbers_that_cannot_be_lifted_are_refused_by_name() -> None:
    class Shuffles(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, torch.randperm(4)]

    module = TensorDictModule(Shuffles(), in_keys=["observation"], out_keys=["action"])
    with pytest.raises(CaptureFailed, match="randperm draws random numbers that cannot be made an input"):
        capture(PolicySource(TensorDictSequential(module), TensorDict(policies.OBSERVATION)))


def test_one_number_for_a_whole_batch_is_refused() -> None:
    class OneCoin(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(3)[0]

    module = TensorDictModule(OneCoin(), in_keys=["observation"], out_keys=["action"])
    with pytest.raises(CaptureFailed, match="expected the batch first"):
        capture(PolicySource(TensorDictSequential(module), TensorDict(policies.OBSERVATION)))
