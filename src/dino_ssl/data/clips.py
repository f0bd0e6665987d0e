"""The contract that every source of videos with known objects meets: frames and masks, one after the other.

Nothing holds a whole video of files: frames and masks are read as they are asked for, in their order.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from dino_ssl.data.synthetic.scenes import Scenes


class Clip(ABC):
    """A video, and which objects are where in it."""

    name: str
    frame_names: Sequence[str]
    """One for each frame: what its mask is called."""

    @abstractmethod
    def frames(self) -> Iterator[np.ndarray]:
        """uint8 [H, W, 3] RGB, all of one size: from the first on, every time that this is called."""

    @abstractmethod
    def masks(self) -> Iterator[np.ndarray]:
        """uint8 [H, W] for each frame: 0 the ground, 1, 2, ... the objects."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits: equal where the same frames come with the same first mask."""

    def __len__(self) -> int:
        return len(self.frame_names)


class DrawnClip(Clip):
    """Video `index` of the scenes that the package draws itself."""

    def __init__(self, scenes: Scenes, index: int, frames: int) -> None:
        self.scenes, self.index = scenes, index
        self.name = f"{scenes.part}-{scenes.seed}-{index:03d}"
        self.frame_names = [f"{i:05d}" for i in range(frames)]

    def frames(self) -> Iterator[np.ndarray]:
        yield from self.scenes.video(self.index, len(self)).frames

    def masks(self) -> Iterator[np.ndarray]:
        yield from self.scenes.video(self.index, len(self)).masks

    @property
    def fingerprint(self) -> str:
        settings = json.dumps([asdict(self.scenes), self.index, len(self)], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]
