"""Chunks, diffusion, world models and controllers against TorchRL's own modules, given the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs.model_based import ModelBasedEnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import CEMPlanner, LSTMModule, MultiStepActorWrapper, WorldModelWrapper

from actserve.core.completion import complete
from actserve.core.errors import CaptureFailed
from actserve.core.signature import Arrays, Exploration
from actserve_export.capture import TracedPolicy, capture
from actserve_export.sources.policy_source import PolicySource
from tests import policies

STEPS, ROWS = 200, 4


def chunks(**options: Any) -> tuple[Any, TensorDict]:
    torch.manual_seed(0)
    planner = TensorDictModule(nn.Sequential(nn.Linear(4, 12), nn.Unflatten(-1, (6, 2))), ["observation"], ["action"])
    return MultiStepActorWrapper(planner, **options), TensorDict(policies.OBSERVATION)


@pytest.mark.parametrize(
    "options",
    [{"n_steps": 6}, {"n_steps": 6, "replan_interval": 4}, {"n_steps": 6, "keep_dim": True}, {}],
    ids=str,
)
def test_chunks_are_torchrls_step_by_step(options: dict[str, Any]) -> None:
    policy, example = chunks(**options)
    captured = capture(PolicySource(policy, example))
    rng = np.random.default_rng(0)
    state: Arrays = {part.spec.name: part.initial_value(ROWS) for part in captured.signature.state}
    carried = TensorDict({}, [ROWS])
    for step in range(STEPS):
        observation = rng.standard_normal((ROWS, 4)).astype(np.float32)
        starts = (rng.random(ROWS) < 0.05) | (step == 0)
        ours = captured.run_reference({"observation": observation, "is_init": starts} | state)
        state = {part.spec.name: ours[part.output] for part in captured.signature.state}
        given = {"observation": torch.from_numpy(observation), "is_init": torch.from_numpy(starts).unsqueeze(-1)}
        with torch.no_grad():
            carried = policy(carried.update(given))
        np.testing.assert_allclose(ours["action"], carried["action"].numpy(), atol=1e-6)


def test_an_actor_with_state_inside_of_chunks_is_refused() -> None:
    planner = TensorDictSequential(
        LSTMModule(input_size=4, hidden_size=12, in_key="observation", out_key="flat"),
        TensorDictModule(nn.Unflatten(-1, (6, 2)), ["flat"], ["action"]),
    )
    with pytest.raises(CaptureFailed, match="MultiStepActorWrapper around an actor with state"):
        capture(PolicySource(MultiStepActorWrapper(planner, n_steps=6), TensorDict(policies.OBSERVATION)))


def completed(captured: TracedPolicy, given: Arrays, mode: Exploration, seed: int) -> Arrays:
    return complete(captured.signature, given, ROWS, mode, seed).inputs


@pytest.mark.parametrize("mode", ["deterministic", "random"])
def test_a_diffusion_chain_is_torchrls(mode: Exploration, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, example = policies.diffusion()
    captured = capture(PolicySource(policy, example))
    observation = np.random.default_rng(0).standard_normal((ROWS, 4)).astype(np.float32)
    inputs = completed(captured, {"observation": observation}, mode, 7)
    noise = torch.from_numpy(inputs["noise"])
    drawn = iter([*noise.unbind(1), noise[:, 0]])  # TorchRL's last draw has no effect
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(drawn))
    monkeypatch.setattr(torch, "randn_like", lambda *_, **__: next(drawn))
    with torch.no_grad(), set_exploration_type(getattr(ExplorationType, mode.upper())):
        expected = policy(TensorDict({"observation": torch.from_numpy(observation)}, [ROWS]))["action"]
    np.testing.assert_allclose(captured.run_reference(inputs)["action"], expected.numpy(), atol=1e-4, rtol=1e-4)


def test_a_world_models_latent_state_is_drawn_for_deterministic_actions_too() -> None:
    policy, example = policies.dreamer()
    captured = capture(PolicySource(policy, example))
    assert captured.signature.exploration == ("deterministic", "random")
    (latent,) = (noise.spec.name for noise in captured.signature.noise if noise.always)
    rng = np.random.default_rng(0)
    state: Arrays = {part.spec.name: part.initial_value(ROWS) for part in captured.signature.state}
    carried = {name: torch.from_numpy(value) for name, value in state.items()}
    for step in range(STEPS):
        observation = rng.standard_normal((ROWS, 4)).astype(np.float32)
        starts = (rng.random(ROWS) < 0.05) | (step == 0)
        given = {"observation": observation, "is_init": starts} | state
        inputs = completed(captured, given, "deterministic", step)
        ours = captured.run_reference(inputs)
        state = {part.spec.name: ours[part.output] for part in captured.signature.state}
        draws = torch.from_numpy(inputs[latent])
        seen = {"observation": torch.from_numpy(observation), "is_init": torch.from_numpy(starts).unsqueeze(-1)}
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.no_grad(),
            set_exploration_type(ExplorationType.DETERMINISTIC),
        ):
            patch.setattr(torch, "rand", lambda *_, draws=draws, **__: draws)
            result = policy(TensorDict({**seen, **carried}, [ROWS]))
        carried = dict(result["next"].items())
        np.testing.assert_array_equal(ours["action"], result["action"].numpy())


def test_a_controller_of_beliefs_is_torchrls() -> None:
    policy, example = policies.rbf()
    captured = capture(PolicySource(policy, example))
    root = np.random.default_rng(0).standard_normal((ROWS, 3, 3)).astype(np.float32)
    inputs = {"mean": root[:, 0], "covariance": root @ root.swapaxes(-1, -2) / 3}
    with torch.no_grad():
        expected = policy(TensorDict({name: torch.from_numpy(value) for name, value in inputs.items()}, [ROWS]))
    np.testing.assert_allclose(captured.run_reference(inputs)["action"], expected["action"].numpy(), atol=1e-4)


def test_attention_without_heads_has_an_operator_in_onnx(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[..., -1, :]

    module = TensorDictModule(Attention(), ["observation"], ["action"])
    captured = capture(PolicySource(module, TensorDict({"observation": torch.zeros(5, 4)})))
    captured.build("onnx", tmp_path, {})
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    program = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    expected = module(TensorDict({"observation": torch.from_numpy(x)}, [3]))["action"].numpy()
    np.testing.assert_allclose(program.run(None, {"observation": x})[0], expected, atol=1e-5)


class Imagined(ModelBasedEnvBase):
    def __init__(self) -> None:
        step = TensorDictModule(nn.Linear(4, 4), ["hidden"], ["hidden"])
        super().__init__(WorldModelWrapper(step, TensorDictModule(nn.Linear(4, 1), ["hidden"], ["reward"])))
        self.state_spec = Composite(hidden=Unbounded((4,)))
        self.observation_spec = Composite(hidden=Unbounded((4,)))
        self.action_spec = Unbounded((1,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, _: Any) -> Any:
        return self.full_observation_spec.rand()


def test_a_planner_is_refused_by_name() -> None:
    planner = CEMPlanner(Imagined(), planning_horizon=3, optim_steps=2, num_candidates=4, top_k=2)
    with pytest.raises(CaptureFailed, match=r"CEMPlanner plans by stepping an environment \(Imagined\)"):
        capture(PolicySource(planner, TensorDict({"hidden": torch.zeros(4)})))
