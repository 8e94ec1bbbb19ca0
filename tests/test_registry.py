from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from actserve.core.errors import NotServing, StoreError, UnknownPolicy, UnknownVersion
from actserve.core.settings import Settings
from actserve.engine.registry import Registry
from actserve.store.artifact import MANIFEST
from actserve.store.local import ModelStore
from tests.publishing import republish
from tests.waiting import until_in_loop


def with_registry(store: ModelStore, scenario: Callable[[Registry], Awaitable[None]], **changes: object) -> None:
    async def main() -> None:
        registry = Registry(store, Settings.model_validate({"runtime": "onnx", **changes}))
        registry.start()
        try:
            await until_in_loop(lambda: not registry.loading)
            await scenario(registry)
        finally:
            await registry.close()

    asyncio.run(main())


def publish_again(store: ModelStore) -> None:
    republish(store.resolve("cart"), store)


def test_the_highest_good_version_is_live_and_the_refused_say_why(own_store: ModelStore) -> None:
    publish_again(own_store)
    publish_again(own_store)
    (own_store.root / "cart" / "3" / MANIFEST).unlink()

    async def scenario(registry: Registry) -> None:
        assert registry.not_ready() is None
        assert (await registry.get()).artifact.label == "cart@2"
        described = registry.describe("cart")
        assert described["version"] == 2
        assert described["refused"][3]["code"] == "unfinished_version"
        with pytest.raises(StoreError, match="cut short"):
            await registry.get("cart", 3)

    with_registry(own_store, scenario)


def test_other_versions_are_loaded_once_when_asked_for(own_store: ModelStore) -> None:
    publish_again(own_store)

    async def scenario(registry: Registry) -> None:
        first, second = await asyncio.gather(registry.get("cart", 1), registry.get("cart", 1))
        assert first is second
        assert first.artifact.label == "cart@1"
        assert (await registry.get("cart", 2)) is (await registry.get("cart"))
        with pytest.raises(UnknownVersion, match="known: 1, 2"):
            await registry.get("cart", 3)

    with_registry(own_store, scenario)


def test_unknown_and_broken_policies(own_store: ModelStore) -> None:
    (own_store.root / "broken" / "1").mkdir(parents=True)

    async def scenario(registry: Registry) -> None:
        assert registry.default == "cart"
        with pytest.raises(UnknownPolicy, match="known: cart"):
            await registry.get("nobody")
        with pytest.raises(StoreError, match="broken@1"):
            await registry.get("broken")
        assert registry.describe("broken")["version"] is None

    with_registry(own_store, scenario)


def test_what_is_published_later_does_not_become_the_default(own_store: ModelStore) -> None:
    async def scenario(registry: Registry) -> None:
        await until_in_loop(lambda: registry.default == "cart")
        republish(own_store.resolve("cart"), own_store, name="another")
        await registry.poll()
        assert [policy.name for policy in registry.live] == ["cart", "another"]
        assert registry.default == "cart"

    with_registry(own_store, scenario)


def test_a_default_that_there_is_not_is_not_ready(own_store: ModelStore) -> None:
    async def scenario(registry: Registry) -> None:
        assert registry.not_ready() == "there is no policy 'nobody' to serve by default"
        assert (await registry.get("cart")).name == "cart"

    with_registry(own_store, scenario, policy="nobody")


def test_an_empty_store_is_not_ready(tmp_path_factory: pytest.TempPathFactory) -> None:
    async def scenario(registry: Registry) -> None:
        assert registry.not_ready() == "no policy in the store can be served"

    with_registry(ModelStore(tmp_path_factory.mktemp("empty")), scenario)


def test_while_loading_requests_are_told_to_come_back(cart_store: ModelStore) -> None:
    async def main() -> None:
        registry = Registry(cart_store, Settings(runtime="onnx"))
        assert registry.not_ready() == "policies are being loaded"
        with pytest.raises(NotServing, match="are being loaded"):
            await registry.get("cart")
        with pytest.raises(NotServing, match="are being loaded"):
            registry.describe("cart")
        await registry.close()

    asyncio.run(main())


def test_a_store_that_is_away_when_a_worker_begins_is_no_store_without_policies(own_store: ModelStore) -> None:
    away = own_store.root.rename(own_store.root.with_name("away"))

    async def scenario(registry: Registry) -> None:
        assert registry.not_ready() == "the folder of the store cannot be read: No such file or directory"
        for ask in (registry.get, registry.begin):
            with pytest.raises(NotServing, match="cannot be read: No such file or directory; try again shortly"):
                await ask("cart")
        with pytest.raises(NotServing, match="cannot be read"):
            registry.describe("cart")
        away.rename(own_store.root)
        polled = asyncio.create_task(registry.poll())
        while not polled.done():  # no policy is unknown before the store's policies are loaded
            with contextlib.suppress(NotServing):
                assert (await registry.get("cart")).name == "cart"
            await asyncio.sleep(0.001)
        assert (await registry.get("cart")).name == "cart"
        with pytest.raises(UnknownPolicy):
            await registry.get("chess")

    with_registry(own_store, scenario, poll_s=600)


def test_a_store_that_goes_away_while_it_is_read_is_no_store_without_policies(
    own_store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh = ModelStore.refresh

    def refresh_and_go_away(store: ModelStore) -> None:
        refresh(store)
        own_store.root.rename(own_store.root.with_name("away"))

    monkeypatch.setattr(ModelStore, "refresh", refresh_and_go_away)

    async def scenario(registry: Registry) -> None:
        with pytest.raises(NotServing, match="cannot be read"):
            await registry.get("cart")

    with_registry(own_store, scenario, poll_s=600)
