"""Attention masks as segmentations (Fig. 4, Appendix D).

A mask holds the fewest patches with 60 % of the [CLS] token's attention. For each object, the Jaccard similarity of the
best head counts; it is averaged over the objects of an image, then over images. Next to it, that of the heads' mean.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from dino_ssl import distributed
from dino_ssl.data.benchmarks.voc import Masked, open_voc
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.masks import BACKGROUND, VOID
from dino_ssl.data.sources import DatasetSource, open_annotated
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
from dino_ssl.evals.label_propagation import resize_nearest
from dino_ssl.models.backbone import Backbone

UNREADABLE = -1  # object number of an image that cannot be read


def jaccard(masks: np.ndarray, annotation: np.ndarray, number: int) -> np.ndarray:
    """Return intersection over union in pixels with an object, void excluded: bool [masks, h, w] -> [masks].

    Masks are enlarged to the annotation, uint8 [H, W]: a pixel belongs to the patch that contains its center.
    """
    large = np.stack([resize_nearest(mask, *annotation.shape) for mask in masks]) & (annotation != VOID)
    inside = annotation == number
    return (large & inside).sum((1, 2)) / np.maximum((large | inside).sum((1, 2)), 1)


class ObjectScore(NamedTuple):
    """Jaccard similarity of one object with the masks of one attention mass."""

    image: int
    object: int
    mass: float = 0.0
    area: float = 0.0  # fraction of the valid pixels
    best: float = 0.0  # Jaccard similarity of the best head
    mean: float = 0.0  # that of the mean over heads
    head: int = 0  # index of the best head


def object_scores(
    image: int, heads: np.ndarray, annotation: np.ndarray, masses: Sequence[float]
) -> Iterator[ObjectScore]:
    """Yield one score per mass and object: attention [heads, h, w], annotation uint8 [H, W]."""
    numbers = np.setdiff1d(annotation, (BACKGROUND, VOID)).tolist()
    maps = np.concatenate([heads, heads.mean(axis=0, keepdims=True)])
    for mass in masses:
        masks = top_mass_mask(maps.reshape(len(maps), -1), mass).reshape(maps.shape)
        for number in numbers:
            area = float((annotation == number).sum() / (annotation != VOID).sum())
            *by_head, mean = jaccard(masks, annotation, number).tolist()
            yield ObjectScore(image, number, mass, area, max(by_head), mean, int(np.argmax(by_head)))


def mean_over_images(scores: Sequence[ObjectScore], field: str) -> float:
    """Return the mean over the objects of each image, then over images, in percent."""
    by_image: dict[int, list[float]] = {}
    for score in scores:
        by_image.setdefault(score.image, []).append(getattr(score, field))
    return 100 * float(np.mean([np.mean(values) for values in by_image.values()]))


@dataclass(frozen=True, kw_only=True)
class AttentionMasks(Evaluation):
    """Jaccard similarity between objects and the masks of the [CLS] token's attention: no labels are used."""

    name: ClassVar[str] = "attention-masks"
    paper: ClassVar[str] = "Fig. 4; Appendix D, self-attention maps"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("VOC", "Folder of PASCAL VOC 2012 (VOC2012, or its parent VOCdevkit); `scenes` generates images."),
    )
    examples: ClassVar[str] = """\
  dino eval attention-masks dino_vits16 VOCdevkit/VOC2012
  dino eval attention-masks runs/photos scenes                   synthetic images with masks
  dino eval attention-masks dino_vits8 VOC2012 --mass 0.6"""

    mass: tuple[float, ...] = (0.6, 0.8)
    """Fractions of the attention that the masks hold: 0.6 in Fig. 4, 0.8 in Appendix D."""
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
            read_folder = partial(open_voc, split=self.split, progress=progress)
            dataset = open_annotated(source, read_folder, Masked, "masks", progress)
        return PreparedEval(
            name=self.name,
            data={"voc": {"images": len(dataset), "fingerprint": dataset.fingerprint}},
            score=lambda backbone: self._score(backbone, dataset, context),
            validate=require_attention,
        )

    def _score(self, backbone: Backbone, dataset: ImageDataset, context: EvalContext) -> Scores:
        """Return {"jaccard 60%": percent, ..., "mean of heads 60%": ...}, equal on every rank."""
        assert isinstance(dataset, Masked)
        size = self.size or attention_size(context.size)

        def read(index: int) -> tuple[np.ndarray, np.ndarray]:
            return dataset.mask(index), dataset.read(index)

        rows: list[ObjectScore] = []
        shard = range(distributed.rank(), len(dataset), distributed.world_size())
        with context.progress("attention maps") as progress:
            for done, index in enumerate(shard, 1):
                try:
                    annotation, image = read(index)
                    image = resize_to_patches(image, size, backbone.patch)
                    (heads,) = patch_attention(backbone, image, layer=self.layer, autocast=context.autocast)
                    rows += object_scores(index, heads, annotation, self.mass)
                except BadImage:
                    rows.append(ObjectScore(index, UNREADABLE))
                progress(done, len(shard))
        table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(ObjectScore._fields))
        rows = sorted(
            ObjectScore(int(image), int(number), *scores, head=int(head))
            for image, number, *scores, head in gather_rows(table, context.device).tolist()
        )
        skipped = [unreadable(dataset, row.image, read)._asdict() for row in rows if row.object == UNREADABLE]
        by_mass = {mass: [row for row in rows if row.mass == mass] for mass in self.mass}
        first = by_mass[self.mass[0]]
        if not first:
            unread = f"; {len(skipped)} cannot be read, for example {skipped[0]['name']}" if skipped else ""
            raise UserError(
                f"None of the {len(dataset)} images contains an object{unread}. Labels of objects are 1 to 254: 0 is "
                "background and 255 void, which is not scored, so write objects of masks of 0 and 255 as 1."
            )
        details = {
            "images with objects": len({row.image for row in first}),
            "objects": len(first),
            "mask of the whole image": mean_over_images(first, "area"),
            "per object": [
                row._asdict() | {"image": dataset.names[row.image]} for row in rows if row.object != UNREADABLE
            ],
            "skipped": skipped,
        }
        best = {f"jaccard {mass:.0%}": mean_over_images(part, "best") for mass, part in by_mass.items()}
        mean = {f"mean of heads {mass:.0%}": mean_over_images(part, "mean") for mass, part in by_mass.items()}
        return Scores(best | mean, details)
