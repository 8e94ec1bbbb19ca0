"""Limits as nodes of the programs: their effect on actions and state. No input leads out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import LSTMModule

from actserve.core.errors import Disagreement, InvalidRequest, UsageError
from actserve.core.limits import LIMITED, Reason
from actserve.core.signature import Array, Arrays, Chunk, Signature
from actserve.engine import golden
from actserve.engine.golden import Tolerance
from actserve.engine.registry.candidates import serves_clients_of
from actserve.server.chunk_steps import ChunkSteps
from actserve_export import OnnxSource, PolicySource, from_module, from_sb3
from actserve_export.capture import capture
from actserve_export.capture.limits.policy import LimitedPolicy, limit
from actserve_export.certify.limits import fuzz
from actserve_export.programs.rewrites.narrow import layers_in_bfloat16
from actserve_export.programs.rewrites.optimize import optimize
from actserve_export.sources import samples
from actserve_export.sources.limits_file import parse_limits
from tests import policies
from tests.sb3_models import MODELS

BOUNDS, CHANGE, NOT_FINITE, STATE = (int(reason) for reason in Reason)
NAN, INF = float("nan"), float("inf")
FUZZED = 3000

Run = Callable[[Arrays], Arrays]


def source_of(policy: Any) -> PolicySource:
    made = policy()
    return made if isinstance(made, PolicySource) else PolicySource(*made)


def follow(shape: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float32) -> PolicySource:
    """A policy whose action is its observation."""
    return from_module(nn.Identity(), torch.zeros(shape, dtype=dtype), "identity")


def limited(source: PolicySource, **limits: Any) -> LimitedPolicy:
    return limit(capture(source), parse_limits(limits))


def inputs_of(signature: Signature, count: int, **given: Any) -> Arrays:
    """Every input of `count` items: `given`, or zeros, which are no first step."""
    return {
        spec.name: np.array(given[spec.name], spec.numpy_dtype).reshape(count, *spec.shape)
        if spec.name in given
        else spec.zeros(count)
        for spec in signature.inputs
    }


def act(policy: LimitedPolicy, *observations: Any, **given: Any) -> Arrays:
    """One step of items with these observations."""
    name = policy.signature.observations[0].name
    return policy.run_reference(inputs_of(policy.signature, len(observations), **{name: observations}, **given))


def episode(policy: LimitedPolicy, observations: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """(the actions of one episode, `limited` of each step)."""
    signature = policy.signature
    state = {part.spec.name: part.initial_value(1) for part in signature.state}
    actions, bits = [], []
    for step, observation in enumerate(observations):
        results = act(policy, observation, is_init=[step == 0], **state)
        state = {part.spec.name: results[part.output] for part in signature.state}
        actions.append(results[signature.action.name][0].tolist())
        bits.append(int(results[LIMITED][0]))
    return actions, bits


def near(values: Any) -> Any:
    return pytest.approx(values, abs=1e-6)


def test_bounds() -> None:
    policy = limited(follow(), action={"low": [-1, 0], "high": 1, "fallback": 0})
    found = act(policy, [0.5, 0.25], [2.0, -3.0], [-1e30, 1.0])
    assert found["action"].tolist() == [[0.5, 0.25], [1, 0], [-1, 1]]
    assert found[LIMITED].tolist() == [0, BOUNDS, BOUNDS]
    assert not policy.signature.state
    assert (policy.signature.action.low, policy.signature.action.high) == ((-1.0, 0.0), 1.0)


def test_bounds_are_never_wider_than_they_were_given() -> None:
    (found,) = limited(follow((1,)), action={"low": -0.1, "high": 0.1, "fallback": 0.1}).signature.limits.outputs  # type: ignore[union-attr]
    assert found.high is not None
    assert found.low is not None
    assert -0.1 <= found.low[0] < -0.0999999
    assert 0.0999999 < found.high[0] <= 0.1
    assert found.fallback == found.high


def test_a_change_counts_from_the_action_before_and_a_first_step_may_be_any() -> None:
    policy = limited(follow((1,)), action={"change": 0.25, "fallback": 0})
    actions, bits = episode(policy, [[5.0], [6.0], [5.0], [5.0], [5.0]])
    assert actions == [[5], [5.25], [5], [5], [5]]
    assert bits == [0, CHANGE, 0, 0, 0]
    again = act(policy, [9.0], [9.0], previous_action=[[5.0], [5.0]], is_init=[True, False])
    assert again["action"].tolist() == [[9], [5.25]]


def test_the_first_step_counts_from_the_start_if_there_is_one() -> None:
    policy = limited(follow((1,)), action={"change": 0.25, "start": 1, "fallback": "hold"})
    assert episode(policy, [[0.0], [0.0], [NAN]]) == ([[0.75], [0.5], [0.5]], [CHANGE, CHANGE, NOT_FINITE])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_action_that_is_not_finite_is_the_fallback(value: float) -> None:
    constant = limited(follow(), action={"low": -1, "high": 1, "fallback": [0.5, -0.5]})
    found = act(constant, [value, 0.0], [0.0, 0.0])
    assert found["action"].tolist() == [[0.5, -0.5], [0, 0]]
    assert found[LIMITED].tolist() == [NOT_FINITE, 0]
    hold = limited(follow(), action={"low": 0.25, "fallback": "hold"})
    assert episode(hold, [[value, 1.0], [3.0, 4.0], [1.0, value], [0.0, value]]) == (
        [[0.25, 0.25], [3, 4], [3, 4], [3, 4]],
        [NOT_FINITE, 0, NOT_FINITE, NOT_FINITE],
    )


def test_all_limits_together_and_the_fallback_keeps_to_the_change_too() -> None:
    policy = limited(follow((1,)), action={"low": -1, "high": 1, "change": 0.5, "fallback": -1})
    actions, bits = episode(policy, [[3.0], [NAN], [NAN], [2.0], [-0.25]])
    assert actions == [[1], [0.5], [0], [0.5], [0]]
    assert bits == [BOUNDS, NOT_FINITE | CHANGE, NOT_FINITE | CHANGE, BOUNDS | CHANGE, CHANGE]


@pytest.mark.parametrize("previous", [NAN, INF, -INF, 7.0])
def test_a_previous_action_that_no_step_left_is_none(previous: float) -> None:
    policy = limited(follow((1,)), action={"low": -1, "high": 1, "change": 0.1, "fallback": "hold"})
    found = act(policy, [0.75], [NAN], previous_action=[[previous], [previous]])
    assert found["action"].tolist() == found["next_previous_action"].tolist() == [[0.75], [0]]


def test_observations_that_are_not_finite_can_mean_the_fallback() -> None:
    ignoring = from_module(nn.Hardtanh(), torch.zeros(2), "identity")
    for observations, expected in (({}, [1.0, 0.0]), ({"observations": "finite"}, [0.0, 0.0])):
        policy = limited(ignoring, action={"fallback": 0}, **observations)
        found = act(policy, [INF, 0.0])
        assert found["action"].tolist() == [expected]
        assert found[LIMITED].tolist() == [NOT_FINITE * (expected[0] == 0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_limits_are_in_the_precision_of_the_action(dtype: torch.dtype) -> None:
    policy = limited(follow((1,), dtype), action={"low": -0.3, "high": 0.3, "change": 0.1, "fallback": "hold"})
    actions, _ = episode(policy, [[1.0], [-1.0], [-1.0], [1e4], [INF]])
    assert actions == pytest.approx(np.array([[0.3], [0.2], [0.1], [0.2], [0.2]]), abs=1e-3)
    assert policy.signature.action.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_whole_numbers(dtype: torch.dtype) -> None:
    policy = limited(follow((1,), dtype), action={"low": 2, "high": 100, "change": 10, "start": 50, "fallback": 2})
    assert episode(policy, [[120], [53], [0], [0]]) == (
        [[60], [53], [43], [33]],
        [BOUNDS | CHANGE, 0, *[BOUNDS | CHANGE] * 2],
    )


def test_the_best_allowed_action_replaces_one_that_is_forbidden() -> None:
    policy = limited(from_module(nn.Identity(), torch.zeros(4), "argmax"), action={"forbidden": [1, 3], "fallback": 2})
    found = act(policy, [9.0, 1, 2, 3], [1.0, 9, 2, 8], [3.0, 9, 2, 8], [0, 0, NAN, 0], [-INF, 0, -INF, -INF])
    assert found["action"].tolist() == [0, 2, 0, 2, 0]
    assert found[LIMITED].tolist() == [0, BOUNDS, BOUNDS, NOT_FINITE, BOUNDS]


def test_without_scores_the_fallback_replaces_an_action_that_is_not_allowed() -> None:
    policy = limited(follow((2,), torch.int64), action={"allowed": [1, 5], "fallback": [1, 5]})
    assert act(policy, [5, 1], [7, 5], [0, -1])["action"].tolist() == [[5, 1], [1, 5], [1, 5]]


def test_an_action_stays_for_as_long_as_dwell_says() -> None:
    policy = limited(follow((), torch.int64), action={"allowed": [0, 1, 2], "dwell": 3, "fallback": "hold"})
    assert episode(policy, [1, 2, 2, 2, 0, 2, 2, 2, 9, 0]) == (
        [1, 1, 1, 2, 2, 2, 2, 2, 2, 0],
        [0, CHANGE, CHANGE, 0, CHANGE, 0, 0, 0, BOUNDS, 0],
    )
    assert act(policy, 2, previous_action=[1], action_age=[1], is_init=[True])["action"].tolist() == [2]


class Hybrid(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :1], x[:, 1].nan_to_num().long()


def test_outputs_have_their_own_limits_and_fall_back_together() -> None:
    module = TensorDictModule(Hybrid(), in_keys=["observation"], out_keys=["throttle", "gear"])
    source = PolicySource(module, TensorDict({"observation": torch.zeros(2)}), outputs=("throttle", "gear"))
    policy = limited(
        source, throttle={"low": 0, "high": 1, "fallback": 0}, gear={"allowed": [1, 2], "dwell": 2, "fallback": 1}
    )
    found = act(policy, [0.5, 2.0], [3.0, 7.0], [NAN, 2.0], is_init=[True] * 3)
    assert found["throttle"].tolist() == [[0.5], [1], [0]]
    assert found["gear"].tolist() == [2, 1, 1]
    assert found[LIMITED].tolist() == [0, BOUNDS, NOT_FINITE]


def chunks(execute: int = 2, **chunk: Any) -> PolicySource:
    return replace(follow((4, 1)), chunk=Chunk("action", execute, **chunk))


def test_a_chunk_changes_from_action_to_action_and_from_the_last_one_that_was_taken() -> None:
    policy = limited(chunks(), action={"low": 0, "high": 9, "change": 1, "fallback": "hold"})
    assert [state.spec.shape for state in policy.signature.state] == [(1,)]
    plans = [[[3.0], [9], [9], [3]], [[9.0], [9], [-9], [20]], [[NAN], [9], [9], [9]]]
    assert episode(policy, plans) == (
        [[[3], [4], [5], [4]], [[5], [6], [5], [6]], [[6], [6], [6], [6]]],
        [CHANGE, BOUNDS | CHANGE, NOT_FINITE],
    )


def test_limits_of_chunks_that_the_program_cannot_keep_are_refused() -> None:
    averaged = capture(chunks(ensemble=0.1))
    with pytest.raises(UsageError, match="the mean of several chunks is taken; give bounds and a constant fallback"):
        limit(averaged, parse_limits({"action": {"change": 1, "fallback": 0}}))
    bounded = limit(averaged, parse_limits({"action": {"low": 0, "high": 1, "fallback": 0}}))
    assert act(bounded, [[2.0], [0.5], [-1], [NAN]])["action"].reshape(-1).tolist() == [0, 0, 0, 0]
    changing = limited(chunks(4), action={"change": 1, "fallback": 0}).signature
    with pytest.raises(InvalidRequest, match="expected ahead=0: this policy limits the change"):
        ChunkSteps(changing, 1)
    ChunkSteps(changing, 0)
    assert not bounded.signature.slows_chunks


def memory() -> PolicySource:
    """An LSTM."""
    torch.manual_seed(0)
    cell = LSTMModule(input_size=3, hidden_size=4, in_key="observation", out_key="features")
    head = TensorDictModule(nn.Linear(4, 2), in_keys=["features"], out_keys=["action"])
    zeros = torch.zeros(1, 4)
    example = {"observation": torch.zeros(3), "recurrent_state_h": zeros, "recurrent_state_c": zeros}
    return PolicySource(TensorDictSequential(cell, head), TensorDict(example))


def test_state_that_is_not_finite_is_not_kept() -> None:
    policy = limited(memory(), action={"low": -1, "high": 1, "fallback": "hold"})
    names = [state.spec.name for state in policy.unlimited.signature.state]
    state = {name: np.full((1, 1, 4), 0.5, np.float32) for name in names}
    poisoned = act(policy, [INF, -INF, 0.0], **state)
    assert poisoned[LIMITED].tolist() == [NOT_FINITE | STATE]
    for name in names:
        assert poisoned[f"next_{name}"].tolist() == state[name].tolist()
    # Where there is no finite state to keep, the episode's initial one is.
    for given in ({"is_init": [True]}, {names[1]: np.full((1, 1, 4), NAN)}):
        first = act(policy, [NAN, 0.0, 0.0], **{**state, **given})
        assert all(not first[f"next_{name}"].any() for name in names)
    after, clean = (act(policy, [0.1, 0.2, 0.3], **start) for start in (
        {name: poisoned[f"next_{name}"] for name in names}, state))  # fmt: skip
    assert after["action"].tolist() == clean["action"].tolist()


def overflowing() -> PolicySource:
    """NaN for large observations, as weights that overflow give it."""

    class Overflowing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = (x * 1e38).sum(-1, keepdim=True)
            return (y - y) + x

    return from_module(Overflowing(), torch.zeros(2), "identity")


def test_weights_that_overflow() -> None:
    found = act(limited(overflowing(), action={"fallback": 0.5}), [0.25, 0.5], [30.0, 30.0])
    assert found["action"].tolist() == [[0.25, 0.5], [0.5, 0.5]]
    assert found[LIMITED].tolist() == [0, NOT_FINITE]


def test_exploration_is_limited_too() -> None:
    policy = limited(
        source_of(policies.gaussian_noise), action={"low": -0.1, "high": 0.1, "change": 0.05, "fallback": "hold"}
    )
    noise = np.random.default_rng(0).normal(size=(64, 2)) * 100
    found = act(policy, *np.zeros((64, 4)), noise=noise, sigma=np.ones(64), explore=np.ones(64, bool))
    assert np.abs(found["action"]).max() <= np.float32(0.05)
    assert (found[LIMITED] & CHANGE).all()


EXPLORES = {
    "action": {"low": -1, "high": 1, "change": [0.1, 0.2], "start": 0, "fallback": [0.1, 0]},
    "observations": "finite",
}
KINDS: dict[str, tuple[Callable[[], PolicySource], dict[str, Any]]] = {
    "continuous": (
        lambda: source_of(policies.deterministic_control),
        {"action": {"low": [-0.5, -0.25], "high": 0.5, "change": 0.1, "fallback": "hold"}},
    ),
    "explores": (lambda: source_of(policies.gaussian_noise), EXPLORES),
    "discrete": (lambda: source_of(policies.cart), {"action": {"forbidden": [1], "dwell": 2, "fallback": 0}}),
    "recurrent": (memory, {"action": {"low": -0.1, "high": 0.1, "fallback": "hold"}}),
    "noise process": (lambda: source_of(policies.ornstein_uhlenbeck), {"action": {"change": 0.1, "fallback": 0}}),
    "chunk": (chunks, {"action": {"low": -2, "high": 2, "change": 0.3, "fallback": "hold"}}),
    "whole numbers": (
        lambda: follow((3,), torch.uint8),
        {"action": {"low": 3, "high": 200, "change": 7, "fallback": "hold"}},
    ),
    "float16": (
        lambda: follow((2,), torch.float16),
        {"action": {"low": -0.3, "high": 0.3, "change": 0.1, "fallback": 0}},
    ),
    "overflow": (overflowing, {"action": {"high": 1, "fallback": "hold"}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_leads_the_onnx_program_out_of_its_limits(kind: str, tmp_path: Path) -> None:
    make, limits = KINDS[kind]
    source = make()
    policy = limited(source, **limits)
    policy.build("onnx", tmp_path, {})
    session = ort.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in policy.signature.results]

    def run(inputs: Arrays) -> Arrays:
        return dict(zip(names, session.run(None, inputs), strict=True))

    pool = samples.collect(source, policy.signature, 64)
    found = fuzz(".onnx", run, policy.signature, pool, FUZZED)
    assert found.inputs >= FUZZED
    assert found.refused == 0
    assert found.limited > FUZZED / 20


def test_layers_in_bfloat16_leave_the_limits_in_float32() -> None:
    source = from_module(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.zeros(4), "identity")
    policy = limited(source, action={"low": -0.1, "high": 0.1, "change": 0.03, "fallback": "hold"})
    program, rewrites = optimize(policy.program, "pt2", layers_in_bfloat16)
    assert rewrites[-1] == "bfloat16: 1 of 2 layers with weights"
    module = program.module(check_guards=False)

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            results = module(*(torch.from_numpy(inputs[spec.name]) for spec in policy.signature.inputs))
        return {spec.name: tensor.numpy() for spec, tensor in zip(policy.signature.results, results, strict=True)}

    found = fuzz("bf16", run, policy.signature, samples.collect(source, policy.signature, 64), FUZZED)
    assert found.limited > FUZZED / 20


@pytest.mark.parametrize("kind", ["continuous", "recurrent", "discrete", "explores"])
def test_what_is_not_limited_is_the_policys_own_bit_for_bit(kind: str) -> None:
    make, limits = KINDS[kind]
    source = make()
    policy = limited(source, **limits)
    pool = samples.collect(source, policy.signature, 64)
    found = fuzz("it", policy.run_reference, policy.signature, pool, FUZZED, own=policy.unlimited.run_reference)
    assert 0 < found.untouched == found.inputs - found.limited
    assert found.outside_without > 0


def test_fuzzing_finds_what_leaves_the_limits() -> None:
    source = source_of(policies.deterministic_control)
    policy = limited(source, action={"low": -0.5, "high": 0.5, "change": 0.1, "fallback": "hold"})
    signature, pool = policy.signature, samples.collect(source, policy.signature, 64)

    def changed(name: str, change: Callable[[Array], Array]) -> Run:
        def run(inputs: Arrays) -> Arrays:
            results = dict(policy.run_reference(inputs))
            return results | {name: change(results[name])}

        return run

    for name, change in (
        ("action", lambda a: np.nextafter(a, np.float32(9))),
        ("action", lambda a: np.where(a > 0.49, np.float32(NAN), a)),
        ("action", lambda a: -a),
        ("next_previous_action", lambda a: a * np.float32(1.0001)),
    ):
        with pytest.raises(Disagreement, match=r"it leaves its limits for \d+ of 256 inputs: nothing was published"):
            fuzz("it", changed(name, change), signature, pool, FUZZED)
    with pytest.raises(Disagreement, match="it changes an item that is not limited"):
        fuzz("it", changed(LIMITED, np.zeros_like), signature, pool, FUZZED, own=policy.unlimited.run_reference)


def test_rounding_may_decide_whether_one_item_is_limited() -> None:
    policy = limited(follow((1,)), action={"high": 1, "fallback": 0})
    ours = act(policy, *np.linspace(-1, 0.9, 100)[:, None])
    for differing, holds in ((0, True), (2, True), (3, False)):
        theirs = {**ours, LIMITED: (np.arange(100) < differing).astype(np.uint8)}
        assert golden.compare(policy.signature, ours, theirs, Tolerance()).holds is holds


def test_a_canary_may_have_limits_that_the_live_version_lacks() -> None:
    policy = limited(follow(), action={"high": 1, "change": 1, "fallback": 0})
    assert serves_clients_of(policy.unlimited.signature, policy.signature)
    assert not serves_clients_of(policy.signature, policy.unlimited.signature)
    tighter = limited(follow(), action={"high": 0.5, "fallback": 0}).signature
    assert serves_clients_of(policy.signature, tighter)
    assert not serves_clients_of(capture(follow((3,))).signature, policy.signature)


def test_a_policy_of_another_library(tmp_path: Path) -> None:
    MODELS["sac"]().save(tmp_path / "model.zip")
    source = from_sb3(tmp_path / "model.zip")
    policy = limited(source, action={"low": [-2, 0], "high": [1, 2], "fallback": [0, 1]})
    found = policy.run_reference(samples.collect(source, policy.signature, 64))
    assert found["action"][:, 1].max() == 2
    assert 0 < np.count_nonzero(found[LIMITED]) < 64


def test_a_policy_with_an_output_of_that_name_is_refused() -> None:
    module = TensorDictModule(nn.Linear(2, 1), in_keys=["observation"], out_keys=["limited"])
    named = PolicySource(module, TensorDict({"observation": torch.zeros(2)}), outputs=("limited",))
    with pytest.raises(UsageError, match="the policy has an output named limited"):
        limited(named, limited={"fallback": 0})


def test_an_onnx_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    limited(follow(), action={"fallback": 0}).build("onnx", tmp_path, {})
    with pytest.raises(UsageError, match=r"an \.onnx file is exported as it is"):
        limit(capture(OnnxSource(tmp_path / "policy.onnx")), parse_limits({"action": {"fallback": 0}}))
