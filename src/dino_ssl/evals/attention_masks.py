"""Attention masks as segmentations (Fig. 4, Appendix D).

A mask holds the fewest patches with 60 % of the [CLS] token's attention. For each object, the Jaccard similarity of the
best head counts; it is averaged over the objects of an image, then over images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from dino_ssl import distributed
from dino_ssl.data.benchmarks.voc import CLASSES, Kind, Masked, open_voc
from dino_ssl.data.dataset import BadImage, ImageDataset, Skipped
from dino_ssl.data.masks import BACKGROUND, VOID
from dino_ssl.data.sources import DatasetSource, folder_path, open_dataset
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.attention_maps import (
    attention_size,
    patch_attention,
    require_attention,
    resize_to_patches,
    top_mass_mask,
)
from dino_ssl.evals.base import EvalContext, Evaluation, PreparedEval, Scores, Source
from dino_ssl.evals.features import gather_rows, unreadable
from dino_ssl.models.backbone import Backbone

UNREADABLE = -1
"""Object number of an image that cannot be read."""


class PatchCounts(NamedTuple):
    """Pixels of an annotation, counted per patch."""

    objects: list[int]  # object numbers, ascending
    inside: np.ndarray  # [objects, h, w] int64: pixels of the object
    valid: np.ndarray  # [h, w] int64: pixels that are not void


def count_per_patch(annotation: np.ndarray, grid: tuple[int, int]) -> PatchCounts:
    """Count the pixels of an annotation, uint8 [H, W]; a pixel belongs to the patch that contains its center."""
    h, w = grid
    rows, columns = (
        (2 * np.arange(side) + 1) * n // (2 * side) for side, n in zip(annotation.shape, grid, strict=True)
    )
    patch = (rows[:, None] * w + columns[None]).ravel()
    pixels = annotation.ravel()

    def count(selected: np.ndarray) -> np.ndarray:
        return np.bincount(patch[selected], minlength=h * w).reshape(h, w)

    objects = [int(value) for value in np.unique(pixels) if value not in (BACKGROUND, VOID)]
    inside = [count(pixels == value) for value in objects]
    return PatchCounts(objects, np.stack(inside) if inside else np.zeros((0, h, w), int), count(pixels != VOID))


def patch_jaccard(masks: np.ndarray, counts: PatchCounts) -> np.ndarray:
    """Return intersection over union in pixels, void excluded: bool [masks, h, w] -> [objects, masks].

    Patches are enlarged to the annotation; the annotation is not resized.
    """
    area = masks.reshape(len(masks), -1).astype(np.int64)
    inside = counts.inside.reshape(len(counts.objects), counts.valid.size)
    intersection = inside @ area.T
    union = inside.sum(axis=1)[:, None] + (area @ counts.valid.ravel())[None] - intersection
    return intersection / np.maximum(union, 1)


class ObjectScore(NamedTuple):
    """Jaccard similarity of one object with the masks of one attention mass."""

    image: int
    object: int
    area: float  # fraction of the valid pixels
    mass: float
    best: float  # Jaccard similarity of the best head
    head: int  # index of the best head
    mean: float  # Jaccard similarity of the mask of the mean over heads


def object_scores(
    image: int, heads: np.ndarray, annotation: np.ndarray, masses: Sequence[float]
) -> Iterator[ObjectScore]:
    """Yield one score per mass and object: attention [heads, h, w], annotation uint8 [H, W]."""
    counts = count_per_patch(annotation, heads.shape[1:])  # type: ignore[arg-type]
    areas = counts.inside.sum(axis=(1, 2)) / max(int(counts.valid.sum()), 1)
    maps = np.concatenate([heads, heads.mean(axis=0, keepdims=True)])
    for mass in masses:
        scores = patch_jaccard(top_mass_mask(maps.reshape(len(maps), -1), mass).reshape(maps.shape), counts)
        for value, area, by_head in zip(counts.objects, areas, scores, strict=True):
            head = int(by_head[:-1].argmax())
            yield ObjectScore(image, value, float(area), mass, float(by_head[head]), head, float(by_head[-1]))


def mean_over_images(scores: Sequence[ObjectScore], field: str) -> float:
    """Return the mean over the objects of each image, then over images, in percent."""
    by_image: dict[int, list[float]] = {}
    for score in scores:
        by_image.setdefault(score.image, []).append(getattr(score, field))
    return 100 * float(np.mean([np.mean(values) for values in by_image.values()]))


@dataclass(frozen=True, kw_only=True)
class AttentionMasks(Evaluation):
    """Jaccard similarity between objects and the masks of the [CLS] token's attention; no labels are used."""

    name: ClassVar[str] = "attention-masks"
    paper: ClassVar[str] = "Fig. 4; Appendix D, self-attention maps"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("VOC", "Folder of PASCAL VOC 2012 (VOC2012, or its parent VOCdevkit); `scenes` generates images."),
    )
    examples: ClassVar[str] = """\
  dino eval attention-masks dino_vits16 VOCdevkit/VOC2012
  dino eval attention-masks runs/photos scenes                   synthetic images with masks
  dino eval attention-masks dino_vits8 VOC2012 --objects instance --mass 0.6"""

    mass: tuple[float, ...] = (0.6, 0.8)
    """Fractions of the attention that the masks hold: 0.6 in Fig. 4, 0.8 in Appendix D."""
    objects: Kind = "class"
    """An object is all pixels of a class in an image (SegmentationClass), or one instance (SegmentationObject)."""
    split: str = "val"
    """List in ImageSets/Segmentation."""
    layer: int = -1
    """Block of the attention: 0 is the first, -1 the last."""
    size: int | None = None
    """Short side of the input in pixels; default: 480, or twice a training size below 224."""

    def __post_init__(self) -> None:
        if not self.mass:
            raise UserError("`mass` needs at least one fraction of the attention, for example 0.6.")
        check_range(self, "mass", above=0, most=1)
        check_range(self, "size", least=1)

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open images with masks."""
        (source,) = sources
        with context.progress("reading the dataset") as progress:
            if (path := folder_path(source)) is None:
                dataset = open_dataset(source, progress, part="val")
            else:
                dataset = open_voc(path, split=self.split, kind=self.objects, progress=progress)
        if not isinstance(dataset, Masked):
            raise UserError(
                f"attention-masks expected images with masks; {type(dataset).__name__} has none. Give the folder of "
                "PASCAL VOC 2012, `scenes`, or a dataset with a method mask(i)."
            )
        return PreparedEval(
            name=self.name,
            data={"voc": {"images": len(dataset), "fingerprint": dataset.fingerprint}},
            score=lambda backbone: self._score(backbone, dataset, context),
            validate=require_attention,
        )

    def _score(self, backbone: Backbone, dataset: ImageDataset, context: EvalContext) -> Scores:
        """Return {"jaccard 60%": percent, ..., "jaccard 60% of the mean map": percent, ...}, equal on every rank."""
        assert isinstance(dataset, Masked)
        size = self.size or attention_size(context.size)
        rows: list[ObjectScore] = []
        shard = range(distributed.rank(), len(dataset), distributed.world_size())
        with context.progress("attention maps") as progress:
            for done, index in enumerate(shard, 1):
                try:
                    annotation = dataset.mask(index)
                    image = resize_to_patches(dataset.read(index), size, backbone.patch)
                    (heads,) = patch_attention(backbone, image, layer=self.layer, autocast=context.autocast)
                    rows += object_scores(index, heads, annotation, self.mass)
                except BadImage:
                    rows.append(ObjectScore(index, UNREADABLE, 0, 0, 0, 0, 0))
                progress(done, len(shard))
        gathered = _gather(rows, context.device)
        scores = [score for score in gathered if score.object != UNREADABLE]

        def read(index: int) -> None:
            dataset.mask(index)
            dataset.read(index)

        skipped = [unreadable(dataset, score.image, read) for score in gathered if score.object == UNREADABLE]
        if not scores:
            unread = f"; {len(skipped)} cannot be read, for example {skipped[0].name}" if skipped else ""
            raise UserError(f"None of the {len(dataset)} images contains an object{unread}.")
        by_mass = {f"jaccard {mass:.0%}": [s for s in scores if s.mass == mass] for mass in self.mass}
        best = {name: mean_over_images(group, "best") for name, group in by_mass.items()}
        mean = {f"{name} of the mean map": mean_over_images(group, "mean") for name, group in by_mass.items()}
        return Scores(best | mean, _details(by_mass, scores, dataset, skipped))


def _gather(rows: list[ObjectScore], device: torch.device) -> list[ObjectScore]:
    """Return the scores of all ranks, sorted."""
    tensor = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(ObjectScore._fields))
    return sorted(
        ObjectScore(int(image), int(value), area, mass, best, int(head), mean)
        for image, value, area, mass, best, head, mean in gather_rows(tensor, device).tolist()
    )


def _details(
    by_mass: dict[str, list[ObjectScore]],
    scores: Sequence[ObjectScore],
    dataset: ImageDataset,
    skipped: Sequence[Skipped],
) -> dict[str, Any]:
    first = next(iter(by_mass.values()))
    classes = CLASSES if getattr(dataset, "kind", None) == "class" else ()

    def row(score: ObjectScore) -> dict[str, Any]:
        label = classes[score.object] if score.object < len(classes) else score.object
        return score._asdict() | {"image": dataset.names[score.image], "object": label}

    return {
        "images with objects": len({score.image for score in first}),
        "objects": len(first),
        "mean over objects": {
            name: 100 * float(np.mean([score.best for score in group])) for name, group in by_mass.items()
        },
        "mask of the whole image": mean_over_images(first, "area"),
        "per object": [row(score) for score in scores],
        "skipped": [item._asdict() for item in skipped],
    }
