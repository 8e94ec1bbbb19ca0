"""Draws one picture per step: the game's screen, and beside it the score and the policy's actions.

The static parts are drawn once. Each picture is a copy of them with the changing parts added. Text and bars use few
colours, because a GIF has 255 and the game needs half of them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actserve.core.environment import Environment
from actserve.core.errors import UsageError
from actserve.core.imports import import_extra

PANEL = 360  # pixels wide; with an Atari screen at scale 3 the picture is 840 × 630, that is 4:3
MARGIN = 24
TITLE, NOTE, CAPTION, FIGURES, HEADING = 40, 63, 104, 158, 202  # y of the text baselines above the actions
ROWS = 216  # y of the first action
ROW_MIN, ROW_MAX = 21, 60  # height of an action in pixels; 18 rows of 21 fit beside a screen at scale 3
GAP = 12  # between an action's name, its bar and its value
GREYS = 4  # shades between background and text colour: smooth letters with few colours

Colour = tuple[int, int, int]
Picture = NDArray[np.uint8]
GROUND, CHOSEN_GROUND = (16, 18, 24), (44, 50, 66)
BRIGHT, PLAIN, DIM = (242, 244, 248), (178, 186, 202), (122, 132, 152)
ACCENT, BAR, TRACK = (255, 190, 60), (92, 106, 138), (30, 34, 44)


class Overlay:
    """Composes pictures of a game and its policy, for `VideoWriter(..., scale=1)`.

    `label` names the values ("action_value", "logits"). The screen is enlarged `scale` times. Raises `UsageError` if
    Pillow is not installed.
    """

    def __init__(self, environment: Environment, label: str = "action_value", scale: int = 3) -> None:
        self.environment = environment
        self.label = label
        self.scale = scale
        self._title, self._small, self._large = _Font(22), _Font(15), _Font(50)
        self._layout: _Layout | None = None

    def compose(
        self,
        screen: Picture,
        *,
        score: float | None,
        step: int,
        action: int,
        values: NDArray[Any] | None,
        note: str = "",
    ) -> Picture:
        """The picture of one step, (height, width, 3) uint8 RGB, both even. The next call overwrites the array.

        `screen` is uint8[H, W, 3], of the same shape in every call. `action` is the index of the chosen action.
        `values` has one number per action of the environment; the bars scale from the least finite value of the step
        to the greatest. Without values only the chosen action is marked. `note` is a line below the environment's name.
        A `score` of None is not known.
        Raises `UsageError` for a screen, an action or values of another shape or range.
        """
        self._check(screen, action, values)
        if self._layout is None:
            self._layout = _Layout(self.environment, screen.shape, self.scale)
            self._draw_captions(self._layout)
        layout = self._layout
        frame, left, right = layout.begin(screen), layout.left, layout.right
        self._small.write(frame, " ".join(note.split()), left, NOTE, PLAIN)
        shown = "?" if score is None else f"{score + 0.0:,.0f}"  # + 0.0 turns -0.0 into 0.0
        self._large.write(frame, shown, left, FIGURES, BRIGHT)
        self._title.write_number(frame, f"{step:,}", right, FIGURES, BRIGHT)
        layout.mark_chosen(action)
        if values is not None:
            self._small.write(frame, self.label.replace("_", " ").upper(), right, HEADING, DIM, from_right=True)
            for row, (value, share) in enumerate(zip(values.tolist(), shares(values), strict=True)):
                layout.draw_bar(row, value, share, chosen=row == action)
        return frame

    def _draw_captions(self, layout: _Layout) -> None:
        """Draw the static texts above the actions."""
        self._title.write(layout.still, self.environment.id, layout.left, TITLE, BRIGHT)
        self._small.write(layout.still, "SCORE", layout.left, CAPTION, DIM)
        self._small.write(layout.still, "STEP", layout.right, CAPTION, DIM, from_right=True)
        self._small.write(layout.still, "ACTION", layout.left, HEADING, DIM)

    def _check(self, screen: Picture, action: int, values: NDArray[Any] | None) -> None:
        if screen.ndim != 3 or screen.shape[2] != 3 or screen.dtype != np.uint8:
            raise UsageError(f"expected a screen uint8[H, W, 3]; got {screen.dtype}{list(screen.shape)}")
        if self._layout is not None and screen.shape != self._layout.screen_shape:
            raise UsageError(
                f"expected every screen to have the first one's shape {self._layout.screen_shape}; got {screen.shape}"
            )
        count = len(self.environment.actions)
        if not 0 <= action < count:
            raise UsageError(f"expected an action from 0 to {count - 1}; got {action}")
        if values is not None and values.shape != (count,):
            raise UsageError(f"expected values of the shape ({count},), one per action; got {values.shape}")


def shares(values: NDArray[Any]) -> list[float]:
    """The length of each bar: 0 for the least finite value, 1 for the greatest, 1 for all if they are equal.

    Infinity counts as the greatest value, minus infinity and NaN as the least.
    """
    exact = values.astype(np.float64)
    finite = exact[np.isfinite(exact)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    scaled = np.interp(exact, (low, high), (0.0, 1.0)) if low < high else np.where(exact >= low, 1.0, 0.0)
    return [float(share) for share in np.nan_to_num(scaled)]


class _Layout:
    """The positions, the picture of the static parts (`still`), and the current picture."""

    def __init__(self, environment: Environment, screen_shape: tuple[int, ...], scale: int) -> None:
        self.screen_shape = screen_shape
        names = [action.meaning for action in environment.actions]
        height, width = screen_shape[0] * scale, screen_shape[1] * scale
        full = max(height, ROWS + ROW_MIN * len(names) + MARGIN // 2)
        self.still = np.full((full + full % 2, width + width % 2 + PANEL, 3), GROUND, np.uint8)
        self.left, self.right = width + MARGIN, self.still.shape[1] - MARGIN
        self._frame = self.still.copy()
        top = (len(self.still) - height) // 2
        self._screen = self._frame[top : top + height, :width]
        self._panel = np.s_[:, width:]
        self._scale = scale
        self._names = names
        self._row = min(ROW_MAX, (len(self.still) - ROWS - MARGIN // 2) // len(names))
        self._font = _Font(min(18, 8 + round(self._row * 0.3)))
        for row, name in enumerate(names):
            self._font.write(self.still, name, self.left, self._baseline(row), PLAIN)
        self._bar = self.left + max(map(self._font.width, names)) + GAP
        self._bar_end = self.right - self._font.width("-000.00") - GAP

    def begin(self, screen: Picture) -> Picture:
        """Start a picture: the static parts and this screen. uint8[H, W, 3]"""
        self._frame[self._panel] = self.still[self._panel]
        wide = screen.repeat(self._scale, axis=1)
        for line in range(self._scale):
            self._screen[line :: self._scale] = wide
        return self._frame

    def mark_chosen(self, row: int) -> None:
        top, bottom = ROWS + row * self._row, ROWS + (row + 1) * self._row
        edge = self.left - MARGIN // 2
        self._frame[top:bottom, edge : self.right + MARGIN // 2] = CHOSEN_GROUND
        self._frame[top:bottom, edge : edge + 4] = ACCENT
        self._font.write(self._frame, self._names[row], self.left, self._baseline(row), BRIGHT, CHOSEN_GROUND)

    def draw_bar(self, row: int, value: float, share: float, *, chosen: bool) -> None:
        """Draw the row's value and its bar, `share` of the full length but at least visible."""
        middle, half = ROWS + row * self._row + self._row // 2, self._row // 5
        bar = self._frame[middle - half : middle + half, self._bar : self._bar_end]
        bar[:] = GROUND if chosen else TRACK
        bar[:, : max(2, round(share * bar.shape[1]))] = ACCENT if chosen else BAR
        ink, ground = (BRIGHT, CHOSEN_GROUND) if chosen else (PLAIN, GROUND)
        text = f"{value:.2f}" if abs(value) < 1000 else f"{value:.1e}"
        self._font.write_number(self._frame, text, self.right, self._baseline(row), ink, ground)

    def _baseline(self, row: int) -> int:
        return ROWS + row * self._row + (self._row + self._font.capital) // 2


class _Font:
    """Pillow's default font in one size, with a cache of drawn texts."""

    def __init__(self, size: int) -> None:
        self._image, self._draw = import_extra("play", "PIL.Image"), import_extra("play", "PIL.ImageDraw")
        self._font = import_extra("play", "PIL.ImageFont").load_default(size)
        self._ascent, self._descent = self._font.getmetrics()
        self.capital = -int(self._font.getbbox("H", anchor="ls")[1])  # pixels from the baseline to the top of a capital
        self._letters = lru_cache(512)(self._drawn)

    def width(self, text: str) -> int:
        return math.ceil(float(self._font.getlength(text)))

    def write(
        self,
        picture: Picture,
        text: str,
        x: int,
        baseline: int,
        ink: Colour,
        ground: Colour = GROUND,
        *,
        from_right: bool = False,
    ) -> None:
        """Write to the right of x, or to its left if `from_right`. Clips at the edge of the picture."""
        letters = self._letters(text, ink, ground)
        x = max(0, x - letters.shape[1]) if from_right else x
        place = picture[baseline - self._ascent : baseline + self._descent, x : x + letters.shape[1]]
        place[:] = letters[:, : place.shape[1]]

    def write_number(
        self, picture: Picture, text: str, right: int, baseline: int, ink: Colour, ground: Colour = GROUND
    ) -> None:
        """Write a number that ends at `right`, digit by digit from the cache. Digits do not move sideways."""
        for digit in reversed(text):
            self.write(picture, digit, right, baseline, ink, ground, from_right=True)
            right -= self._letters(digit, ink, ground).shape[1]

    def _drawn(self, text: str, ink: Colour, ground: Colour) -> Picture:
        image = self._image.new("L", (self.width(text), self._ascent + self._descent))
        self._draw.Draw(image).text((0, self._ascent), text, fill=255, font=self._font, anchor="ls")
        strength: NDArray[np.uint8] = np.asarray(image)  # (height, width)
        return _shades(ink, ground)[strength]


@lru_cache
def _shades(ink: Colour, ground: Colour) -> Picture:
    """(256, 3): the colour for each opacity of the text, in `GREYS` steps."""
    strength = np.round(np.linspace(0, GREYS, 256)) / GREYS
    return np.round(np.outer(1 - strength, ground) + np.outer(strength, ink)).astype(np.uint8)
