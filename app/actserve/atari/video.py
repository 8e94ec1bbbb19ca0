"""Writes screens to a video file one by one, so that long games need no more memory than short ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from actserve.core.errors import UsageError
from actserve.core.imports import import_extra

H264 = (("libx264", {"preset": "veryfast", "crf": "20"}), ("libopenh264", {"b": "2M"}), ("mpeg4", {"qscale": "3"}))
GIF_MAX_FPS = 50  # frame times are in 1/100 s, and browsers slow down GIFs with less than 2/100 s per frame
GIF_PALETTE_FRAMES = 64  # buffered to collect the palette; a colour that is found later costs 768 bytes a frame
GIF_COLOURS = 255  # the 256th entry means "unchanged"


class VideoWriter:
    """A video of uint8 RGB screens of one size, enlarged `scale` times: .mp4 (H.264) or .gif by the suffix of `path`.

    A context manager. The file appears when the block ends without an error; otherwise, or without frames, there is no
    file. Raises `UsageError` for another suffix, a missing folder or a missing library.
    """

    def __init__(self, path: Path | str, fps: float, scale: int = 3) -> None:
        self.path = Path(path)
        self.fps = fps
        self.scale = scale
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._shape: tuple[int, ...] | None = None
        self._encoder: _Encoder | None = None

    def __enter__(self) -> Self:
        kind = check_video_path(self.path)
        self._encoder = kind(import_extra("play", "av"), self._part, self.fps, self.scale)
        return self

    def add(self, screen: NDArray[np.uint8]) -> None:
        """Append a copy of one screen, (height, width, 3) uint8 RGB."""
        assert self._encoder is not None, "use VideoWriter in a with block"
        if screen.ndim != 3 or screen.shape[2] != 3 or screen.dtype != np.uint8:
            raise UsageError(f"expected a screen uint8[H, W, 3]; got {screen.dtype}{list(screen.shape)}")
        if self._shape not in (None, screen.shape):
            raise UsageError(f"expected every screen to have the first one's shape {self._shape}; got {screen.shape}")
        self._shape = screen.shape
        self._encoder.add(screen)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._encoder is not None
        try:
            written = self._encoder.close()
            if kind is None and written:
                os.replace(self._part, self.path)
        except Exception:
            if kind is None:  # otherwise let the error of the block through
                raise
        finally:
            self._part.unlink(missing_ok=True)


class _Encoder:
    """One PyAV stream into one file. The first frame opens it and sets the size."""

    def __init__(self, av: Any, path: Path, fps: float, scale: int) -> None:
        self._av = av
        self._path = path
        self._scale = scale
        self._time_base = 1 / Fraction(fps).limit_denominator(1000)
        self._container: Any = None
        self._stream: Any = None
        self._frames = 0

    def add(self, screen: NDArray[np.uint8]) -> None:
        """(height, width, 3) uint8 RGB."""
        self._write(self._av.VideoFrame.from_ndarray(_enlarged(screen, self._scale), format="rgb24"))

    def close(self) -> int:
        """Finish the file and return its number of frames. Without frames there is no file."""
        if self._container is None:
            return 0
        try:
            self._translated(lambda: self._container.mux(self._stream.encode(None)))
        finally:
            self._translated(self._container.close)
        return self._frames

    def _write(self, frame: Any) -> None:
        if self._container is None:
            self._translated(lambda: self._open(frame.width, frame.height))
        frame.pts, frame.time_base = self._frames, self._time_base
        self._frames += 1
        self._translated(lambda: self._container.mux(self._stream.encode(frame)))

    def _open(self, width: int, height: int) -> None:
        name, options = next(choice for choice in H264 if self._has(choice[0]))
        self._start("mp4", name, dict(options), "yuv420p", width, height)

    def _has(self, codec: str) -> bool:
        try:
            self._av.Codec(codec, "w")
        except ValueError:
            return False
        return True

    def _start(self, form: str, codec: str, options: dict[str, str], pixels: str, width: int, height: int) -> None:
        self._container = self._av.open(str(self._path), "w", format=form)
        self._stream = self._container.add_stream(codec, rate=1 / self._time_base, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, pixels
        self._stream.time_base = self._time_base

    def _translated(self, step: Callable[[], object]) -> None:
        try:
            step()
        except self._av.FFmpegError as error:
            raise UsageError(f"the video cannot be written: {error}") from error


class _GifEncoder(_Encoder):
    """A GIF with the exact colours of the screens: an Atari has only 128. Drops frames above `GIF_MAX_FPS`."""

    def __init__(self, av: Any, path: Path, fps: float, scale: int) -> None:
        self._every = max(1, math.ceil(fps / GIF_MAX_FPS))
        super().__init__(av, path, fps / self._every, scale)
        self._frames_given = 0
        self._buffered: list[NDArray[np.uint8]] = []  # each (height, width) of palette indices
        self._index: dict[int, int] = {}  # 0xRRGGBB -> its place in the palette

    def add(self, screen: NDArray[np.uint8]) -> None:
        self._frames_given += 1
        if (self._frames_given - 1) % self._every:
            return
        self._buffered.append(self._indexed(screen))
        if self._container is not None or len(self._buffered) == GIF_PALETTE_FRAMES:
            self._flush()

    def close(self) -> int:
        self._flush()
        return super().close()

    def _flush(self) -> None:
        palette = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
        palette[:GIF_COLOURS, 0] = 255  # FFmpeg uses the least opaque entry for "unchanged": the last one
        for colour, place in self._index.items():
            palette[place, 1:] = (colour >> 16, colour >> 8 & 255, colour & 255)
        for indices in self._buffered:
            self._write(self._av.VideoFrame.from_ndarray((_enlarged(indices, self._scale), palette), format="pal8"))
        self._buffered.clear()

    def _open(self, width: int, height: int) -> None:
        self._start("gif", "gif", {}, "pal8", width, height)

    def _indexed(self, screen: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(height, width, 3) RGB -> (height, width) of palette indices. Adds new colours to the palette."""
        red, green, blue = (screen[..., channel].astype(np.uint32) for channel in range(3))
        colours, where = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
        places = np.array([self._place(colour) for colour in colours.tolist()], np.uint8)
        return places[where].reshape(screen.shape[:2])

    def _place(self, colour: int) -> int:
        """A colour's place in the palette, or the nearest colour's once the palette is full."""
        if colour not in self._index:
            if len(self._index) >= GIF_COLOURS:
                return self._index[min(self._index, key=lambda known: _distance(known, colour))]
            self._index[colour] = len(self._index)
        return self._index[colour]


def _enlarged(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Enlarge `scale` times. Repeats the last row or column of an odd size, because H.264 needs even sizes."""
    for axis in (0, 1):
        image = image.repeat(scale, axis)
        if image.shape[axis] % 2:
            image = np.concatenate([image, image.take([-1], axis)], axis)
    return image


def _distance(one: int, other: int) -> int:
    """The squared distance of two colours 0xRRGGBB."""
    return sum(((one >> shift & 255) - (other >> shift & 255)) ** 2 for shift in (16, 8, 0))


_ENCODERS: dict[str, type[_Encoder]] = {".mp4": _Encoder, ".gif": _GifEncoder}


def check_video_path(path: Path) -> type[_Encoder]:
    """The encoder for a video file. Raises `UsageError` for another suffix, or a missing folder."""
    kind = _ENCODERS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"expected a video file ending in {' or '.join(_ENCODERS)}; got {path.name!r}")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path.name}: there is no folder {path.parent}")
    return kind
