"""Reading frames from a video file or a dataset, and writing MP4 files, with OpenCV."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import DatasetSource, open_dataset
from dino_ssl.errors import UserError, check_value
from dino_ssl.files import write_errors
from dino_ssl.progress import Progress

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
CODECS = ("vp09", "mp4v")
"""In order of preference: browsers play the first, every OpenCV writes the second."""
DEFAULT_FPS = 25.0
"""Frames per second of a dataset, and of a file without a frame rate."""


@dataclass(frozen=True)
class Video:
    """A sequence of frames. Iterating yields uint8 [H, W, 3] RGB, and can be repeated."""

    source: Path | ImageDataset
    fps: float
    num_frames: int
    """As the file states it; 0 if it does not."""

    def __iter__(self) -> Iterator[np.ndarray]:
        if isinstance(self.source, ImageDataset):
            yield from map(self.source.read, range(len(self.source)))
            return
        capture = cv2.VideoCapture(str(self.source))
        while True:
            success, frame = capture.read()
            if not success:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def frame_names(self) -> Iterator[str]:
        """Return the frames' names: those of a dataset without suffix, or 00000, 00001, ... without end."""
        if isinstance(self.source, Path):
            return (f"{index:05d}" for index in count())
        names = [str(Path(name).with_suffix("")) for name in self.source.names]
        if len(set(names)) < len(names):
            raise UserError("Two frames differ only in their file suffix: their masks would have one name.")
        return iter(names)


def open_video(source: DatasetSource, fps: float | None = None, progress: Progress | None = None) -> Video:
    """Open a video file, or a dataset whose images are the frames, in natural order of their names (2 before 10).

    fps: frames per second; None takes the file's, or DEFAULT_FPS. progress: of opening a dataset.
    """
    check_value("fps", fps, above=0)
    if isinstance(source, str | Path) and Path(source).is_file():
        capture = cv2.VideoCapture(str(source))
        if not capture.isOpened():
            raise UserError(f"OpenCV cannot read the video {source}: expected MP4, WebM, ..., or a folder of frames.")
        fps = fps or capture.get(cv2.CAP_PROP_FPS) or DEFAULT_FPS
        return Video(Path(source), fps, max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))))
    dataset = open_dataset(source, progress)
    if dataset.skipped:
        name, reason = dataset.skipped[0]
        raise UserError(f"The frame {name} cannot be read: {reason}. Copy it again, or delete it.")
    order = sorted(range(len(dataset)), key=lambda index: _natural_key(dataset.names[index]))
    return Video(dataset.subset(order), fps or DEFAULT_FPS, len(dataset))


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Write uint8 [H, W, 3] RGB frames of equal size as MP4, atomically, and return their number.

    An odd side loses its last row or column of pixels, because video codecs need even sides.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise UserError(f"There are no frames to write to {path}: the video is empty or cannot be read.")
    num_frames, height, width = 0, first.shape[0] // 2 * 2, first.shape[1] // 2 * 2
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            part = Path(folder) / "part.mp4"
            writer = _open_writer(part, (width, height), fps)
            for num_frames, frame in enumerate(chain([first], frames), 1):
                if frame.shape != first.shape:
                    raise UserError(f"The frames of a video must have one size, and frame {num_frames} differs.")
                writer.write(cv2.cvtColor(frame[:height, :width], cv2.COLOR_RGB2BGR))
            writer.release()
            part.replace(path)
    return num_frames


def _open_writer(path: Path, size: tuple[int, int], fps: float) -> cv2.VideoWriter:
    for codec in CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
        if writer.isOpened():
            return writer
    raise UserError(f"OpenCV has no MP4 codec ({', '.join(CODECS)}): install opencv-python-headless from PyPI.")


def _natural_key(name: str) -> list[Any]:
    """Split into text, number, text, ..., text."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]
