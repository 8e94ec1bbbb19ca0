"""The page in a real browser: every test of one visit ends without a complaint of the browser's."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
from playwright.sync_api import Browser, Page, expect

from actserve.atari.emulator import AtariGame
from actserve.bundles import bundle as bundles
from actserve.server.access.tokens import add_token
from actserve.server.arcade.game import encode_png
from actserve.store.local import ModelStore
from tests.browser import WITHIN_MS, Visit, chromium, needs_chromium, visit
from tests.page_service import Service, running
from tests.shipped import SHIPPED
from tests.test_atari import PONG
from tests.waiting import until

pytestmark = needs_chromium
expect.set_options(timeout=WITHIN_MS)
DROP = """([base64, name]) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name));
    for (const type of ["dragenter", "dragover", "drop"])
        document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as up:
        yield up


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def visitor(browser: Browser) -> Iterator[Visit]:
    with visit(browser, color_scheme="dark", viewport={"width": 1280, "height": 800}) as one:
        yield one


@pytest.fixture
def page(visitor: Visit, service: Service) -> Iterator[Page]:
    """A fresh visit to the page, which makes no request to another server and never complains."""
    yield from visited(visitor, service)


def visited(visitor: Visit, service: Service) -> Iterator[Page]:
    visitor.page.goto(f"{service.url}/")
    expect(visitor.page.locator("#start")).to_be_enabled()
    yield visitor.page
    visitor.page.goto("about:blank")
    until(lambda: service.game_slots.taken == 0)
    assert visitor.complaints == []
    own = (f"http://{service.address}/", f"ws://{service.address}/", "about:", "blob:")
    assert [url for url in visitor.requested if not url.startswith(own)] == []


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    game = AtariGame(PONG, 3)
    for _ in range(70):
        game.act(0)
    file = tmp_path / "screen.png"
    file.write_bytes(encode_png(game.screen()))
    return file


def number(page: Page, selector: str) -> float:
    """NaN while there is none."""
    text = page.inner_text(selector).replace(",", "").replace("−", "-")
    return float(text) if re.fullmatch(r"-?[\d.]+", text) else float("nan")


def ink(page: Page, canvas: str) -> str:
    found: str = page.locator(canvas).evaluate("canvas => canvas.toDataURL()")
    return found


def test_a_game_is_played_before_ones_eyes(page: Page) -> None:
    before = {canvas: ink(page, canvas) for canvas in ("#screen", "#latency", "#batches")}
    page.click("#start")
    until(lambda: number(page, "#step") > 3)
    expect(page.locator("#veil")).to_be_hidden()
    seen = ink(page, "#screen")
    page.select_option("#speed", "0")
    until(lambda: number(page, "#score") >= 1)
    until(lambda: number(page, "#rate") > 0)
    assert ink(page, "#screen") != seen
    until(lambda: all(ink(page, canvas) != then for canvas, then in before.items()))
    assert number(page, "#p99") >= number(page, "#p50") > 0
    assert number(page, "#batch") >= 1
    expect(page.locator("#served")).to_contain_text("pong@1 · onnx · seed")
    expect(page.locator("#actions .chosen")).to_have_count(1)
    expect(page.locator("#actions .value")).to_have_count(6)


def test_a_game_is_played_to_its_end_and_again(page: Page, service: Service) -> None:
    page.select_option("#speed", "0")
    page.click("#start")
    expect(page.locator("#verdict")).to_have_text(re.compile("^Game over"))
    assert number(page, "#score") > 0
    until(lambda: service.game_slots.taken == 0)
    expect(page.locator("#start")).to_have_text("Play again")
    page.select_option("#speed", "1")
    page.click("#start")
    expect(page.locator("#score")).to_have_text("0")
    until(lambda: 0 < number(page, "#step") < 100)


def test_the_keyboard_takes_over_while_a_key_is_held(page: Page) -> None:
    page.click("#start")
    expect(page.locator("#veil")).to_be_hidden()
    page.keyboard.down("ArrowDown")
    expect(page.locator("#yours")).to_be_visible()
    expect(page.locator("#actions .name", has_text="LEFTyou")).to_be_visible()  # Pong's down
    page.keyboard.up("ArrowDown")
    expect(page.locator("#yours")).to_be_hidden()
    page.click("#manual")
    expect(page.locator("#actions .name", has_text="NOOPyou")).to_be_visible()


def test_another_policy_is_chosen_and_plays_with_its_state(page: Page) -> None:
    page.click("#start")
    expect(page.locator("#veil")).to_be_hidden()
    page.select_option("#policy", "pong-lstm")
    expect(page.locator("#served")).to_contain_text("pong-lstm@1 · onnx · seed")
    until(lambda: number(page, "#step") > 10)


def test_a_pause_and_a_stop(page: Page, service: Service) -> None:
    page.click("#start")
    until(lambda: number(page, "#step") > 3)
    page.click("#pause")
    expect(page.locator("#pause")).to_have_text("Resume")
    page.click("#stop")
    expect(page.locator("#start")).to_have_text("Play")
    until(lambda: service.game_slots.taken == 0)


def test_a_png_is_dropped_and_another_chosen(page: Page, screen: Path) -> None:
    answer = page.locator("#answer")
    page.evaluate(DROP, [base64.b64encode(screen.read_bytes()).decode(), screen.name])
    expect(answer).to_have_text(re.compile("^The policy would take "))
    chosen = page.inner_text("#opinion .chosen .name")
    expect(answer).to_have_text(f"The policy would take {chosen}")
    expect(page.locator("#opinion li")).to_have_count(6)
    with page.expect_response(re.compile(r"/page/sample\.png$")):
        page.click("#use")
    page.set_input_files("#file", screen)
    expect(answer).to_have_text(f"The policy would take {chosen}")


def test_what_is_no_screen_is_said_to_be_none(page: Page, visitor: Visit, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("not a picture")
    page.set_input_files("#file", tmp_path / "note.png")
    expect(page.locator("#answer")).to_have_text(re.compile("^expected a PNG"))
    # The browser itself complains that a request was refused.
    page.title()  # Playwright reports what happened meanwhile
    assert len(visitor.complaints) == 1
    assert "400" in visitor.complaints.pop()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_it_fits_a_phone(browser: Browser, service: Service, width: int) -> None:
    phone = {"viewport": {"width": width, "height": 844}, "color_scheme": "light", "has_touch": True, "is_mobile": True}
    with visit(browser, **phone) as visitor:
        for page in visited(visitor, service):
            page.click("#start")
            expect(page.locator("#veil")).to_be_hidden()
            assert page.evaluate("document.documentElement.scrollWidth") == width
            expect(page.locator("#pad")).to_be_visible()


def test_without_ale_it_says_so_and_still_answers_about_a_screen(
    visitor: Visit, service: Service, screen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actserve.server.arcade.game.find_spec", lambda _name: None)
    page = visitor.page
    page.goto(f"{service.url}/")
    expect(page.locator("#note")).to_have_text(re.compile("^Games need ale-py on the service"))
    expect(page.locator("#start")).to_be_disabled()
    expect(page.locator("#runtime")).not_to_have_value("")
    page.set_input_files("#file", screen)
    expect(page.locator("#answer")).to_have_text(re.compile("^The policy would take "))
    assert visitor.complaints == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a bundle of each policy."""
    made = tmp_path_factory.mktemp("bundles")
    for name in ("pong", "pong-lstm"):
        bundles.write(ModelStore(SHIPPED).resolve(name), "browser", "onnx", made / name)
    return made


@pytest.fixture(scope="module")
def bundled(folder: Path) -> Iterator[Service]:
    with running(bundles=folder) as up:
        yield up


@pytest.mark.parametrize("name", ["pong", "pong-lstm"])
def test_the_policy_acts_in_this_browser_and_takes_the_services_actions(
    name: str, visitor: Visit, bundled: Service
) -> None:
    for page in visited(visitor, bundled):
        page.select_option("#policy", name)
        page.select_option("#speed", "0")
        expect(page.locator("#place")).to_be_visible()
        page.select_option("#acts", "browser")
        page.click("#start")
        expect(page.locator("#local")).to_be_visible()
        until(lambda: number(visitor.page, "#step") > 150)
        same, _, steps = page.locator("#same").inner_text().partition(" of ")
        assert same == steps
        assert int(steps) > 100
        for place in ("#here", "#there"):
            assert number(page, place) > 0
        page.keyboard.down("ArrowLeft")
        expect(page.locator("#yours")).to_be_visible()
        page.keyboard.up("ArrowLeft")
        page.click("#stop")


def test_without_a_bundle_nothing_is_offered(page: Page, service: Service) -> None:
    expect(page.locator("#place")).to_be_hidden()
    assert urllib3.request("GET", f"{service.url}/bundles").json() == {"bundles": []}
    policy = urllib3.request("GET", f"{service.url}/").headers["Content-Security-Policy"]
    assert "wasm" not in policy


def test_bundles_are_served_and_nothing_beside_them(bundled: Service) -> None:
    listed = urllib3.request("GET", f"{bundled.url}/bundles").json()["bundles"]
    assert [(bundle["name"], bundle["version"]) for bundle in listed] == [("pong", 1), ("pong-lstm", 1)]
    assert urllib3.request("GET", f"{bundled.url}/{listed[0]['module']}").status == 200
    for path in ("../manifest.json", "%2e%2e/pong/1/manifest.json", "pong/..%2f..%2fother"):
        with urllib3.HTTPConnectionPool(bundled.address) as pool:
            assert pool.urlopen("GET", f"/bundles/{path}", assert_same_host=False).status == 404


def test_a_service_that_wants_a_token_is_given_one(visitor: Visit, tmp_path: Path, folder: Path) -> None:
    token = add_token(tmp_path / "tokens", "visitor")
    page = visitor.page
    with running(tokens=tmp_path / "tokens", bundles=folder) as guarded:
        page.goto(f"{guarded.url}/")
        expect(page.locator("#token")).to_be_visible()
        expect(page.locator("#note")).to_contain_text("requires a token")
        page.fill("#secret", token)
        page.click("#token button")
        expect(page.locator("#start")).to_be_enabled()
        expect(page.locator("#token")).to_be_hidden()
        page.click("#start")
        until(lambda: number(page, "#step") > 3)
        page.click("#use")
        expect(page.locator("#answer")).to_have_text(re.compile("^The policy would take"))
        page.select_option("#acts", "browser")
        until(lambda: page.locator("#same").inner_text().startswith("9 of 9"))
        page.goto("about:blank")
        until(lambda: guarded.game_slots.taken == 0)
