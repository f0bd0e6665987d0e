"""`dino_ssl.segment`: the objects of an image as masks, without labels."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dino_ssl.data.dataset import BadImage, Skipped
from dino_ssl.data.sources import DatasetSource, open_dataset
from dino_ssl.evals.object_masks import MaskMethod, ObjectMasks
from dino_ssl.loading import Checkpoint, load_image, open_checkpoint
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import Weights
from dino_ssl.segmentation.masks import Segmentation, Segmenter, SegmentSettings
from dino_ssl.terminal import logger


def segment(
    checkpoint: str | Path | Backbone | Checkpoint,
    image: str | Path | Image.Image | np.ndarray | Tensor | DatasetSource,
    *,
    method: MaskMethod = "tokencut",
    size: int | None = None,
    refine: bool = True,
    head: str | Path | None = None,
    device: Any = None,
    weights: Weights = "last",
    trust: bool = False,
    **options: Any,
) -> Segmentation | list[Segmentation | None]:
    """Return the objects of an image as masks at its own size.

    Args:
        checkpoint: A run folder, a file, a released network, timm:NAME, or a backbone.
        image: A file, a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]; or a folder, a list of these,
            or any map-style torch dataset, for which a list with the result of each of its images is returned: None for
            one that cannot be decoded. Files that are no images are none of them. Both are logged.
        method: "tokencut", "maskcut" (several objects), "lost", or "attention".
        size: Short side of the network's input in pixels. Default: 480, or twice a training size below 224.
        refine: Move the edges of the masks to edges of the image.
        head: File of a head of `dino eval weak-segmentation`: masks of its classes instead of objects.
        device: cpu, cuda, cuda:1, mps, ...; None: a GPU if there is one.
        weights: Those of a run's folder that are used.
        trust: Import a backbone class from outside the package that the checkpoint names, which runs its code.
        options: Further settings of `ObjectMasks`: tau, center, objects, attention_head, mass, layer, feature.
    """
    loaded = open_checkpoint(checkpoint, device, weights=weights, trust=trust)
    find = ObjectMasks(method=method, **options)
    settings = SegmentSettings(find=find, size=size, refine=refine, head=None if head is None else str(head))
    segmenter = Segmenter(loaded.backbone, settings)
    source: Any = load_image(image, loaded.backbone.transform.bit_depth)
    if isinstance(source, np.ndarray):
        segmenter.grid(*source.shape[:2])  # raises if it is too long
        return segmenter([source])[0]
    dataset = open_dataset(source).with_bit_depth(loaded.backbone.transform.bit_depth)
    skipped = list(dataset.skipped)
    results: list[Segmentation | None] = []
    for index in range(len(dataset)):
        try:
            pixels = dataset.read(index)
            segmenter.grid(*pixels.shape[:2])
            results += segmenter([pixels])
        except BadImage as error:
            results.append(None)
            skipped.append(Skipped(dataset.names[index], error.reason))
    for item in skipped:
        logger.warning("skipped: %s: %s", *item)
    return results
