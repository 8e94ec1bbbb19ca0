from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from actserve.cli.stores import find
from actserve.cli.tools.diff import Diff, diff, show
from actserve.core.errors import RuntimeFailure
from actserve.engine.runtimes.base import Runtime
from actserve.engine.runtimes.load import RUNTIMES
from actserve.store.local import ModelStore
from tests.publishing import republish


def compare(store: ModelStore, before: str, after: str) -> Diff:
    return diff(find(store, before), find(store, after))


def text(store: ModelStore, before: str, after: str) -> str:
    output = StringIO()
    show(compare(store, before, after), Console(file=output, width=120))
    return output.getvalue()


def test_an_artifact_does_not_differ_from_itself(cart_store: ModelStore) -> None:
    found = compare(cart_store, "cart@1", "cart")
    assert found.signature == ()
    assert found.agreement is not None
    assert found.agreement.same == found.agreement.samples == 32  # the samples of both are the same 32
    assert found.agreement.largest_difference == {"action_value": 0.0}
    assert found.before.label == found.after.label == "cart@1"
    assert found.before.runtime == found.after.runtime == "pt2"
    assert set(found.before.median_us) == {1, 8}
    assert found.before.files["policy.onnx"] > 0


def test_it_is_json(cart_store: ModelStore) -> None:
    document = json.loads(json.dumps(compare(cart_store, "cart", "cart").as_json()))
    assert set(document) == {"before", "after", "signature", "agreement"}
    assert set(document["before"]["median_us"]) == {"1", "8"}


def test_two_runtimes_of_the_same_policy(own_store: ModelStore) -> None:
    first = own_store.resolve("cart")
    onnx_only = {"onnx": first.manifest.programs["onnx"]}
    files = {name: first.folder / name for name in first.manifest.files if name != "policy.pt2"}
    own_store.publish(replace(first.manifest, programs=onnx_only), files)
    found = compare(own_store, "cart@1", "cart@2")
    assert (found.before.runtime, found.after.runtime) == ("pt2", "onnx")
    assert found.agreement is not None
    assert found.agreement.same == found.agreement.samples
    assert found.agreement.largest_difference["action_value"] < 1e-5
    assert "policy.pt2" not in found.after.files
    shown = text(own_store, "cart@1", "cart@2")
    assert "the same action on 32 of 32 golden samples (100.0%)" in shown
    assert "the same signature" in shown


def test_a_changed_signature(own_store: ModelStore) -> None:
    first = own_store.resolve("cart")
    signature = first.manifest.signature
    (observation,) = signature.observations
    changed = replace(
        signature, observations=(replace(observation, shape=(5,)),), outputs=signature.outputs[:1], max_batch=4
    )
    republish(first, own_store, signature=changed, programs={})
    found = compare(own_store, "cart@1", "cart@2")
    assert [(change.way, change.name, change.before, change.after) for change in found.signature] == [
        ("takes", "observation", "float32[4]", "float32[5]"),
        ("gives", "action_value", "float32[3]", None),
        ("takes", "max_batch", "256", "4"),
    ]
    assert found.agreement is None
    assert found.after.runtime is None
    assert found.after.median_us == {}
    assert "actions not compared" in text(own_store, "cart@1", "cart@2")


def test_a_program_that_does_not_open_gives_way(cart_store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "pt2", "tests.test_diff:Broken")
    found = compare(cart_store, "cart", "cart")
    assert found.before.runtime == "onnx"
    assert "not .pt2: broken" in found.before.reason


class Broken:
    @staticmethod
    def load(artifact: object, threads: int, shared: object) -> Runtime:
        raise RuntimeFailure("broken")
