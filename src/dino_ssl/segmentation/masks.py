"""Masks at the size of the images: the objects on the grid of patches, refined along the edges of the image."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from dino_ssl.discovery.guided_filter import refine
from dino_ssl.discovery.regions import Found, box_of
from dino_ssl.errors import check_range
from dino_ssl.evals.attention_maps import attention_size, check_ratio, network_input, patch_grid, resize_to_patches
from dino_ssl.evals.label_propagation import resize_nearest
from dino_ssl.evals.object_masks import ObjectMasks
from dino_ssl.formatting import Summarized
from dino_ssl.models.backbone import Backbone

MAX_RANGE = 1
"""An image whose pixels differ by at most this many levels has one color, and no object."""


@dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    """Settings of masks at the size of the images."""

    find: ObjectMasks = field(default_factory=ObjectMasks)
    size: int | None = None
    """Short side in pixels of the network input. Default: 480, or twice a training size below 224."""
    refine: bool = True
    """Move the edges of the masks to edges of the image, by a guided filter."""

    def __post_init__(self) -> None:
        check_range(self, "size", least=1)


@dataclass(frozen=True, repr=False)
class Segmentation(Summarized):
    """Objects of an image, at its own size, the most salient first."""

    masks: np.ndarray
    """[n, H, W] bool; no pixel is in two masks."""
    soft: np.ndarray
    """[n, H, W] float32 in 0 .. 1: above 0.5 inside of the masks."""
    scores: np.ndarray
    """[n] float32: the mean of the soft mask on the patches of the object, 0.5 to 1."""
    boxes: np.ndarray
    """[n, 4] int64: left, top, right, bottom in pixels; right and bottom are excluded."""
    note: str = ""
    """The reason, if there is no object."""

    @property
    def labels(self) -> np.ndarray:
        """The masks as one label map, uint8 [H, W]: 0 the background, 1, 2, ... the objects."""
        labels = np.zeros(self.masks.shape[1:], np.uint8)
        for number, mask in enumerate(self.masks, 1):
            labels[mask] = number
        return labels

    @property
    def summary(self) -> dict[str, object]:
        """Names and values to show."""
        objects, height, width = self.masks.shape
        share = f"{self.masks.any(0).mean():.1%}"
        return {"objects": objects, "image": f"{width} x {height}", "share of the pixels": share}


def input_size(settings: SegmentSettings, backbone: Backbone) -> int:
    """Return the short side of the network's input in pixels."""
    return settings.size or attention_size(backbone.transform.size)


def input_grid(height: int, width: int, settings: SegmentSettings, backbone: Backbone) -> tuple[int, int]:
    """Return (rows, columns) of patches of an image. Raises BadImage if it is too long."""
    check_ratio("image", height, width)
    return patch_grid(height, width, input_size(settings, backbone), backbone.patch)


def segment_images(backbone: Backbone, images: Sequence[np.ndarray], settings: SegmentSettings) -> list[Segmentation]:
    """Return the objects of images, uint8 RGB [H, W, 3], whose inputs have one shape (see `input_grid`)."""
    inputs = np.stack([resize_to_patches(image, input_size(settings, backbone), backbone.patch) for image in images])
    found = settings.find.find(backbone, network_input(backbone, inputs))
    return [at_image_size(image, each, settings.refine) for image, each in zip(images, found, strict=True)]


def at_image_size(image: np.ndarray, found: Found, is_refined: bool) -> Segmentation:
    """Return the objects on the grid of patches at the size of the image; those that vanish are dropped."""
    height, width = image.shape[:2]
    if int(np.ptp(image.reshape(-1, 3), axis=0).max()) <= MAX_RANGE:
        return _empty(image, "the image has one color")
    if not len(found.masks):
        return _empty(image, "the network's input has too few patches")
    cell = (height / found.masks.shape[1] + width / found.masks.shape[2]) / 2
    taken, kept = np.zeros((height, width), bool), []
    for coarse, soft in zip(found.masks, found.soft, strict=True):
        if is_refined:
            large = refine(image, coarse.astype(np.float32), cell)
            mask = large > 0.5
        else:
            large = cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR)
            mask = resize_nearest(coarse, height, width)
        mask &= ~taken
        if mask.any():
            taken |= mask
            kept.append((mask, large, soft[coarse].mean(), box_of(mask)))
    if not kept:
        return _empty(image, "no object is left after the refinement")
    masks, large, scores, boxes = zip(*kept, strict=True)
    return Segmentation(
        np.stack(masks), np.stack(large), np.array(scores, np.float32), np.array(boxes).astype(np.int64)
    )


def _empty(image: np.ndarray, note: str) -> Segmentation:
    shape = (0, *image.shape[:2])
    none = np.zeros(0, np.float32)
    return Segmentation(np.zeros(shape, bool), np.zeros(shape, np.float32), none, np.zeros((0, 4), np.int64), note)
