"""Descriptors of pictures that keep their shape: once, over all ranks, and kept on disk where there is a cache."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dino import dist
from dino.data.pictures import Pictures
from dino.data.shaped import shaped_batches
from dino.data.views import normalize
from dino.evals.cache import key_of, remembered, weights_hash
from dino.evals.evaluator import Extracted, Site, evaluating, gathered, share_of
from dino.models.backbone import Backbone

Describe = Callable[[Tensor], Tensor]
"""Normalised pictures [B, 3, H, W] on the device -> descriptors [B, W]."""


def describe(
    backbone: Backbone, pictures: Pictures, shapes: np.ndarray, of: Describe, *, width: int, what: str, site: Site
) -> Extracted:
    """of(picture i resized to shapes[i] = (h, w)) for every picture, in the data set's order, on every rank.

    width: of a descriptor. what: names the descriptor with its settings, for the cache: another one, another name.
    """

    def compute() -> dict[str, Tensor]:
        with site.progress(f"descriptors of {len(pictures)} pictures") as done:
            return _compute(backbone, pictures, shapes, of, width, site, done).tensors()

    if site.cache is None or (content := dist.on_main(lambda: pictures.content)) is None:
        return Extracted.of(compute(), pictures)
    shown = hashlib.sha256(np.ascontiguousarray(shapes, dtype="<i8").tobytes()).hexdigest()
    file = site.cache / f"{key_of(weights_hash(backbone), content, what, shown)}.safetensors"
    return Extracted.of(remembered(file, compute), pictures)


def _compute(
    backbone: Backbone, pictures: Pictures, shapes: np.ndarray, of: Describe, width: int, site: Site, progress
) -> Extracted:
    mine, rows, features = share_of(pictures, width)
    pixels, done = site.batch_size * site.size**2, 0  # as much memory as a batch of the usual size takes
    with evaluating(backbone), torch.random.fork_rng(devices=[]):  # loaders draw a seed: give it back
        for indices, images in shaped_batches(pictures, shapes, pixels=pixels, indices=mine, workers=site.workers):
            with site.autocast():
                out = of(normalize(images.to(site.device, non_blocking=True)))
            rows[done : done + len(indices)] = indices
            features[done : done + len(indices)] = out.float().cpu()
            done += len(indices)
            progress(done, len(mine))
    return gathered(rows, features, pictures, site.device)


def every_row(extracted: Extracted, count: int) -> Tensor:
    """[count, W]: row i is picture i's; zeros where it could not be read."""
    rows = extracted.features.new_zeros(count, extracted.features.shape[1])
    rows[extracted.indices] = extracted.features
    return rows


def skipped_of(*extracted: Extracted) -> list[dict[str, str]]:
    """What a result's JSON says of the pictures that could not be read."""
    return [skip._asdict() for one in extracted for skip in one.skipped]
