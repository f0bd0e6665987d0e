"""Reading frames from a video file or a dataset, and writing MP4 files, with OpenCV."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.sources import DatasetSource, open_dataset
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write
from dino_ssl.progress import Progress

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"})
CODECS = ("vp09", "mp4v")
"""In order of preference: browsers play the first, every OpenCV writes the second."""
DEFAULT_FPS, MAX_FPS = 25.0, 1000.0
"""Frames per second of a dataset, and of a file without a frame rate; frame rates above the maximum are ignored."""


@dataclass(frozen=True)
class Video:
    """A sequence of frames. Iterating yields uint8 [H, W, 3] RGB, and can be repeated."""

    source: Path | ImageDataset
    fps: float
    num_frames: int
    """As the file states it; 0 if it does not."""

    def __iter__(self) -> Iterator[np.ndarray]:
        return _file_frames(self.source) if isinstance(self.source, Path) else _dataset_frames(self.source)

    def frame_names(self) -> Iterator[str]:
        """Return the frames' names: those of a dataset without suffix, or 00000, 00001, ... without end."""
        if isinstance(self.source, Path):
            return (f"{index:05d}" for index in range(10**9))
        names = [str(Path(name).with_suffix("")) for name in self.source.names]
        if len(set(names)) < len(names):
            raise UserError("Two frames differ only in their file suffix: their masks would have one name.")
        return iter(names)


def open_video(source: DatasetSource, fps: float | None = None, progress: Progress | None = None) -> Video:
    """Open a video file, or a dataset whose images are the frames, in natural order of their names (2 before 10).

    fps: frames per second; None takes the file's, or DEFAULT_FPS. progress: of opening a dataset.
    """
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise UserError(f"`fps` must be above 0 and at most {MAX_FPS:g}, e.g. 25; got {fps:g}.")
    if isinstance(source, str | Path) and Path(source).is_file():
        return _open_file(Path(source), fps)
    dataset = open_dataset(source, progress)
    if dataset.skipped:
        name, reason = dataset.skipped[0][:2]
        raise UserError(f"The frame {name} cannot be read: {reason}. Copy it again, or delete it.")
    order = sorted(range(len(dataset)), key=lambda index: _natural_key(dataset.names[index]))
    return Video(dataset.subset(order), fps or DEFAULT_FPS, len(dataset))


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write uint8 [H, W, 3] RGB frames of equal size as MP4, atomically, and return their number.

    An odd side loses its last row or column of pixels, because video codecs need even sides.
    """
    count = 0

    def write(part: Path) -> None:
        nonlocal count
        writer, shape = None, (0, 0)
        mp4 = part.with_suffix(".mp4")  # OpenCV takes the format from the suffix
        try:
            for frame in frames:
                if writer is None:
                    shape = (frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2)
                    writer = _open_writer(mp4, shape, fps)
                even = frame[: shape[0], : shape[1]]
                if even.shape[:2] != shape:
                    raise UserError(f"The frames of a video must have one size, and frame {count} differs: crop them.")
                writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))
                count += 1
            if writer is None:
                raise UserError(f"There are no frames to write to {path}: the video is empty or cannot be read.")
            writer.release()
            mp4.replace(part)
        finally:
            if writer is not None:
                writer.release()
            mp4.unlink(missing_ok=True)

    atomic_write(path, write)
    return count


def _open_file(path: Path, fps: float | None) -> Video:
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
            raise UserError(f"OpenCV cannot read the video {path}: expected {suffixes}, or a folder of frames.")
        own_fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps or (own_fps if 0 < own_fps <= MAX_FPS else DEFAULT_FPS)
        return Video(path, fps, max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))))
    finally:
        capture.release()


def _open_writer(path: Path, shape: tuple[int, int], fps: float) -> cv2.VideoWriter:
    for codec in CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, shape[::-1])
        if writer.isOpened():
            return writer
        writer.release()
    raise UserError(f"OpenCV has no MP4 codec ({', '.join(CODECS)}): install opencv-python-headless from PyPI.")


def _file_frames(path: Path) -> Iterator[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    try:
        while True:
            success, frame = capture.read()
            if not success:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def _dataset_frames(dataset: ImageDataset) -> Iterator[np.ndarray]:
    for index in range(len(dataset)):
        try:
            yield dataset.read(index)
        except BadImage as error:
            raise UserError(f"A frame cannot be read: {error}. Copy it again, or delete it.") from error


def _natural_key(name: str) -> list[tuple[str, int]]:
    words = re.split(r"(\d+)", name)  # text, digits, text, digits, ..., text
    return [(text, int(digits)) for text, digits in zip(words[::2], [*words[1::2], "0"], strict=True)]
