from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actserve.core.errors import RuntimeFailure, UsageError
from actserve.core.settings import Settings
from actserve.engine import golden
from actserve.engine.policy import Policy
from actserve.store.artifact import GOLDEN, Artifact
from actserve.store.local import ModelStore
from tests.publishing import republish


def settings(**changes: object) -> Settings:
    return Settings.model_validate({"runtime": "onnx", **changes})


@pytest.mark.parametrize("size", [1, 31, 256, 700, 3000])
def test_any_number_of_items_is_answered_in_order(cart: Artifact, size: int) -> None:
    async def scenario() -> None:
        policy = Policy.load(cart, settings())
        policy.start()
        batch = cart.manifest.signature.observations[0].sample(np.random.default_rng(0), size)
        outputs = (await policy.act({"observation": batch}, size)).outputs
        assert outputs["action"].shape == (size,)
        last = (await policy.act({"observation": batch[-1:]}, 1)).outputs
        assert outputs["action"][-1] == last["action"][0]
        await policy.close()

    asyncio.run(scenario())


def forge_golden(store: ModelStore, tmp_path: Path) -> Artifact:
    """A new version whose golden samples are not what its programs do."""
    artifact = store.resolve("cart")
    inputs, outputs = golden.read(artifact)
    (tmp_path / GOLDEN).write_bytes(golden.save(inputs, outputs | {"action": (outputs["action"] + 1) % 3}))
    return republish(artifact, store, {GOLDEN: tmp_path / GOLDEN})


def test_a_program_that_does_not_repeat_its_golden_samples_is_not_served(own_store: ModelStore, tmp_path: Path) -> None:
    forged = forge_golden(own_store, tmp_path)
    with pytest.raises(RuntimeFailure, match="32 of 32 actions differ"):
        Policy.load(forged, settings())


def test_auto_falls_back_when_a_program_cannot_be_opened(cart: Artifact, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    artifact = republish(cart, ModelStore(tmp_path / "store"), {"policy.pt2": tmp_path / "junk"})
    policy = Policy.load(artifact, settings(runtime="auto"))
    assert policy.choice.runtime == "onnx"
    assert "refused the package" in policy.choice.reason
    with pytest.raises(RuntimeFailure, match="refused the package"):
        Policy.load(artifact, settings(runtime="pt2"))


def test_settings_are_read_from_the_environment() -> None:
    environment = {"ACTSERVE_THREADS": "2", "ACTSERVE_POLICY": "cart", "ACTSERVE_TRUST": "keys", "HOME": "x"}
    assert Settings.from_environment(environment) == Settings(threads=2, policy="cart", trust=Path("keys"))


def test_a_wrong_setting_names_its_variable_and_does_not_tell_its_value() -> None:
    with pytest.raises(UsageError, match=r"^ACTSERVE_THREADS: .* greater than or equal to 1$"):
        Settings.from_environment({"ACTSERVE_THREADS": "0"})
    with pytest.raises(UsageError, match=r"^ACTSERVE_ADMIN_TOKEN: ") as caught:
        Settings.from_environment({"ACTSERVE_ADMIN_TOKEN": "too short"})
    assert "too short" not in caught.value.message


def test_settings_mean_the_same_in_another_folder() -> None:
    moved = Settings(store="here", trust=Path("keys")).absolute()
    assert (moved.store, moved.trust) == (str(Path("here").resolve()), Path("keys").resolve())
    assert Settings(store="s3://bucket/here").absolute().store == "s3://bucket/here"
