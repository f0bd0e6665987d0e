"""Unsupervised object discovery and saliency, by the protocols of LOST and TokenCut.

CorLoc is the share of images in which the box of the found object overlaps with a true box at an intersection over
union of at least 0.5. Boxes: the network's input is the image at its own size, padded with zeros to whole patches at
the right and at the bottom, and boxes end with the image. Saliency: the image is resized to the nearest size of whole
patches, and the mask is enlarged to the size of the image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.benchmarks.objects import BenchmarkImages, Boxed, SalientImages, boxes_of, open_objects
from dino_ssl.data.benchmarks.voc import Masked
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.masks import BACKGROUND, VOID
from dino_ssl.data.sources import DatasetSource, folder_path, open_annotated
from dino_ssl.discovery.regions import box_of, largest_component
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.attention_maps import MAX_PATCHES, attention_size, network_input, resize_to_patches
from dino_ssl.evals.base import EvalContext, Evaluation, PreparedEval, Scores, Source
from dino_ssl.evals.features import gather_rows, unreadable
from dino_ssl.evals.object_masks import MaskMethod, ObjectMasks
from dino_ssl.models.backbone import Backbone

TITLES = {"lost": "LOST", "tokencut": "TokenCut", "maskcut": "MaskCut", "attention": "attention"}
PUBLISHED = {
    "VOC07": {"CorLoc LOST": 61.9, "CorLoc TokenCut": 68.8},
    "VOC12": {"CorLoc LOST": 64.0, "CorLoc TokenCut": 72.1},
    "COCO20k": {"CorLoc LOST": 50.7, "CorLoc TokenCut": 58.8},
    "ECSSD": {"IoU TokenCut": 71.2, "max F TokenCut": 80.3},
}
"""Published scores of the authors' DINO ViT-S/16, in percent."""
OVERLAP = 0.5
BETA_SQUARED = 0.3
"""Weight of the recall in the F of saliency."""
METRICS = ("CorLoc", "IoU", "accuracy", "max F")


def box_iou(box: Sequence[float], boxes: np.ndarray) -> np.ndarray:
    """Return intersection over union of a box with others: [4], [n, 4] -> [n]."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    intersection = (high - low).clip(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return intersection / ((box[2] - box[0]) * (box[3] - box[1]) + areas - intersection)


def saliency(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Return (IoU, accuracy, F) of bool masks. A mask of two levels has one F, which is the largest over thresholds."""
    both, either = (mask & truth).sum(), (mask | truth).sum()
    precision = both / mask.sum() if mask.any() else 1.0
    recall = both / truth.sum() if truth.any() else 1.0
    weighted = BETA_SQUARED * precision + recall
    f = (1 + BETA_SQUARED) * precision * recall / weighted if weighted else 0.0
    return float(both / either) if either else 1.0, float((mask == truth).mean()), float(f)


@dataclass(frozen=True)
class View:
    """The network's input of an image, and the way back from the grid of patches."""

    input: Tensor  # [1, 3, H, W], normalized
    to_mask: Callable[[np.ndarray], np.ndarray]
    """Mask on the grid [h, w] -> at the size of the image."""
    to_box: Callable[[np.ndarray], tuple[float, ...]]
    """Mask on the grid -> box in pixels of the image."""


def padded_view(backbone: Backbone, image: np.ndarray) -> View:
    """Return the image at its own size, padded with zeros after the normalization."""
    height, width = image.shape[:2]
    patch = backbone.patch
    pixels = network_input(backbone, image[None])

    def to_mask(mask: np.ndarray) -> np.ndarray:
        return mask.repeat(patch, 0).repeat(patch, 1)[:height, :width]

    padded = F.pad(pixels, (0, -width % patch, 0, -height % patch))
    return View(padded, to_mask, lambda mask: box_of(mask, patch, (height, width)))


def resized_view(backbone: Backbone, image: np.ndarray, size: int | None) -> View:
    """Return the image at the nearest size of whole patches, or with a short side of about `size`."""
    height, width = image.shape[:2]
    if size is None:
        rows, columns = (max(1, round(side / backbone.patch)) for side in (height, width))
        shape = columns * backbone.patch, rows * backbone.patch
        resized = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS))
    else:
        resized = resize_to_patches(image, size, backbone.patch)

    def to_mask(mask: np.ndarray) -> np.ndarray:
        large = F.interpolate(torch.from_numpy(mask).float()[None, None], size=(height, width), mode="nearest")
        return large[0, 0].bool().numpy()

    return View(network_input(backbone, resized[None]), to_mask, lambda mask: box_of(to_mask(mask)))


@dataclass(frozen=True, kw_only=True)
class ObjectDiscovery(Evaluation):
    """Discovery of objects without labels by LOST and TokenCut: CorLoc of their boxes, or saliency of their masks.

    Next to the scores are those of the box in the center with half of the area, and on published sets those of the
    authors' DINO ViT-S/16.
    """

    name: ClassVar[str] = "object-discovery"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "DATA",
            "Folder of PASCAL VOC 2007 or 2012 (with boxes or masks), COCO 20k, ECSSD, DUTS or DUT-OMRON; `scenes` "
            "generates images.",
        ),
    )
    examples: ClassVar[str] = """\
  dino eval object-discovery dino_vits16 VOCdevkit/VOC2007         published: LOST 61.9, TokenCut 68.8
  dino eval object-discovery dino_vits16 VOCdevkit/VOC2012         published: LOST 64.0, TokenCut 72.1
  dino eval object-discovery dino_vits16 ECSSD/ --methods tokencut    published: IoU 71.2, max F 80.3
  dino eval object-discovery runs/photos scenes --center           synthetic images with masks"""

    methods: tuple[MaskMethod, ...] = ("lost", "tokencut")
    """Methods to compare: lost, tokencut, maskcut (its first object), attention (its largest region)."""
    split: str = "trainval"
    """List of PASCAL VOC in ImageSets/Main, or val in ImageSets/Segmentation for masks."""
    size: int | None = None
    """Short side of the input in pixels. Default: the image's own size as published; of synthetic images 480, or twice
    a training size below 224."""
    layer: int = -1
    """Block whose keys or attention are used."""
    tau: float | None = None
    """Cosine above which two patches are similar; default: 0.2 for tokencut, 0.15 for maskcut."""
    center: bool = False
    """Subtract the mean over the patches of the image from the keys."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("`methods` needs at least one, for example tokencut.")
        check_range(self, "size", least=1)
        self.finders()

    def finders(self) -> dict[str, ObjectMasks]:
        """Return the settings of each method by its title."""
        settings = dict(layer=self.layer, tau=self.tau, center=self.center, objects=1)
        return {TITLES[method]: ObjectMasks(method=method, **settings) for method in self.methods}  # pyright: ignore

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open images with boxes or masks."""
        (source,) = sources
        with context.progress("reading the dataset") as progress:
            read_folder = partial(open_objects, split=self.split, progress=progress)
            dataset = open_annotated(source, read_folder, Boxed | Masked, "boxes or masks", progress)
        settings = self
        if folder_path(source) is None and self.size is None:
            settings = replace(self, size=attention_size(context.size))
        benchmark = dataset.benchmark if isinstance(dataset, BenchmarkImages) else ""
        references = {"center_box": lambda: settings._score(None, dataset, context)}
        if benchmark in PUBLISHED:
            references["published"] = lambda: Scores(PUBLISHED[benchmark])
        return PreparedEval(
            name=self.name,
            data={"images": {"images": len(dataset), "benchmark": benchmark, "fingerprint": dataset.fingerprint}},
            score=lambda backbone: settings._score(backbone, dataset, context),
            references=references,
        )

    def _score(self, backbone: Backbone | None, dataset: ImageDataset, context: EvalContext) -> Scores:
        """Return {"CorLoc LOST": percent, ...}, equal on every rank; of the box in the center without a network."""
        rows: list[list[float]] = []
        shard = range(distributed.rank(), len(dataset), distributed.world_size())
        finders = self.finders()
        with context.progress("objects") as progress:
            for done, index in enumerate(shard, 1):
                try:
                    values = self._measure(backbone, dataset, index, finders, context)
                except BadImage:
                    values = np.full((len(finders), len(METRICS)), math.inf)
                rows.append([index, *values.ravel().tolist()])
                progress(done, len(shard))
        table = gather_rows(torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1), context.device)
        table = table[table[:, 0].argsort()]
        unread = table[:, 1].isinf()
        skipped = [unreadable(dataset, int(index))._asdict() for index in table[unread, 0]]
        values = table[~unread, 1:].unflatten(1, (len(finders), len(METRICS)))
        scores = {}
        for metric, column in zip(METRICS, values.unbind(2), strict=True):
            for title, single in zip(finders, column.unbind(1), strict=True):
                if len(valid := single[~single.isnan()]):
                    scores[f"{metric} {title}"] = 100 * float(valid.mean())
        if not scores:
            raise UserError(f"None of the {len(dataset)} images contains an object and can be read.")
        return Scores(scores, {"skipped": skipped})

    def _measure(
        self,
        backbone: Backbone | None,
        dataset: ImageDataset,
        index: int,
        finders: dict[str, ObjectMasks],
        context: EvalContext,
    ) -> np.ndarray:
        """Return the METRICS of each method, [methods, 4]; nan for those that the dataset does not define."""
        has_boxes = not isinstance(dataset, SalientImages)
        boxes = boxes_of(dataset, index) if has_boxes else np.zeros((0, 4))
        labels = dataset.mask(index) if isinstance(dataset, Masked) else None
        image = dataset.read(index)
        view = None if backbone is None else self._view(backbone, dataset.names[index], image, not has_boxes)
        result = np.full((len(finders), len(METRICS)), np.nan)
        for row, find in zip(result, finders.values(), strict=True):
            if backbone is None or view is None:
                mask, box = center_box(*image.shape[:2])
            else:
                with context.autocast():
                    coarse = find.find(backbone, view.input)[0].masks
                grid = [side // backbone.patch for side in view.input.shape[-2:]]
                coarse = coarse[0] if len(coarse) else np.ones(grid, bool)
                mask = view.to_mask(coarse)
                box = view.to_box(largest_component(coarse) if find.method == "attention" else coarse)
            if len(boxes):
                row[0] = box_iou(box, boxes).max() >= OVERLAP
            if labels is not None:
                valid = labels != VOID
                row[1:] = saliency(mask[valid], (labels != BACKGROUND)[valid])
        return result

    def _view(self, backbone: Backbone, name: str, image: np.ndarray, is_saliency: bool) -> View:
        if self.size is not None or is_saliency:
            view = resized_view(backbone, image, self.size)
        else:
            view = padded_view(backbone, image)
        patches = view.input.shape[-2] * view.input.shape[-1] // backbone.patch**2
        if patches > MAX_PATCHES:
            raise UserError(f"{name} has {patches} patches of {backbone.patch} px; expected {MAX_PATCHES}. Set `size`.")
        return view


def center_box(height: int, width: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return the box in the center with half of the area and the aspect ratio of the image, and its mask [H, W]."""
    margins = [round(side * (1 - math.sqrt(0.5)) / 2) for side in (height, width)]
    mask = np.zeros((height, width), bool)
    mask[margins[0] : height - margins[0], margins[1] : width - margins[1]] = True
    return mask, box_of(mask)
