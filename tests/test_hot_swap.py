"""A registry that follows its store: every version's actions are its own, see `tests.variants`."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actserve.core.errors import NotFetched, RuntimeFailure, SessionsUnavailable, UnknownVersion
from actserve.core.settings import Settings
from actserve.engine.policy import Policy
from actserve.engine.registry import Registry, loaded
from actserve.engine.registry.loaded import Loaded
from actserve.server.app import create_app
from actserve.store import routing
from actserve.store.artifact import MANIFEST, Artifact
from actserve.store.local import ModelStore
from actserve.store.routing import FILE
from actserve.telemetry.counts import Counts
from tests.asgi import Caller
from tests.test_faults import deleted, emptied, flipped, gone, linked, overwritten, truncated, without_manifest
from tests.variants import Variants
from tests.waiting import until_in_loop

Scenario = Callable[[Registry, Variants], Awaitable[None]]


@pytest.fixture
def variants(cart_store: ModelStore, tmp_path: Path) -> Variants:
    """`cart`@1 in a store of its own."""
    made = Variants(cart_store.resolve("cart"), ModelStore(tmp_path / "store"))
    made.publish()
    return made


def follow(variants: Variants, scenario: Scenario) -> None:
    """A registry that looks at the store when the scenario says so."""

    async def main() -> None:
        registry = Registry(variants.store, Settings(runtime="onnx", poll_s=3600))
        try:
            await registry.poll()
            await scenario(registry, variants)
        finally:
            await registry.close()

    asyncio.run(main())


async def version_by_action(policy: Policy, variants: Variants) -> int:
    """Which of three neighbouring versions `policy` acts as, 0 to 2."""
    acted = await policy.act({"observation": variants.observations[:1]}, 1)
    return (int(acted.outputs["action"][0]) - variants.episode(1)[0]) % variants.actions


def loaded_of(registry: Registry) -> list[int]:
    found: list[int] = registry.describe("cart")["loaded"]
    return found


class Far(ModelStore):
    """A store that is far away, as `Loaded` sees it."""

    def _open(self, name: str, version: int, fetch: bool) -> Artifact:
        if not fetch:
            time.sleep(0.1)
            raise NotFetched("it is far away")
        return super()._open(name, version, fetch)


def test_a_request_that_has_nothing_fetched_does_not_keep_the_registry_from_it(variants: Variants) -> None:
    async def main() -> None:
        loaded = Loaded(Far(variants.store.root), Settings(runtime="onnx"), Counts())
        asked = asyncio.create_task(loaded.get("cart", 1, fetch=False))
        await asyncio.sleep(0)
        assert (await loaded.get("cart", 1)).version == 1
        with pytest.raises(NotFetched):
            await asked
        await loaded.close()

    asyncio.run(main())


def test_a_new_version_takes_over_and_the_old_one_is_unloaded(variants: Variants) -> None:
    async def scenario(registry: Registry, variants: Variants) -> None:
        generation = registry.generation
        variants.publish()
        await registry.poll()
        assert await version_by_action(await registry.get("cart"), variants) == 2
        assert registry.generation > generation
        assert registry.swaps == {"cart": 1}
        assert loaded_of(registry) == [2]
        await registry.poll()
        assert registry.swaps == {"cart": 1}

    follow(variants, scenario)


def test_whoever_acts_with_the_old_version_is_answered_by_it(variants: Variants) -> None:
    async def scenario(registry: Registry, variants: Variants) -> None:
        old = await registry.get("cart")
        batcher = old.batcher
        variants.publish()
        await registry.poll()
        assert loaded_of(registry) == [1, 2]
        assert (await registry.get("cart", 1)) is old, "it is not loaded twice"
        registry._loaded._kept.clear()
        assert await version_by_action(old, variants) == 1
        answer = asyncio.ensure_future(old.act({"observation": variants.observations[:8]}, 8))
        await asyncio.sleep(0)
        del old
        assert len((await answer).outputs["action"]) == 8
        del answer
        assert loaded_of(registry) == [2]
        await until_in_loop(lambda: not batcher._open)

    follow(variants, scenario)


def test_nobody_keeps_an_old_version_by_having_failed(variants: Variants) -> None:
    async def scenario(registry: Registry, variants: Variants) -> None:
        for _ in range(3):
            with pytest.raises(Exception, match="expected"):
                await (await registry.get("cart")).act({"observation": variants.observations[:1]}, 1, "random")
        gc.disable()
        try:
            variants.publish()
            await registry.poll()
            assert loaded_of(registry) == [2]
        finally:
            gc.enable()

    follow(variants, scenario)


def test_requests_that_were_refused_keep_no_old_version(variants: Variants) -> None:
    settings = Settings(store=str(variants.store.root), runtime="onnx", poll_s=3600)
    json = {"Content-Type": "application/json"}
    with Caller(create_app(settings)) as call:
        call.wait(lambda: not call.app.state.registry.loading)
        gc.collect()
        gc.disable()
        try:
            for body in (b"{", b"{}", b'{"observation": [1]}', b'{"observation": [0, 0, 0, 0], "seed": -1}'):
                assert call("POST", "/policies/cart/act", body, json).status in (400, 422)
            assert call("POST", "/v2/models/cart/infer", b"{}", json).status == 400
            variants.publish()
            call.run(call.app.state.registry.poll())
            call.wait(lambda: loaded_of(call.app.state.registry) == [2])
        finally:
            gc.enable()


def test_a_version_that_does_not_repeat_its_golden_samples_is_not_served(variants: Variants) -> None:
    async def scenario(registry: Registry, variants: Variants) -> None:
        variants.publish(spoilt=True)
        await registry.poll()
        described = registry.describe("cart")
        assert described["version"] == 1
        assert described["refused"][2]["code"] == RuntimeFailure.code
        assert "golden samples" in described["refused"][2]["message"]
        assert loaded_of(registry) == [1]
        variants.publish()
        await registry.poll()
        assert registry.describe("cart")["version"] == 3
        shutil.rmtree(variants.store.root / "cart" / "2")
        await registry.poll()
        assert registry.describe("cart")["refused"] == {}

    follow(variants, scenario)


FAULTS = [overwritten, flipped, truncated, emptied, without_manifest, deleted, linked, gone]


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_happens_to_the_store_the_old_version_serves(
    variants: Variants, fault: Callable[[Path], None]
) -> None:
    async def scenario(registry: Registry, variants: Variants) -> None:
        routing.alias(variants.store, "cart", "champion", 1)
        await registry.poll()
        variants.publish()
        for version in ("1", "2"):
            if (folder := variants.store.root / "cart" / version).exists():
                fault(folder)
        for _ in range(2):
            await registry.poll(retry=True)
            assert await version_by_action(await registry.get("cart"), variants) == 1
            assert await version_by_action(await registry.find("cart", "champion"), variants) == 1
        refused = registry.describe("cart")["refused"]
        assert list(refused) == ([2] if (variants.store.root / "cart" / "2").is_dir() and fault is not linked else [])
        assert registry.swaps == {}

    follow(variants, scenario)


def test_a_version_that_is_looked_at_while_it_is_copied_is_served_in_the_end(
    cart_store: ModelStore, variants: Variants, tmp_path: Path
) -> None:
    away = Path(shutil.copytree(variants.store.root, tmp_path / "away"))
    Variants(cart_store.resolve("cart"), ModelStore(away)).publish()
    source, target = away / "cart" / "2", variants.store.root / "cart" / "2"

    async def main() -> None:
        registry = Registry(variants.store, Settings(runtime="onnx", poll_s=0.02))
        registry.start()
        try:
            await until_in_loop(lambda: not registry.loading)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST))
            await until_in_loop(lambda: 2 in registry.describe("cart")["refused"])
            assert registry.describe("cart")["version"] == 1
            shutil.copy(source / MANIFEST, target)
            await until_in_loop(lambda: registry.describe("cart")["version"] == 2)
            assert registry.describe("cart")["refused"] == {}
        finally:
            await registry.close()

    asyncio.run(main())


def test_a_pin_and_what_comes_of_it_outlive_the_service(variants: Variants) -> None:
    async def pinned(registry: Registry, variants: Variants) -> None:
        variants.publish()
        variants.publish()
        await registry.poll()
        assert registry.describe("cart")["version"] == 3
        routing.roll_back(variants.store, "cart")
        await registry.poll()
        assert await version_by_action(await registry.get("cart"), variants) == 2
        variants.publish()
        await registry.poll()
        assert registry.describe("cart")["version"] == 2

    async def later(registry: Registry, variants: Variants) -> None:
        assert registry.describe("cart")["version"] == 2
        (variants.store.root / "cart" / FILE).write_text("{")
        await registry.poll()
        described = registry.describe("cart")
        assert described["version"] == 2
        assert described["routing"]["problems"]["routing"]["code"] == "invalid_routing"
        (variants.store.root / "cart" / FILE).unlink()
        await registry.poll()
        assert registry.describe("cart")["version"] == 2, "a wish that has gone with its file still holds"
        routing.pin(variants.store, "cart", None)
        await registry.poll()
        described = registry.describe("cart")
        assert described["version"] == 4
        assert described["routing"]["problems"] == {}

    follow(variants, pinned)
    follow(variants, later)


def test_a_pin_that_cannot_be_served_leaves_what_is(variants: Variants) -> None:
    variants.publish(spoilt=True)
    variants.publish()

    async def scenario(registry: Registry, variants: Variants) -> None:
        routing.pin(variants.store, "cart", 2)
        await registry.poll()
        described = registry.describe("cart")
        assert (described["version"], list(described["refused"])) == (3, [2])

    follow(variants, scenario)


def test_an_alias_stands_for_a_version_and_moves_only_to_one_that_can_be_served(variants: Variants) -> None:
    variants.publish()
    variants.publish(spoilt=True)
    variants.publish()

    async def scenario(registry: Registry, variants: Variants) -> None:
        routing.alias(variants.store, "cart", "champion", 2)
        await registry.poll()
        assert (await registry.find("cart", "champion")).artifact.label == "cart@2"
        assert loaded_of(registry) == [2, 4]
        routing.alias(variants.store, "cart", "champion", 3)
        await registry.poll()
        assert (await registry.find("cart", "champion")).artifact.label == "cart@2"
        told = registry.describe("cart")["routing"]
        assert told["aliases"] == {"champion": 2}
        assert told["problems"]["alias champion"]["code"] == "runtime_failure"
        routing.alias(variants.store, "cart", "champion", None)
        await registry.poll()
        with pytest.raises(UnknownVersion, match="champion"):
            await registry.find("cart", "champion")
        assert loaded_of(registry) == [4]

    follow(variants, scenario)


def test_a_canary_acts_on_its_share(variants: Variants) -> None:
    async def scenario(registry: Registry, variants: Variants) -> None:
        variants.publish()
        routing.pin(variants.store, "cart", 1)
        routing.canary(variants.store, "cart", 2, 0.25)
        await registry.poll()
        assert registry.has_candidate("cart")
        live = await registry.get("cart")
        chosen = [registry.route(live).artifact.manifest.version for _ in range(12)]
        assert chosen == [1, 1, 1, 2] * 3
        begun = [(await registry.begin("cart")).artifact.manifest.version for _ in range(4)]
        assert begun == [1, 1, 1, 2]
        generation = registry.generation
        routing.pin(variants.store, "cart", None)
        await registry.poll()
        assert registry.describe("cart")["version"] == 2
        assert not registry.has_candidate("cart"), "the candidate is what is live"
        assert registry.generation > generation

    follow(variants, scenario)


def test_a_shadow_is_compared_and_nobody_waits_for_it(variants: Variants) -> None:
    for _ in range(3):
        variants.publish()

    async def scenario(registry: Registry, variants: Variants) -> None:
        async def compared(total: int) -> dict[str, Any]:
            """The report, once so many requests were compared or dropped."""

            def told() -> dict[str, Any]:
                found: dict[str, Any] = registry.describe("cart")["routing"]["shadow"]
                return found

            ways = ("agreements", "disagreements", "failures", "dropped")
            await until_in_loop(lambda: sum(told()[way] for way in ways) == total)
            return told()

        async def ask(times: int) -> dict[str, Any]:
            live = await registry.get("cart")
            for _ in range(times):
                tensors = {"observation": variants.observations[:4]}
                registry.mirror(live, tensors, 4, None, await live.act(tensors, 4))
            return await compared(4 * times)

        routing.shadow(variants.store, "cart", 1)  # three versions before: the same actions
        await registry.poll()
        assert await ask(3) == {"version": 1, "agreements": 12, "disagreements": 0, "failures": 0, "dropped": 0}
        routing.shadow(variants.store, "cart", 2)
        await registry.poll()
        assert await ask(2) == {"version": 2, "agreements": 0, "disagreements": 8, "failures": 0, "dropped": 0}
        live = await registry.get("cart")
        acted = await live.act({"observation": variants.observations[:1]}, 1)
        for _ in range(20):
            registry.mirror(live, {"observation": variants.observations[:1]}, 1, None, acted)
        told = await compared(8 + 20)
        assert (told["disagreements"], told["dropped"]) == (8 + 8, 12)
        routing.shadow(variants.store, "cart", None)
        await registry.poll()
        assert registry.describe("cart")["routing"]["shadow"] is None

    follow(variants, scenario)


@contextmanager
def at(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> Iterator[Callable[[float], None]]:
    """A clock that the test moves, for versions that are kept loaded."""
    now = [0.0]
    with monkeypatch.context() as patched:
        patched.setattr(registry._loaded, "_clock", lambda: now[0])
        yield lambda seconds: now.__setitem__(0, seconds)


def test_sessions_keep_their_version_loaded(variants: Variants, monkeypatch: pytest.MonkeyPatch) -> None:
    on: set[tuple[str, int]] = {("cart", 1)}

    async def scenario(registry: Registry, variants: Variants) -> None:
        registry.session_versions = lambda: on
        with at(monkeypatch, registry) as move:
            variants.publish()
            await registry.poll()
            assert loaded_of(registry) == [1, 2]
            move(loaded.UNUSED_S + 1)
            await registry.poll()
            assert loaded_of(registry) == [2], "nobody has stepped for long: it can be loaded again"
            assert await version_by_action(await registry.resume("cart", 1), variants) == 1
            await registry.poll()
            assert loaded_of(registry) == [1, 2]
            shutil.rmtree(variants.store.root / "cart" / "1")
            move(2 * loaded.UNUSED_S + 2)
            await registry.poll()
            assert loaded_of(registry) == [1, 2], "it could not be loaded again"
            assert await version_by_action(await registry.resume("cart", 1), variants) == 1
            on.clear()
            await registry.poll()
            await until_in_loop(lambda: loaded_of(registry) == [2])  # a thread that loaded it may hold it yet

    follow(variants, scenario)


def test_while_the_sessions_cannot_be_asked_nothing_is_unloaded(variants: Variants) -> None:
    def unavailable() -> set[tuple[str, int]]:
        raise SessionsUnavailable("the disk is full")

    async def scenario(registry: Registry, variants: Variants) -> None:
        registry.session_versions = unavailable
        variants.publish()
        await registry.poll()
        await registry.poll()
        assert registry.describe("cart")["version"] == 2
        assert loaded_of(registry) == [1, 2]

    follow(variants, scenario)


def test_a_version_that_was_asked_for_by_its_number_stays_for_a_while(
    variants: Variants, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants.publish()

    async def scenario(registry: Registry, variants: Variants) -> None:
        with at(monkeypatch, registry) as move:
            await registry.get("cart", 1)
            move(loaded.UNUSED_S - 1)
            await registry.poll()
            assert loaded_of(registry) == [1, 2]
            move(loaded.UNUSED_S + 1)
            await registry.poll()
            await until_in_loop(lambda: loaded_of(registry) == [2])  # a thread that loaded it may hold it yet

    follow(variants, scenario)
