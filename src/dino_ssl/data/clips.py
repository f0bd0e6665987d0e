"""Interface of videos with annotated objects. Frames and masks are read in order, one at a time."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from dino_ssl.data.synthetic.scenes import Scenes


class Clip(ABC):
    """A video with a mask for each frame; `frame_names` are the names of the mask files."""

    name: str
    frame_names: Sequence[str]

    @abstractmethod
    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 RGB [H, W, 3] of equal size, from the first one."""

    @abstractmethod
    def masks(self) -> Iterator[np.ndarray]:
        """Yield the mask of each frame, uint8 [H, W]: 0 background, 1, 2, ... objects."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits, equal for the same frames with the same first mask."""

    def __len__(self) -> int:
        return len(self.frame_names)


class SyntheticClip(Clip):
    """Video `index` of the synthetic scenes."""

    def __init__(self, scenes: Scenes, index: int, frames: int) -> None:
        self.scenes, self.index = scenes, index
        self.name = f"{scenes.part}-{scenes.seed}-{index:03d}"
        self.frame_names = [f"{i:05d}" for i in range(frames)]

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 RGB [H, W, 3]."""
        yield from self.scenes.video(self.index, len(self)).frames

    def masks(self) -> Iterator[np.ndarray]:
        """Yield the mask of each frame, uint8 [H, W]."""
        yield from self.scenes.video(self.index, len(self)).masks

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the settings."""
        settings = json.dumps([asdict(self.scenes), self.index, len(self)], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]
