"""What a linear classifier is trained on (Appendix F.2): random resized crops and flips, and no other change."""

from collections.abc import Iterable, Iterator

import cv2
import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import make_loader, read_or_none, sample_rng
from dino_ssl.data.transforms.base import crop_box
from dino_ssl.data.transforms.pixel_ops import resize

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop as it comes


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> uint8 [3, size, size]: a part of 8 to 100 % of the area, mirrored half of the time.

    Bilinear and antialiased, as torchvision resizes Pillow's pictures here, where the test pictures are bicubic.
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], SCALE, RATIO, rng)
    crop = resize(image[top : top + height, left : left + width], size, size, "bilinear")
    if rng.random() < 0.5:
        crop = cv2.flip(crop, 1)
    return np.ascontiguousarray(crop.transpose(2, 0, 1))


def crop_batches(
    dataset: ImageDataset, size: int, jobs: Iterable[tuple[int, np.ndarray]], *, seed: int = 0, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """For every job (epoch, indices): the indices [b] int64 that could be read, and uint8 [b, 3, size, size].

    A crop is a function of (seed, epoch, index) alone, whatever the batches, workers and ranks.
    """
    yield from make_loader(_Crops(dataset, size, seed), jobs, workers, 2, False)


class _Crops:
    def __init__(self, dataset: ImageDataset, size: int, seed: int) -> None:
        self.dataset, self.size, self.seed = dataset, size, seed

    def __call__(self, job: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor]:
        epoch, indices = job
        stack = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        used: list[int] = []
        for index in indices.tolist():
            image = read_or_none(self.dataset, index, [])
            if image is not None:
                stack[len(used)] = random_crop(image, self.size, sample_rng(self.seed, epoch, index))
                used.append(index)
        return torch.tensor(used, dtype=torch.int64), torch.from_numpy(stack[: len(used)])
