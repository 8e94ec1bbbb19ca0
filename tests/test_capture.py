from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiAgentMLP

from actserve.core.errors import CaptureFailed
from actserve_export.capture import capture
from actserve_export.capture.trace import MAX_BATCH
from actserve_export.sources import samples
from actserve_export.sources.policy_source import PolicySource
from tests import policies_models
from tests.policies import cart


def source(function: nn.Module, example: Tensor | None = None) -> PolicySource:
    module = TensorDictModule(function, in_keys=["x"], out_keys=["action"])
    return PolicySource(module, TensorDict({"x": torch.zeros(3) if example is None else example}))


class Ends(nn.Module):
    """A policy that ends the batch: its output has none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


class Fixed(nn.Module):
    """A policy that fixes the batch at the traced size."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(int(x.shape[0]), 3) if int(x.shape[0]) == 64 else x


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Transposed(nn.Module):
    """Gives a view in another order than row-major."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x], 1).transpose(1, 2)


def test_the_signature_is_what_the_policy_takes_and_gives() -> None:
    captured = capture(cart())
    assert [str(spec) for spec in captured.signature.observations] == ["float32[4]"]
    assert [(spec.name, str(spec)) for spec in captured.signature.outputs] == [
        ("action", "int64[]"),
        ("action_value", "float32[3]"),
    ]
    assert captured.signature.max_batch == MAX_BATCH


@pytest.mark.parametrize("batch", [1, 2, 64, 256])
def test_the_program_takes_any_batch_and_repeats_the_policy(batch: int) -> None:
    captured = capture(cart())
    inputs = {"observation": captured.signature.observations[0].sample(np.random.default_rng(0), batch)}
    action, value = captured.program.module()(torch.from_numpy(inputs["observation"]))
    reference = captured.run_reference(inputs)
    np.testing.assert_array_equal(action.numpy(), reference["action"])
    np.testing.assert_allclose(value.detach().numpy(), reference["action_value"], atol=1e-6)


def test_what_fixes_the_batch_is_exported_one_item_at_a_time() -> None:
    captured = capture(source(Fixed()))
    assert captured.signature.max_batch == 1
    assert captured.program.module()(torch.ones(1, 3))[0].shape == (1, 3)


def test_an_output_without_a_batch_is_refused() -> None:
    with pytest.raises(CaptureFailed, match="a result for each item of a batch"):
        capture(source(Ends()))


def test_lazy_layers_that_never_ran_are_refused() -> None:
    with pytest.raises(CaptureFailed, match=r"layer.weight was never initialised"):
        capture(source(Lazy()))
    ready = Lazy()
    ready(torch.zeros(1, 3))
    assert str(capture(source(ready)).signature.action) == "float32[2]"


class Elsewhere(nn.Module):
    """A network in a list, where torch does not see its parameters."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.networks = [network]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.networks[0](x)
        return found


def test_a_lazy_layer_is_refused_wherever_it_is() -> None:
    with pytest.raises(CaptureFailed, match=r"a parameter of shape \(2, 3\) was never initialised"):
        capture(source(Elsewhere(nn.LazyLinear(2))))
    agents = MultiAgentMLP(
        n_agent_inputs=None, n_agent_outputs=2, n_agents=3, centralized=False, share_params=False, num_cells=[4]
    )
    with pytest.raises(CaptureFailed, match=r"params.0.weight was never initialised"):
        capture(source(agents, torch.zeros(3, 4)))


def test_outputs_are_made_contiguous() -> None:
    captured = capture(source(Transposed()))
    (action,) = captured.program.module()(torch.zeros(5, 3))
    assert action.is_contiguous()


def test_a_dtype_that_no_client_can_send_is_refused() -> None:
    for dtype in (torch.complex64, torch.float8_e5m2):
        with pytest.raises(CaptureFailed, match=rf"x: expected one of uint8.*; got {str(dtype)[6:]}"):
            capture(source(nn.Identity(), torch.zeros(3).to(dtype)))


@pytest.mark.parametrize("kind", [policies_models.vla, policies_models.wrapped_lerobot])
def test_what_is_no_tensor_is_fixed_in_the_program(kind: Callable[[], policies_models.Pair]) -> None:
    policy, example = kind()
    captured = capture(PolicySource(policy, example))
    inputs = samples.collect(PolicySource(policy, example), captured.signature, 1)
    seen = example.unsqueeze(0)
    for name, key in captured.layout.observations.items():
        seen.set(key, torch.from_numpy(inputs[name]))
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = policy(seen)["vla_action", "chunk"].numpy()
    np.testing.assert_allclose(captured.run_reference(inputs)["vla_action_chunk"], expected, atol=1e-6)


def test_a_policy_that_cannot_run_its_example_says_so() -> None:
    with pytest.raises(CaptureFailed, match="cannot run its own example"):
        capture(source(nn.Linear(7, 2)))
