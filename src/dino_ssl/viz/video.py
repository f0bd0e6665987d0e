"""Films: frames out of a video file or a folder of pictures, and pictures into an MP4 file, by OpenCV."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dino_ssl.data.dataset import BadImage
from dino_ssl.data.decode import decode
from dino_ssl.data.formats import SUFFIXES
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write

VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"})
"""How the names of video files end."""
CODECS = ("vp09", "mp4v")
"""Tried in order: browsers play the first, every OpenCV writes the second."""
FPS = 25.0
"""Frames per second of a folder, and of a file that does not say."""


@dataclass(frozen=True)
class Video:
    """Where frames come from. Iterate over it for uint8 [H, W, 3] RGB, one after the other."""

    path: Path
    fps: float
    count: int
    """Frames, as far as the file tells; 0 where it does not."""

    def __iter__(self) -> Iterator[np.ndarray]:
        return _from_folder(self.path) if self.path.is_dir() else _from_file(self.path)


def open_video(path: str | Path, fps: float | None = None) -> Video:
    """A video file, or a folder whose pictures, in the order of their names, are the frames."""
    path = Path(path)
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"fps must lie above 0 and not above 1000, e.g. 25; received {fps:g}.")
    if path.is_dir():
        frames = frame_files(path)
        if not frames:
            raise UserError(
                f"{path} holds no frames: expected pictures named in their order, 00000.jpg, 00001.jpg, ..."
            )
        return Video(path, fps or FPS, len(frames))
    if not path.is_file():
        raise UserError(f"There is no video {path}: expected a file or a folder of frames.")
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise UserError(
                f"{path} is no video that OpenCV can read. Expected a file of one of the kinds "
                f"{', '.join(sorted(VIDEOS))}, or a folder of frames."
            )
        own = capture.get(cv2.CAP_PROP_FPS)
        own = own if 0 < own <= 1000 else FPS
        return Video(path, fps or own, max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))))
    finally:
        capture.release()


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Writes uint8 [H, W, 3] RGB frames of one size as an MP4 file, whole or not at all; returns how many.

    An odd side loses its last row or column of pixels: video codecs want even ones.
    """
    written = 0

    def write(aside: Path) -> None:
        nonlocal written
        writer, shape = None, (0, 0)
        own = aside.with_suffix(".mp4")  # OpenCV takes the format from the name
        try:
            for frame in frames:
                if writer is None:
                    shape = (frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2)
                    writer = _writer(own, shape, fps)
                cut = frame[: shape[0], : shape[1]]
                if cut.shape[:2] != shape:
                    raise UserError(f"A film has frames of one size, and frame {written} is another: crop the frames.")
                writer.write(cv2.cvtColor(cut, cv2.COLOR_RGB2BGR))
                written += 1
            if writer is None:
                raise UserError(f"There are no frames to write to {path}: the film is empty or cannot be read.")
            writer.release()
            own.replace(aside)
        finally:
            if writer is not None:
                writer.release()
            own.unlink(missing_ok=True)

    atomic_write(path, write)
    return written


def _writer(path: Path, shape: tuple[int, int], fps: float) -> cv2.VideoWriter:
    for codec in CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, shape[::-1])
        if writer.isOpened():
            return writer
        writer.release()
    raise UserError(f"This OpenCV writes no MP4 ({' or '.join(CODECS)}): install opencv-python-headless from PyPI.")


def _from_file(path: Path) -> Iterator[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    try:
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def _from_folder(path: Path) -> Iterator[np.ndarray]:
    for file in frame_files(path):
        try:
            yield decode(file)
        except BadImage as bad:
            raise UserError(f"A frame cannot be read: {bad}\nCopy it again, or take it out of the folder.") from bad


def frame_files(path: Path) -> list[Path]:
    """In the order that a person reads the names in: 2.jpg before 10.jpg."""
    files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    return sorted(files, key=_natural)


def _natural(file: Path) -> list[tuple[str, int]]:
    words = re.split(r"(\d+)", file.name)  # text, digits, text, digits, ...
    return [(text, int(digits)) for text, digits in zip(words[::2], [*words[1::2], "0"], strict=True)]
