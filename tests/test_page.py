"""The page's files, and that they are all there is to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from actserve.core.settings import Settings
from actserve.server.app import create_app
from actserve.server.arcade.page import INDEX, TYPES, assets
from tests.asgi import Caller

WEB = Path(__file__).parent.parent / "app" / "actserve" / "web"


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    with Caller(create_app(Settings(store=tmp_path_factory.mktemp("empty")))) as caller:
        yield caller


def test_the_page_is_served_with_a_strict_policy(call: Caller) -> None:
    answer = call("GET", "/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (WEB / INDEX).read_bytes()
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'self'"
    assert not [rule for rule in rules.values() if "unsafe" in rule or ":" in rule]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", sorted(file.name for file in WEB.iterdir()))
def test_every_file_has_its_type_and_is_not_sent_twice(call: Caller, name: str) -> None:
    answer = call("GET", f"/page/{name}")
    assert answer.status == 200
    assert answer.content == (WEB / name).read_bytes()
    assert answer.headers["content-type"] == TYPES[Path(name).suffix[1:]]
    again = call("GET", f"/page/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status, again.content) == (304, b"")


def test_nothing_else_is_served(call: Caller) -> None:
    for name in ("nothing.js", "..%2Fmain.py", "../main.py", "__init__.py"):
        assert call("GET", f"/page/{name}").status == 404


def test_the_page_names_only_what_is_there_and_has_nothing_inline() -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.links: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = dict(attributes)
            assert tag != "style"
            assert tag != "script" or "src" in given
            assert not [name for name in given if name.startswith("on") or name == "style"]
            self.links += [value for name, value in given.items() if name in ("src", "href") and value]

    reader = Reader()
    reader.feed((WEB / INDEX).read_text())
    assert all(link in ("docs", "policies") or link.removeprefix("page/") in assets() for link in reader.links)
    for script in WEB.glob("*.js"):
        names = re.findall(r'"(?:\./|page/)([^"]+)"', script.read_text())
        assert names or "import" not in script.read_text()
        for name in names:
            assert name in assets()
        assert "http:" not in script.read_text()
        assert "https:" not in script.read_text()


def test_the_page_is_light() -> None:
    assert sum(len(content) for content, _ in assets().values()) < 60_000
