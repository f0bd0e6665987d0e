"""Mini-batch of augmented views, the input of every method."""

import math
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Views of B images, stacked per resolution.

    Attributes:
        views: One [n, B, 3, H, W] tensor per resolution, uint8 until it is on the device. Multi-crop: views[0] holds
            the 2 global views, views[1] the local ones (absent if there are none). Supervised: views[0], one view.
        labels: [B] int64, -1 for an unlabeled image; None if the dataset has no labels.
    """

    views: tuple[Tensor, ...]
    labels: Tensor | None = None

    @property
    def num_images(self) -> int:
        """B, the number of images."""
        return self.views[0].shape[1]

    def micro_batches(self, size: int) -> list["Batch"]:
        """Split into micro-batches of at most `size` images, as equal as possible; 0 does not split."""
        if not 0 < size < self.num_images:
            return [self]
        number = math.ceil(self.num_images / size)
        views = zip(*(view.tensor_split(number, dim=1) for view in self.views), strict=True)
        labels = [None] * number if self.labels is None else self.labels.tensor_split(number)
        return [Batch(*pair) for pair in zip(views, labels, strict=True)]
