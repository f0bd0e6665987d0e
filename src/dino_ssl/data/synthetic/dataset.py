"""Synthetic scenes as an `ImageDataset`."""

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.synthetic.shapes import KINDS

if TYPE_CHECKING:
    from dino_ssl.data.synthetic.scenes import Scenes


class SyntheticDataset(ImageDataset):
    """Images of `Scenes`, with their masks."""

    def __init__(self, scenes: "Scenes") -> None:
        super().__init__(
            names=[scenes.name(i) for i in range(scenes.count)],
            sizes=np.full((scenes.count, 2), scenes.size),
            labels=np.arange(scenes.count) % scenes.classes,
            classes=KINDS[: scenes.classes],
        )
        self.scenes = scenes

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, sizes, labels and all settings."""
        settings = json.dumps(asdict(self.scenes), sort_keys=True)
        return hashlib.sha256((super().fingerprint + settings).encode()).hexdigest()[:16]

    @property
    def content_key(self) -> str:
        """Key over the settings and one image, which changes with the implementation."""
        first = self.read(0).tobytes() if len(self) else b""
        return hashlib.sha256(self.fingerprint.encode() + first).hexdigest()[:16]

    def read(self, index: int) -> np.ndarray:
        """Return image `index`, uint8 RGB [s, s, 3]."""
        return self.scenes.read(index)

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of image `index`, see `Scenes.mask`."""
        return self.scenes.mask(index)
