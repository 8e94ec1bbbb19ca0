from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from actserve.atari.emulator import AtariGame
from actserve.atari.overlay import ACCENT, BAR, CHOSEN_GROUND, Overlay, shares
from actserve.core.environment import Environment, GameAction
from actserve.core.errors import UsageError
from actserve.core.signature import Array
from tests.test_atari import PONG

NAMES = [
    "NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT", "UPFIRE", "RIGHTFIRE",
    "LEFTFIRE", "DOWNFIRE", "UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE", "DOWNLEFTFIRE",
]  # fmt: skip
FULL = replace(PONG, actions=tuple(GameAction(name, code) for code, name in enumerate(NAMES)))
SCREEN = np.arange(210 * 160 * 3).reshape(210, 160, 3).astype(np.uint8)
RISING = np.arange(6, dtype=np.float32)


def picture(
    values: Array | None = RISING,
    *,
    environment: Environment = PONG,
    screen: Array = SCREEN,
    score: float = 0.0,
    step: int = 0,
    action: int = 2,
    note: str = "",
) -> Array:
    """One picture from an overlay of its own."""
    return Overlay(environment).compose(screen, score=score, step=step, action=action, values=values, note=note)


def rows_with(frame: Array, colour: tuple[int, int, int]) -> Array:
    """The rows that have the colour beside the screen, in order."""
    return np.flatnonzero((frame[:, 480:] == colour).all(2).any(1))


def bar_lengths(frame: Array) -> list[int]:
    """The length of each bar in pixels, from the top, for the actions that are not chosen."""
    lengths = (frame[:, 480:] == BAR).all(2).sum(1)
    starts = np.flatnonzero((lengths > 0) & (np.roll(lengths, 1) == 0))
    return [int(lengths[start]) for start in starts]


def test_the_screen_stands_beside_the_panel_three_times_as_large() -> None:
    frame = picture()
    assert frame.shape == (630, 840, 3)
    assert frame.dtype == np.uint8
    np.testing.assert_array_equal(frame[:, :480], SCREEN.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("environment", [PONG, FULL])
@pytest.mark.parametrize("height", [1, 105, 210, 214, 250])
@pytest.mark.parametrize("width", [160, 161])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_every_size_is_even_and_has_room_for_the_screen_and_all_actions(
    environment: Environment, height: int, width: int, scale: int
) -> None:
    screen = np.full((height, width, 3), 201, np.uint8)
    last = len(environment.actions) - 1
    overlay = Overlay(environment, scale=scale)
    frame = overlay.compose(screen, score=1, step=1, action=last, values=np.zeros(last + 1))
    assert (frame.shape[0] % 2, frame.shape[1] % 2) == (0, 0)
    assert (frame == 201).all(2).sum() == height * width * scale**2
    chosen = np.flatnonzero((frame == CHOSEN_GROUND).all(2).any(1))
    assert len(chosen) > 18
    assert chosen[-1] < len(frame) - 6


def test_the_chosen_action_is_highlighted() -> None:
    for environment in (PONG, FULL):
        count = len(environment.actions)
        found = [rows_with(picture(None, environment=environment, action=i), CHOSEN_GROUND) for i in range(count)]
        assert len(np.unique(np.concatenate(found))) == sum(map(len, found))  # no two share a row
        assert [rows[0] for rows in found] == sorted(rows[0] for rows in found)
        for rows in found:
            np.testing.assert_array_equal(rows, np.arange(rows[0], rows[0] + len(found[0])))


def test_a_higher_value_has_a_longer_bar() -> None:
    frame = picture(np.array([-1.0, 0.5, 2.0, 0.0, 1.5, 1.75]), action=2)
    least, *others = bar_lengths(frame)
    assert least == 2
    assert np.argsort(others).tolist() == [1, 0, 2, 3]  # 0.5, 0.0, 1.5, 1.75
    accent = (frame[:, 480:] == ACCENT).all(2).sum(1).max()
    assert accent > max(others)


def test_without_values_there_are_no_bars() -> None:
    frame = picture(None)
    assert bar_lengths(frame) == []
    assert len(rows_with(frame, CHOSEN_GROUND)) > 0


def test_shares_go_from_the_least_to_the_greatest() -> None:
    assert shares(np.array([-2.0, 0.0, 2.0])) == [0.0, 0.5, 1.0]
    assert shares(np.array([3, 3])) == [1.0, 1.0]
    assert shares(np.array([np.nan, 1.0, 2.0, np.inf, -np.inf])) == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert shares(np.array([np.nan, 1.0, -np.inf])) == [0.0, 1.0, 0.0]
    assert shares(np.array([np.nan, np.nan])) == [0.0, 0.0]
    assert shares(np.array([np.inf, -np.inf])) == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_or_very_large_are_shown(dtype: type) -> None:
    greatest = np.finfo(dtype).max
    odd: Array = np.array([np.nan, np.inf, -np.inf, greatest, -greatest, 0], dtype)
    for action in range(6):
        frame = picture(odd, action=action, score=np.nan)
        assert len(bar_lengths(frame)) == 5


@pytest.mark.parametrize("change", [{"score": 21.0}, {"step": 7}, {"note": "0.8 ms"}, {"action": 3}])
def test_what_is_told_can_be_seen(change: dict[str, float]) -> None:
    before, after = picture(), picture(**change)  # type: ignore[arg-type]
    assert (before[:, 480:] != after[:, 480:]).any()
    np.testing.assert_array_equal(before[:, :480], after[:, :480])


def test_the_values_are_named() -> None:
    named = [
        Overlay(PONG, label).compose(SCREEN, score=0, step=0, action=0, values=RISING)
        for label in ("action_value", "logits")
    ]
    assert (named[0] != named[1]).any()


def test_a_score_of_minus_zero_is_zero() -> None:
    np.testing.assert_array_equal(picture(score=-0.0), picture(score=0.0))


@pytest.mark.parametrize("note", ["", "two\nlines", "much too long " * 50, "ünï → 速い"])
def test_any_note_will_do(note: str) -> None:
    frame = picture(note=note, score=-1e12, step=10**12)
    assert frame.shape == (630, 840, 3)


def test_pictures_do_not_depend_on_those_before() -> None:
    overlay = Overlay(PONG)
    overlay.compose(255 - SCREEN, score=88_888, step=88_888, action=5, values=-RISING, note="something long")
    again = overlay.compose(SCREEN, score=0.0, step=0, action=2, values=RISING)
    np.testing.assert_array_equal(again, picture())


def test_a_game_has_few_colours() -> None:
    game, overlay = AtariGame(PONG, 0), Overlay(PONG)
    rng, colours = np.random.default_rng(0), set[int]()
    for step in range(70):
        game.act(step % 6)
        values = rng.normal(size=6)
        frame = overlay.compose(
            game.screen(), score=game.score, step=game.steps, action=step % 6, values=values, note=f"{step / 10} ms"
        )
        colours |= set(np.unique(frame[:, 480:].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)).tolist())
    assert len(colours) < 40


def test_what_cannot_be_shown_is_refused() -> None:
    wrong: list[Array] = [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
    for screen in wrong:
        with pytest.raises(UsageError, match=r"expected a screen uint8\[H, W, 3\]; got"):
            picture(screen=screen)
    for action in (-1, 6):
        with pytest.raises(UsageError, match=f"expected an action from 0 to 5; got {action}"):
            picture(action=action)
    for values in (np.zeros(5), np.zeros((1, 6))):
        with pytest.raises(UsageError, match=r"expected values of the shape \(6,\), one per action; got"):
            picture(values)
    overlay = Overlay(PONG)
    overlay.compose(SCREEN, score=0, step=0, action=0, values=None)
    with pytest.raises(UsageError, match="the first one's shape"):
        overlay.compose(SCREEN[:100], score=0, step=0, action=0, values=None)


def test_without_pillow_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r'pip install "actserve\[play\]"'):
        Overlay(PONG)
