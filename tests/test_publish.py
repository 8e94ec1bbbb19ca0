"""The whole export: what enters the store, and what does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential

from actserve.core.environment import game_of
from actserve.core.errors import Disagreement, UsageError
from actserve.engine import golden
from actserve.store.artifact import GOLDEN, Artifact
from actserve.store.local import ModelStore
from actserve_export import publish
from actserve_export.capture import swaps
from actserve_export.capture.steps import LeftOut
from actserve_export.publish import export
from actserve_export.sources.policy_source import PolicySource
from actserve_export.targets import load, playing
from tests.policies import cart


def test_an_artifact_is_whole(cart_store: ModelStore, cart: Artifact) -> None:
    manifest = cart.manifest
    cart_store.verify(cart)
    assert set(manifest.files) == {"policy.onnx", "policy.pt2", "graph.txt", "program.safetensors", GOLDEN}
    assert manifest.certificate["batch_sizes"] == [1, 3, 8, 32]
    assert 64 <= manifest.certificate["samples"] <= 512
    for program in manifest.certificate["programs"].values():
        assert program["action_disagreements"] == 0
        assert program["compared"] == 4 * manifest.certificate["samples"]
        assert program["largest_difference"]["action_value"] < 1e-5
    assert manifest.certificate["smallest_margin"] > 0
    assert set(manifest.certificate["actions"]) <= {"0", "1", "2"}
    assert sum(manifest.certificate["actions"].values()) == manifest.certificate["samples"]
    assert manifest.provenance["origin"] == "tests.policies:cart"
    assert manifest.provenance["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_nothing_in_an_artifact_names_the_machine(cart: Artifact) -> None:
    for name in ("manifest.json", "graph.txt", "policy.onnx", "program.safetensors"):
        text = (cart.folder / name).read_bytes().decode("latin-1")
        assert str(Path.home()) not in text
        assert "site-packages" not in text
        assert str(Path(__file__).parent.parent) not in text


def test_golden_samples_are_the_policys_own(cart: Artifact) -> None:
    inputs, outputs = golden.read(cart)
    scores = outputs["action_value"]
    assert inputs["observation"].shape == (min(32, cart.manifest.certificate["samples"] // 4), 4)
    np.testing.assert_array_equal(outputs["action"], scores.argmax(-1))


def test_exporting_the_same_again_publishes_nothing(own_store: ModelStore) -> None:
    again = export(cart(), "cart", own_store, origin="tests.policies:cart")
    assert (again.published, again.artifact.label) == (False, "cart@1")
    assert own_store.versions("cart") == [1]


def test_a_pt2_for_another_host_is_a_new_version_with_a_parent(
    own_store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_runs_here", lambda artifact, runtimes: artifact.manifest.version != 1)
    again = export(cart(), "cart", own_store, origin="tests.policies:cart", runtimes=["onnx"])
    assert (again.published, again.artifact.label, again.artifact.manifest.parent) == (True, "cart@2", 1)


def test_other_weights_are_another_version(own_store: ModelStore) -> None:
    source = cart()
    with torch.no_grad():
        next(source.policy.parameters()).mul_(2)
    done = export(source, "cart", own_store, origin="x", runtimes=["onnx"])
    assert (done.published, done.artifact.label, done.artifact.manifest.parent) == (True, "cart@2", None)


def test_a_disagreement_publishes_nothing_and_says_where(
    own_store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = golden.in_batches

    def lying(run: object, inputs: object, size: int) -> dict[str, np.ndarray]:
        outputs = honest(run, inputs, size)  # type: ignore[arg-type]
        if size == 8 and getattr(run, "__name__", "") == "run":  # a program, not the reference
            outputs["action"][17] = (outputs["action"][17] + 1) % 3
        return outputs

    monkeypatch.setattr(golden, "in_batches", lying)
    source = cart()
    with torch.no_grad():
        next(source.policy.parameters()).mul_(3)
    with pytest.raises(
        Disagreement, match=r"\.onnx at batch 8 .*\n  item 17: the policy's action is \d, the program gives \d"
    ):
        export(source, "cart", own_store, origin="x", runtimes=["onnx"])
    assert own_store.versions("cart") == [1]
    assert [entry.name for entry in (own_store.root / "cart").iterdir()] == ["1"]


class Doubled(TensorDictModuleBase):
    in_keys, out_keys = ["action_value"], ["action_value"]

    def forward(self, tensordict: TensorDict) -> TensorDict:
        return tensordict.set("action_value", 2 * tensordict.get("action_value"))


def test_what_is_captured_is_compared_with_the_policy_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cart()
    source = replace(source, policy=TensorDictSequential(source.policy, Doubled()))
    store = ModelStore(tmp_path)
    done = export(source, "doubled", store, origin="x", runtimes=["onnx"])
    certificate = done.artifact.manifest.certificate
    original = certificate["original"]
    assert original["name"] == "the policy as it was given"
    assert (original["compared"], original["action_disagreements"]) == (certificate["samples"], 0)
    monkeypatch.setitem(swaps._SWAPS, Doubled, LeftOut)  # a replacement that is wrong
    with pytest.raises(Disagreement, match="what was captured is not the policy"):
        export(source, "wrong", store, origin="x", runtimes=["onnx"])


def test_values_beyond_the_tolerance_are_a_disagreement(cart: Artifact) -> None:
    _, reference = golden.read(cart)
    near = reference | {"action_value": reference["action_value"] + 5e-5}
    far = reference | {"action_value": reference["action_value"] + 5e-3}
    signature = cart.manifest.signature
    assert golden.compare(signature, near, reference, golden.Tolerance()).holds
    agreement = golden.compare(signature, far, reference, golden.Tolerance())
    assert agreement.exceeding == ("action_value",)
    assert agreement.largest_difference["action_value"] == pytest.approx(5e-3, rel=1e-2)
    json.dumps(agreement.summary())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("chess", "a game of ale-py .*, module:factory, or a file"),
        ("no.such.module:factory", "cannot be imported"),
        ("tests.policies:nothing", "cannot be imported"),
        ("tests.policies:", "module:factory"),
        ("json:loads", r"json:loads raised TypeError: loads\(\) missing"),
        (
            "tests.test_publish:wrong",
            r"wrong raised ZeroDivisionError: division by zero \(test_publish\.py, line \d+: return",
        ),
    ],
)
def test_what_cannot_be_found_is_a_usage_error(target: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(target)


def wrong() -> float:
    return 1 / 0


def test_a_policy_of_screens_can_be_said_to_play_a_game() -> None:
    pixels = {"frame": torch.zeros(210, 160, 3, dtype=torch.uint8), "speed": torch.zeros(1)}
    source = PolicySource(cart().policy, TensorDict(pixels))
    environment = game_of(playing(source, "breakout").environment)
    assert environment is not None
    assert (environment.id, environment.screen, len(environment.actions)) == ("ALE/Breakout-v5", "frame", 4)
    with pytest.raises(UsageError, match="expected one observation of a screen"):
        playing(cart(), "pong")


def test_factories_name_their_artifact() -> None:
    assert load("tests.policies:cart_pair")[0] == "cart-pair"
    assert load("pong")[0] == "pong"


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UsageError, match="does not fit the policy"):
        load("tests.policies:cart", tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="not a safetensors file"):
        load("tests.policies:cart", tmp_path / "junk.safetensors")


def test_a_checkpoint_replaces_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    wanted = {name: tensor * 0 + 0.5 for name, tensor in cart().policy.state_dict().items()}
    save_file(wanted, tmp_path / "weights.safetensors")
    _, source = load("tests.policies:cart", tmp_path / "weights.safetensors")
    for name, tensor in source.policy.state_dict().items():
        assert torch.equal(tensor, wanted[name])
