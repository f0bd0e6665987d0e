"""Masks at the size of the images: the objects on the grid of patches, refined along the edges of the image."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from dino_ssl.data.masks import BACKGROUND
from dino_ssl.discovery.guided_filter import refine
from dino_ssl.discovery.regions import Found, box_of
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.attention_maps import attention_size, check_ratio, network_input, patch_grid, resize_to_patches
from dino_ssl.evals.features import weights_hash
from dino_ssl.evals.label_propagation import resize_nearest
from dino_ssl.evals.object_masks import ObjectMasks
from dino_ssl.evals.segmentation_head import SegmentationHead, feature_maps
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
    head: str | None = None
    """File of a head of `dino eval weak-segmentation`: masks of its classes instead of objects. Its image size is the
    default."""

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
    """[n] float32: the mean of the soft mask on the patches of an object, 0.5 to 1; of a class on its pixels."""
    boxes: np.ndarray
    """[n, 4] int64: left, top, right, bottom in pixels; right and bottom are excluded."""
    numbers: np.ndarray
    """[n] uint8: the label of each mask in `labels`: 1, 2, ...; of a head, its classes."""
    classes: tuple[str | None, ...] = ()
    """[n] names of the classes of a head; None for objects."""
    note: str = ""
    """The reason, if there is no object."""

    @property
    def labels(self) -> np.ndarray:
        """The masks as one label map, uint8 [H, W]: 0 the background."""
        labels = np.zeros(self.masks.shape[1:], np.uint8)
        for number, mask in zip(self.numbers, self.masks, strict=True):
            labels[mask] = number
        return labels

    @property
    def summary(self) -> dict[str, object]:
        """Names and values to show."""
        objects, height, width = self.masks.shape
        share = f"{self.masks.any(0).mean():.1%}"
        return {"objects": objects, "image": f"{width} x {height}", "share of the pixels": share}


class Segmenter:
    """A network with settings, which are checked once: call it with images.

    Raises UserError for a head of another network.
    """

    def __init__(self, backbone: Backbone, settings: SegmentSettings) -> None:
        self.backbone, self.settings = backbone, settings
        self.head = None if settings.head is None else SegmentationHead.load(settings.head)
        if self.head is not None and self.head.weights_hash != (own := weights_hash(backbone)):
            raise UserError(
                f"{settings.head} was trained on the features of other weights ({self.head.weights_hash}) than these "
                f"({own}). Use that network, or train a head with `dino eval weak-segmentation`."
            )
        self.size = settings.size or (self.head.size if self.head else attention_size(backbone.transform.size))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of patches of an image. Raises BadImage if it is too long."""
        check_ratio("image", height, width)
        return patch_grid(height, width, self.size, self.backbone.patch)

    def __call__(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        """Return the objects of images, uint8 RGB [H, W, 3], whose inputs have one shape (see `grid`)."""
        patch, is_refined = self.backbone.patch, self.settings.refine
        inputs = network_input(
            self.backbone, np.stack([resize_to_patches(image, self.size, patch) for image in images])
        )
        if self.head is None:
            objects = self.settings.find.find(self.backbone, inputs)
            pairs = zip(images, objects, strict=True)
            return [segmentation(image, _object_masks(image, each, is_refined)) for image, each in pairs]
        names = (None, *self.head.classes)
        shares = self.head(feature_maps(self.backbone, inputs)).softmax(1).cpu().numpy()
        pairs = zip(images, shares, strict=True)
        return [segmentation(image, _class_masks(image, each, is_refined), names) for image, each in pairs]


Layer = tuple[int, np.ndarray, np.ndarray, float]
"""Number, bool mask [H, W], soft mask [H, W] and score of an object or a class."""


def segmentation(image: np.ndarray, layers: Iterable[Layer], names: Sequence[str | None] | None = None) -> Segmentation:
    """Return the layers that have a pixel; none for an image of one color. names: of the numbers, if they are classes.

    A pixel belongs to the first layer that has it.
    """
    height, width = image.shape[:2]
    note, taken, kept = "no object was found", np.zeros((height, width), bool), []
    if int(np.ptp(image.reshape(-1, 3), axis=0).max()) <= MAX_RANGE:
        note, layers = "the image has one color", ()
    for number, mask, soft, score in layers:
        mask = mask & ~taken
        if mask.any():
            taken |= mask
            kept.append((number, mask, soft, score))
    masks = np.array([mask for _, mask, _, _ in kept], bool).reshape(-1, height, width)
    numbers = [number for number, *_ in kept] if names else range(1, len(kept) + 1)
    return Segmentation(
        masks,
        np.array([soft for _, _, soft, _ in kept], np.float32).reshape(-1, height, width),
        np.array([score for *_, score in kept], np.float32),
        np.array([box_of(mask) for mask in masks], np.int64).reshape(-1, 4),
        np.array(numbers, np.uint8),
        tuple(names[number] if names else None for number in numbers),
        "" if kept else note,
    )


def _object_masks(image: np.ndarray, found: Found, is_refined: bool) -> Iterator[Layer]:
    """Yield the objects on the grid of patches at the size of the image."""
    height, width = image.shape[:2]
    for number, (coarse, soft) in enumerate(zip(found.masks, found.soft, strict=True), 1):
        if is_refined:
            large = refine(image, coarse.astype(np.float32), _cell(image, coarse))
            mask = large > 0.5
        else:
            large = cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR)
            mask = resize_nearest(coarse, height, width)
        yield number, mask, large, float(soft[coarse].mean())


def _class_masks(image: np.ndarray, shares: np.ndarray, is_refined: bool) -> Iterator[Layer]:
    """Yield the classes but the background, from their probabilities on the grid [C, h, w]: the largest wins."""
    height, width = image.shape[:2]
    present = np.union1d(BACKGROUND, shares.argmax(0))
    large = np.stack(
        [
            refine(image, share, _cell(image, share))
            if is_refined
            else cv2.resize(share, (width, height), interpolation=cv2.INTER_LINEAR)
            for share in shares[present]
        ]
    )
    labels = present[large.argmax(0)]
    for number, soft in zip(present.tolist(), large, strict=True):
        mask = labels == number
        if number != BACKGROUND and mask.any():
            yield number, mask, soft, float(soft[mask].mean())


def _cell(image: np.ndarray, grid: np.ndarray) -> float:
    """Return the mean side in pixels of a patch in the image."""
    return (image.shape[0] / grid.shape[0] + image.shape[1] / grid.shape[1]) / 2
