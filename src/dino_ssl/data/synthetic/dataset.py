"""Drawn scenes as a source of pictures like any other, and as files."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.synthetic.shapes import KINDS
from dino_ssl.errors import UserError

if TYPE_CHECKING:
    from dino_ssl.data.synthetic.scenes import Scenes


class SyntheticDataset(ImageDataset):
    """`Scenes` by the contract of `ImageDataset`; it also gives masks, by the same index."""

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
        """The names do not tell every setting: they go in as well."""
        settings = json.dumps(asdict(self.scenes), sort_keys=True)
        return hashlib.sha256((super().fingerprint + settings).encode()).hexdigest()[:16]

    @property
    def content_key(self) -> str:
        """The settings, and one picture as this version of the package draws it."""
        first = self.read(0).tobytes() if len(self) else b""
        return hashlib.sha256(self.fingerprint.encode() + first).hexdigest()[:16]

    def read(self, index: int) -> np.ndarray:
        return self.scenes.read(index)

    def mask(self, index: int) -> np.ndarray:
        return self.scenes.mask(index)


def write_images(scenes: "Scenes", folder: Path, masks: Path | None) -> None:
    """All pictures as PNG files in class folders; masks, under the same names, in a folder outside."""
    if masks is not None and folder.resolve() in (masks.resolve(), *masks.resolve().parents):
        raise UserError(
            f"scenes: masks must go to a folder outside of the pictures' ({folder}), got {masks}; "
            f"try {str(folder).rstrip('/')}-masks."
        )
    for i in range(scenes.count):
        picture, mask = scenes.draw(i)
        _write(folder / scenes.name(i), picture[..., ::-1])
        if masks is not None:
            _write(masks / scenes.name(i), mask)


def _write(path: Path, picture: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = cv2.imwrite(str(path), picture)
    except OSError as error:
        raise UserError(
            f"scenes: cannot write {path}: {error.strerror}; choose a folder that can be written."
        ) from error
    if not done:
        raise UserError(f"scenes: cannot write {path}; is the disk full, or the folder read-only?")
