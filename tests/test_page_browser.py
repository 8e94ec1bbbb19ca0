"""The page in a real browser: every test of one visit ends without a complaint of the browser's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from actserve.atari.emulator import AtariGame
from actserve.server.access.tokens import add
from actserve.server.arcade.game import encode_png
from tests import browser
from tests.browser import Tab
from tests.page_service import Service, running
from tests.test_atari import PONG
from tests.waiting import until

pytestmark = pytest.mark.skipif(
    browser.PATH is None, reason=f"no Chromium is installed ({', '.join(browser.NAMES)}): apt-get install chromium"
)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as up:
        yield up


@pytest.fixture(scope="module")
def one_tab() -> Iterator[Tab]:
    with browser.tab() as tab:
        yield tab


@pytest.fixture
def tab(one_tab: Tab, service: Service) -> Iterator[Tab]:
    """A fresh visit to the page, which asks nobody else for anything and never complains."""
    one_tab.complaints.clear()
    one_tab.requested.clear()
    one_tab.open(f"{service.url}/")
    one_tab.wait("!document.querySelector('#start').disabled")
    yield one_tab
    one_tab.open("about:blank")
    until(lambda: service.seats.taken == 0)
    assert one_tab.complaints == []
    own = (f"http://{service.address}/", f"ws://{service.address}/", "about:", "blob:")
    assert [url for url in one_tab.requested if not url.startswith(own)] == []


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    game = AtariGame(PONG, 3)
    for _ in range(70):
        game.act(0)
    file = tmp_path / "screen.png"
    file.write_bytes(encode_png(game.screen()))
    return file


def number(tab: Tab, selector: str) -> float:
    return float(tab.text(selector).replace(",", "").replace("−", "-").replace("–", "nan"))


def ink(tab: Tab, canvas: str) -> str:
    found: str = tab.evaluate(f"document.querySelector('{canvas}').toDataURL()")
    return found


def test_a_game_is_played_before_ones_eyes(tab: Tab) -> None:
    before = {canvas: ink(tab, canvas) for canvas in ("#screen", "#latency", "#batches")}
    tab.click("#start")
    tab.wait("Number(document.querySelector('#step').innerText) > 3")
    assert not tab.evaluate("document.querySelector('#veil').checkVisibility()")
    seen = ink(tab, "#screen")
    tab.evaluate("document.querySelector('#speed').value = '0'")
    tab.evaluate("document.querySelector('#speed').dispatchEvent(new Event('change'))")
    tab.wait("Number(document.querySelector('#score').innerText) >= 1")
    tab.wait("Number(document.querySelector('#rate').innerText) > 20")
    assert ink(tab, "#screen") != seen
    until(lambda: all(ink(tab, canvas) != then for canvas, then in before.items()))
    assert number(tab, "#p99") >= number(tab, "#p50") > 0
    assert number(tab, "#batch") >= 1
    assert "pong@1 · onnx · seed" in tab.text("#served")
    assert tab.evaluate("document.querySelectorAll('#actions .chosen').length") == 1
    assert len(tab.evaluate("[...document.querySelectorAll('#actions .value')].map(v => v.innerText)")) == 6


def test_a_game_is_played_to_its_end_and_again(tab: Tab, service: Service) -> None:
    tab.evaluate("document.querySelector('#speed').value = '0'")
    tab.click("#start")
    tab.wait("document.querySelector('#verdict').innerText.startsWith('Game over')", 60)
    assert number(tab, "#score") > 0
    until(lambda: service.seats.taken == 0)
    assert tab.text("#start") == "Play again"
    tab.evaluate("document.querySelector('#speed').value = '1'")
    tab.click("#start")
    tab.wait("document.querySelector('#score').innerText == '0' && document.querySelector('#step').innerText == '5'")


def test_the_keyboard_takes_over_while_a_key_is_held(tab: Tab) -> None:
    tab.click("#start")
    tab.wait("document.querySelector('#veil').hidden")
    tab.key("ArrowDown", True)
    tab.wait("!document.querySelector('#yours').hidden")
    tab.wait("[...document.querySelectorAll('#actions .name')].some(n => n.textContent == 'LEFTyou')")  # Pong's down
    tab.key("ArrowDown", False)
    tab.wait("document.querySelector('#yours').hidden")
    tab.click("#manual")
    tab.wait("[...document.querySelectorAll('#actions .name')].some(n => n.textContent == 'NOOPyou')")


def test_another_policy_is_chosen_and_plays_with_its_state(tab: Tab) -> None:
    tab.click("#start")
    tab.wait("document.querySelector('#veil').hidden")
    tab.evaluate("document.querySelector('#policy').value = 'pong-lstm'")
    tab.evaluate("document.querySelector('#policy').dispatchEvent(new Event('change', {bubbles: true}))")
    tab.wait("document.querySelector('#served').innerText.includes('pong-lstm@1 · onnx · seed')")
    tab.wait("Number(document.querySelector('#step').innerText) > 10")


def test_a_pause_and_a_stop(tab: Tab, service: Service) -> None:
    tab.click("#start")
    tab.wait("Number(document.querySelector('#step').innerText) > 3")
    tab.click("#pause")
    assert tab.text("#pause") == "Go on"
    tab.click("#stop")
    assert tab.text("#start") == "Play"
    until(lambda: service.seats.taken == 0)


def test_a_png_is_dropped_and_another_chosen(tab: Tab, screen: Path) -> None:
    tab.drop_file(screen, 300, 300)
    tab.wait("document.querySelector('#answer').innerText.startsWith('The policy would take ')")
    chosen = tab.text("#opinion .chosen .name")
    assert tab.text("#answer") == f"The policy would take {chosen}"
    assert tab.evaluate("document.querySelectorAll('#opinion li').length") == 6
    tab.click("#use")
    tab.wait("performance.getEntriesByType('resource').some(entry => entry.name.endsWith('/page/sample.png'))")
    tab.choose_file("#file", screen)
    tab.wait(f"document.querySelector('#answer').innerText == 'The policy would take {chosen}'")


def test_what_is_no_screen_is_said_to_be_none(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("not a picture")
    tab.choose_file("#file", tmp_path / "note.png")
    tab.wait("document.querySelector('#answer').innerText.startsWith('expected a PNG')")
    # Of this the browser itself says that a request was refused.
    assert len(tab.complaints) == 1
    assert "400" in tab.complaints.pop()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_it_fits_a_phone(tab: Tab, service: Service, width: int) -> None:
    tab.open(f"{service.url}/", width, 844, "light", phone=True)
    tab.wait("!document.querySelector('#start').disabled")
    tab.click("#start")
    tab.wait("document.querySelector('#veil').hidden")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate("document.querySelector('#pad').checkVisibility()")


def test_without_ale_it_says_so_and_still_answers_about_a_screen(
    one_tab: Tab, service: Service, screen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actserve.server.arcade.game.find_spec", lambda _name: None)
    one_tab.open(f"{service.url}/")
    one_tab.wait("document.querySelector('#note').innerText.startsWith('Games need ale-py on the service')")
    assert one_tab.evaluate("document.querySelector('#start').disabled")
    one_tab.wait("document.querySelector('#runtime').value !== ''")
    one_tab.choose_file("#file", screen)
    one_tab.wait("document.querySelector('#answer').innerText.startsWith('The policy would take ')")
    assert one_tab.complaints == []


def test_a_service_that_wants_a_token_is_given_one(one_tab: Tab, tmp_path: Path) -> None:
    token = add(tmp_path / "tokens", "visitor")
    with running(tokens=tmp_path / "tokens") as guarded:
        one_tab.open(f"{guarded.url}/")
        one_tab.wait("document.querySelector('#token').checkVisibility()")
        assert "asks for a token" in one_tab.text("#note")
        one_tab.evaluate(f"document.querySelector('#secret').value = '{token}'")
        one_tab.click("#token button")
        one_tab.wait("!document.querySelector('#start').disabled")
        assert not one_tab.evaluate("document.querySelector('#token').checkVisibility()")
        one_tab.click("#start")
        one_tab.wait("Number(document.querySelector('#step').innerText) > 3")
        one_tab.click("#use")
        one_tab.wait("document.querySelector('#answer').innerText.startsWith('The policy would take')")
        one_tab.open("about:blank")
        until(lambda: guarded.seats.taken == 0)
