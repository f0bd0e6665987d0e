"""Pictures that keep their shape, or take one that is asked for, instead of a center crop: what search is done on."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset, derived_key
from dino_ssl.data.loader import make_loader, read_or_none
from dino_ssl.data.transforms.pixel_ops import resize, to_planar


def scale_to(sizes: np.ndarray, longest: int) -> np.ndarray:
    """[N]: by how much pictures of sizes [N, 2] shrink until their longest side is `longest`. None grows."""
    return np.minimum(1.0, longest / sizes.max(axis=1))


def scaled(sizes: np.ndarray, scale: np.ndarray, least: int = 1) -> np.ndarray:
    """[N, 2] (height, width) of pictures of sizes [N, 2] (width, height); a side below `least` becomes it."""
    return np.maximum(np.rint(sizes[:, ::-1] * scale[:, None]), least).astype(np.int64)


def shaped_batches(
    dataset: ImageDataset, shapes: np.ndarray, *, pixels: int, indices: Sequence[int] | np.ndarray, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices [b] int64, uint8 [b, 3, h, w]): picture i of `indices` resized to shapes[i] = (h, w).

    Pictures of one shape share a batch, of at most `pixels` pixels or of one picture; where all have the same shape
    they come in order. Those that cannot be read are left out, of the indices too.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    chosen = chosen[np.lexsort((shapes[chosen, 1], shapes[chosen, 0]))]  # stable
    yield from make_loader(_Shaped(dataset), _jobs(chosen, shapes, pixels), workers, 2, False)


def _jobs(chosen: np.ndarray, shapes: np.ndarray, pixels: int) -> Iterator[tuple[int, int, np.ndarray]]:
    changes = np.flatnonzero((shapes[chosen[1:]] != shapes[chosen[:-1]]).any(axis=1)) + 1
    for group in np.split(chosen, changes):
        if len(group):
            height, width = shapes[group[0]].tolist()
            count = max(1, pixels // (height * width))
            yield from ((height, width, group[at : at + count]) for at in range(0, len(group), count))


class _Shaped:
    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __call__(self, job: tuple[int, int, np.ndarray]) -> tuple[Tensor, Tensor]:
        height, width, indices = job
        stack = np.empty((len(indices), 3, height, width), np.uint8)
        used: list[int] = []
        for index in indices.tolist():
            image = read_or_none(self.dataset, index, [])
            if image is not None:
                to_planar(resize(image, height, width), stack[len(used)])
                used.append(index)
        return torch.tensor(used, dtype=torch.int64), torch.from_numpy(stack[: len(used)])


class CroppedImages(ImageDataset):
    """Each picture cut to its box (left, top, right, bottom), in pixels."""

    def __init__(self, source: ImageDataset, boxes: np.ndarray) -> None:
        limits = np.concatenate([source.sizes, source.sizes], axis=1)
        self.boxes = np.clip(np.rint(boxes), 0, limits).astype(np.int64)
        super().__init__(
            names=source.names,
            sizes=self.boxes[:, 2:] - self.boxes[:, :2],
            labels=source.labels,
            classes=source.classes,
            skipped=source.skipped,
        )
        self.source = source

    @property
    def content_key(self) -> str | None:
        return derived_key(self.source.content_key, self.boxes.tobytes())

    def read(self, index: int) -> np.ndarray:
        left, top, right, bottom = self.boxes[index]
        return np.ascontiguousarray(self.source.read(index)[top:bottom, left:right])
