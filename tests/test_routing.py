from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest

from actserve.core.errors import InvalidRequest, InvalidRouting, UnknownPolicy, UnknownVersion
from actserve.store import routing
from actserve.store.local import ModelStore
from actserve.store.routing import FILE, Routing


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """`pong` in versions 1, 2 and 5, of which nobody looks at the contents."""
    for version in (1, 2, 5):
        (tmp_path / "pong" / str(version)).mkdir(parents=True)
    return ModelStore(tmp_path)


@pytest.mark.parametrize(
    ("versions", "pin", "serving", "expected"),
    [
        ([1, 2, 5], None, None, [5, 2, 1]),
        ([1, 2, 5], None, 2, [5]),
        ([1, 2, 5], None, 1, [5, 2]),
        ([1, 2, 5], None, 5, []),
        ([1, 2], None, 5, []),  # the live version has gone from the store
        ([], None, None, []),
        ([], None, 5, []),
        ([1, 2, 5], 2, None, [2, 1]),
        ([1, 2, 5], 2, 5, [2]),
        ([1, 2, 5], 2, 2, []),
        ([1, 2, 5], 2, 1, [2]),
        ([1, 5], 2, 5, [2]),  # it will be told that there is none
    ],
)
def test_what_is_tried_in_place_of_what_is_served(
    versions: list[int], pin: int | None, serving: int | None, expected: list[int]
) -> None:
    assert routing.versions_to_try(versions, Routing(pin=pin), serving) == expected


def test_wishes_are_kept_beside_each_other_until_they_are_taken_back(store: ModelStore) -> None:
    assert routing.read(store.root, "pong") is None
    routing.pin(store, "pong", 2)
    routing.alias(store, "pong", "champion", 5)
    routing.alias(store, "pong", "rival", 1)
    routing.canary(store, "pong", 5, 0.25)
    written = routing.shadow(store, "pong", 1)
    assert routing.read(store.root, "pong") == written
    assert written.versions == {1, 2, 5}
    assert json.loads((store.root / "pong" / FILE).read_text()) == {
        "pin": 2,
        "aliases": {"champion": 5, "rival": 1},
        "canary": {"version": 5, "share": 0.25},
        "shadow": 1,
    }
    routing.pin(store, "pong", None)
    routing.alias(store, "pong", "champion", None)
    routing.alias(store, "pong", "rival", None)
    routing.canary(store, "pong", None)
    assert routing.shadow(store, "pong", None) == Routing()
    assert sorted(path.name for path in (store.root / "pong").iterdir()) == ["1", "2", "5", FILE]
    assert store.versions("pong") == [1, 2, 5]


def test_rolling_back_pins_the_version_before(store: ModelStore) -> None:
    assert routing.roll_back(store, "pong").pin == 2
    assert routing.roll_back(store, "pong").pin == 1
    with pytest.raises(InvalidRequest, match="a version of pong below 1"):
        routing.roll_back(store, "pong")
    assert routing.roll_back(store, "pong", serving=5).pin == 2


def test_what_cannot_be_wished_for_changes_nothing(store: ModelStore) -> None:
    routing.pin(store, "pong", 2)
    with pytest.raises(UnknownVersion, match="known: 1, 2, 5"):
        routing.pin(store, "pong", 3)
    with pytest.raises(UnknownPolicy, match="known: pong"):
        routing.pin(store, "../pong", 2)
    for alias in ("7", "Champion", "a/b", "a\n", "a" * 65, ""):
        with pytest.raises(InvalidRequest, match="aliases"):
            routing.alias(store, "pong", alias, 1)
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(InvalidRequest, match=r"canary\.share"):
            routing.canary(store, "pong", 5, share)
    assert routing.read(store.root, "pong") == Routing(pin=2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pin": "2"}', b'{"pin": 2, "x": 1}', b" " * 100_000])
def test_a_file_that_cannot_be_read_is_told_and_left_alone(store: ModelStore, content: bytes) -> None:
    file = store.root / "pong" / FILE
    file.write_bytes(content)
    with pytest.raises(InvalidRouting, match=r"pong: routing\.json"):
        routing.read(store.root, "pong")
    with pytest.raises(InvalidRouting):
        routing.pin(store, "pong", 2)
    assert file.read_bytes() == content


def test_a_store_that_cannot_be_written_to_is_told(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(InvalidRouting, match=r"pong: routing\.json cannot be written: Read-only file system"):
        routing.pin(store, "pong", 2)


def test_a_link_is_not_followed(store: ModelStore) -> None:
    (store.root / "elsewhere").write_text("{}")
    (store.root / "pong" / FILE).symlink_to(store.root / "elsewhere")
    with pytest.raises(InvalidRouting):
        routing.read(store.root, "pong")


def test_of_wishes_that_come_at_once_none_is_lost(store: ModelStore) -> None:
    threads = [threading.Thread(target=routing.alias, args=(store, "pong", f"a{i}", 1)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = routing.read(store.root, "pong")
    assert found is not None
    assert len(found.aliases) == 20
