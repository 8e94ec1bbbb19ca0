from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from actserve.atari.video import GIF_PALETTE_FRAMES, VideoWriter
from actserve.core.errors import UsageError
from actserve.core.signature import Array

SUFFIXES = pytest.mark.parametrize("suffix", [".mp4", ".gif"])


def screens(count: int, height: int = 34, width: int = 20) -> list[Array]:
    """A square that moves over a ground, in Atari colours; a new colour every ten screens."""
    made = []
    for number in range(count):
        screen = np.full((height, width, 3), (144, 72, 17), np.uint8)
        screen[number % 20 : number % 20 + 6, 5:11] = (92, 186, 92 + number // 10)
        made.append(screen)
    return made


def write(path: Path, given: list[Array], then: Callable[[], object] = lambda: None) -> None:
    with VideoWriter(path, fps=15, scale=2) as video:
        for screen in given:
            video.add(screen)
        then()


def decoded(path: Path) -> tuple[list[Array], float]:
    """(frames, seconds)"""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return frames, float(container.duration or 0) / 1e6


@SUFFIXES
@pytest.mark.parametrize("count", [1, 5, GIF_PALETTE_FRAMES, 90])
def test_a_video_has_every_screen(tmp_path: Path, suffix: str, count: int) -> None:
    given = screens(count)
    write(tmp_path / f"game{suffix}", given)
    frames, seconds = decoded(tmp_path / f"game{suffix}")
    assert len(frames) == count
    assert seconds == pytest.approx(count / 15, abs=0.1)
    for screen, frame in zip(given, frames, strict=True):
        assert frame.shape == (68, 40, 3)
        difference = np.abs(frame[::2, ::2].astype(int) - screen)
        assert difference.max() == 0 if suffix == ".gif" else difference.mean() < 12
    assert [path.name for path in tmp_path.iterdir()] == [f"game{suffix}"]


@SUFFIXES
def test_odd_sizes_become_even(tmp_path: Path, suffix: str) -> None:
    with VideoWriter(tmp_path / f"v{suffix}", fps=30, scale=1) as video:
        video.add(screens(1, 33, 19)[0])
    (frame,), _ = decoded(tmp_path / f"v{suffix}")
    assert frame.shape == (34, 20, 3)


@SUFFIXES
def test_the_buffer_may_be_reused(tmp_path: Path, suffix: str) -> None:
    buffer = np.zeros((20, 20, 3), np.uint8)
    with VideoWriter(tmp_path / f"v{suffix}", fps=10) as video:
        for value in (0, 200):
            buffer[:] = value
            video.add(buffer)
    (first, second), _ = decoded(tmp_path / f"v{suffix}")
    assert (first.mean() < 10, second.mean() > 190) == (True, True)


def test_a_gif_of_many_colours_has_the_nearest_ones(tmp_path: Path) -> None:
    red, green = np.meshgrid(np.arange(40, dtype=np.uint8), np.arange(40, dtype=np.uint8))
    screen = np.stack([red, green, np.zeros_like(red)], 2)  # 1,600 colours
    with VideoWriter(tmp_path / "v.gif", fps=10, scale=1) as video:
        video.add(screen)
    (frame,), _ = decoded(tmp_path / "v.gif")
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) == 255
    known = (screen == frame).all(2)
    assert known.sum() == 255


def test_a_gif_faster_than_browsers_show_drops_screens(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.gif", fps=60) as video:
        for screen in screens(60):
            video.add(screen)
    frames, seconds = decoded(tmp_path / "v.gif")
    assert len(frames) == 30
    assert seconds == pytest.approx(1.0, abs=0.1)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    for name in ("game.avi", "game", "mp4"):
        with pytest.raises(UsageError, match=r"\.mp4 or \.gif; got"):
            VideoWriter(tmp_path / name, fps=15).__enter__()
    with pytest.raises(UsageError, match="there is no folder"):
        VideoWriter(tmp_path / "nowhere" / "game.gif", fps=15).__enter__()
    assert list(tmp_path.iterdir()) == []


@SUFFIXES
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"game{suffix}"
    path.write_bytes(b"an older video")
    with pytest.raises(ZeroDivisionError):
        write(path, screens(GIF_PALETTE_FRAMES + 5), then=lambda: 1 / 0)
    assert path.read_bytes() == b"an older video"
    assert list(tmp_path.iterdir()) == [path]


@SUFFIXES
def test_no_screens_no_file(tmp_path: Path, suffix: str) -> None:
    with VideoWriter(tmp_path / f"v{suffix}", fps=15):
        pass
    assert list(tmp_path.iterdir()) == []


@SUFFIXES
def test_what_is_no_screen_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    wrong: list[Array] = [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
    for screen in wrong:
        with pytest.raises(UsageError, match=r"expected a screen uint8\[H, W, 3\]; got"):
            write(path, [screen])
    with pytest.raises(UsageError, match="the first one's shape"):
        write(path, [np.zeros((4, 4, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)])
    assert list(tmp_path.iterdir()) == []


def test_without_pyav_the_command_that_installs_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r'pip install "actserve\[play\]"'):
        VideoWriter(tmp_path / "v.gif", fps=15).__enter__()
