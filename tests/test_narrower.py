"""`serve --precision any`: a narrower program acts where it is faster."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from actserve.core.errors import RuntimeFailure
from actserve.core.settings import Settings
from actserve.engine import threads
from actserve.engine.narrower import ORIGINAL, narrower
from actserve.engine.policy import Policy
from actserve.engine.tuning import Tuning
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from tests.publishing import republish


def publish(store: ModelStore, original: Artifact, precision: str, **changes: Any) -> Artifact:
    """The same program under the name of a narrower one."""
    provenance = {**original.manifest.provenance, ORIGINAL: original.label}
    return republish(original, store, name=f"{original.manifest.name}-{precision}", provenance=provenance, **changes)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Nanoseconds per item by the artifact's label; what is not there fails."""
    found: dict[str, int] = {}
    load = threads.load

    def measured(name: str, artifact: Artifact, settings: Settings, tuning: Tuning | None) -> Any:
        if artifact.label not in found:
            raise RuntimeFailure(f"{artifact.label} is broken")
        return load(name, artifact, settings, Tuning({1: found[artifact.label]}))

    monkeypatch.setattr(threads, "load", measured)
    return found


def test_the_fastest_program_acts_and_the_reason_says_so(own_store: ModelStore, times: dict[str, int]) -> None:
    original = own_store.resolve("cart")
    made = [publish(own_store, original, precision) for precision in ("int8", "bf16")]
    assert [other.label for other in narrower(own_store, original)] == ["cart-int8@1", "cart-bf16@1"]
    settings = Settings(runtime="onnx", precision="any")
    times |= {"cart@1": 1000, "cart-int8@1": 400, "cart-bf16@1": 700}
    policy = Policy.load(original, settings, made)
    assert (policy.name, policy.version) == ("cart", 1)
    assert policy.tuning.best_ns == 400
    assert policy.choice.reason.startswith("cart-int8@1, as --precision any allows: it takes 0.40 of the time of ")
    times["cart-int8@1"] = 1001
    assert Policy.load(original, settings, made).choice.reason.startswith("cart-bf16@1")


def test_a_narrower_program_that_cannot_run_is_left_out(
    own_store: ModelStore, times: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    original = own_store.resolve("cart")
    broken = publish(own_store, original, "int8")
    times["cart@1"] = 1000
    with caplog.at_level(logging.WARNING, "actserve"):
        policy = Policy.load(original, Settings(runtime="onnx", precision="any"), [broken])
    assert "--precision" not in policy.choice.reason
    assert "cart-int8@1 is not used for cart@1: cart-int8@1 is broken" in caplog.text


def test_only_what_was_made_of_this_version_counts(own_store: ModelStore) -> None:
    original = own_store.resolve("cart")
    signature = replace(original.manifest.signature, max_batch=7)
    publish(own_store, original, "int8", signature=signature)
    assert narrower(own_store, original) == []
    publish(own_store, original, "int8")
    assert [other.label for other in narrower(own_store, original)] == ["cart-int8@2"]
    another = replace(original, manifest=replace(original.manifest, version=9))
    assert narrower(own_store, another) == []
    (own_store.root / "cart-int8" / "2" / "manifest.json").write_bytes(b"{")
    assert narrower(own_store, original) == []


def test_only_an_operator_can_allow_it() -> None:
    assert Settings().precision == "fp32"
    assert Settings.from_environment({"ACTSERVE_PRECISION": "any"}).precision == "any"
