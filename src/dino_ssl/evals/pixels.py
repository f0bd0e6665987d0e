"""Raw pixels in the place of features: the floor that any figure of an evaluation stands beside."""

import numpy as np
import torch
from PIL import Image

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.evals.base import EvalContext, Extracted, gathered, rank_shard
from dino_ssl.progress import Progress


def pixel_feature(image: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] uint8 as 768 numbers: 16x16 RGB, its own mean subtracted, unit length."""
    small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))  # antialiased
    small = small.astype(np.float32).ravel()
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-12)


def raw_pixels(
    dataset: ImageDataset, *, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Extracted:
    """`pixel_feature` of every readable picture, over all ranks: the floor that features must clear.

    `device` is where the ranks meet (their backend decides which it must be); the work itself is the CPU's.
    """
    mine, rows, features = rank_shard(dataset, 768)
    for place, index in enumerate(mine.tolist()):
        try:
            features[place] = torch.from_numpy(pixel_feature(dataset.read(index)))
            rows[place] = index
        except BadImage:
            pass  # its row stays -1, and `gathered` names it with the reason
        if progress is not None:
            progress(place + 1, len(mine))
    return gathered(rows, features, dataset, device)


def raw_pixels_of(*sides: ImageDataset, context: EvalContext) -> list[Extracted]:
    """`raw_pixels` of every side of an evaluation, where it works."""
    found = []
    for dataset in sides:
        with context.progress("raw pixels") as done:
            found.append(raw_pixels(dataset, device=context.device, progress=done))
    return found
