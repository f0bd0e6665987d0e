"""Images at their own aspect ratio instead of a center crop, for retrieval and copy detection."""

import numpy as np

from dino_ssl.data.dataset import ImageDataset, derived_key


def scale_to(sizes: np.ndarray, longest: int) -> np.ndarray:
    """Return the factors [N] that shrink images of sizes [N, 2] to a longest side of at most `longest`."""
    return np.minimum(1.0, longest / sizes.max(axis=1))


def scaled(sizes: np.ndarray, scale: np.ndarray, least: int = 1) -> np.ndarray:
    """Return the shapes [N, 2] (height, width), at least `least`, of images of sizes [N, 2] (width, height)."""
    return np.maximum(np.rint(sizes[:, ::-1] * scale[:, None]), least).astype(np.int64)


class CroppedImages(ImageDataset):
    """Images cropped to boxes (left, top, right, bottom) in pixels, [N, 4]."""

    def __init__(self, source: ImageDataset, boxes: np.ndarray) -> None:
        limits = np.concatenate([source.sizes, source.sizes], axis=1)
        self.boxes = np.clip(np.rint(boxes), 0, limits).astype(np.int64)
        sizes = self.boxes[:, 2:] - self.boxes[:, :2]
        super().__init__(
            names=source.names, sizes=sizes, labels=source.labels, classes=source.classes, skipped=source.skipped
        )
        self.source = source

    @property
    def content_key(self) -> str | None:
        """Key over the source and the boxes."""
        return derived_key(self.source.content_key, self.boxes.tobytes())

    def read(self, index: int) -> np.ndarray:
        """Return the crop of image `index`."""
        left, top, right, bottom = self.boxes[index]
        return np.ascontiguousarray(self.source.read(index)[top:bottom, left:right])
