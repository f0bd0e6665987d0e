"""Attention as segmentation (Fig. 4, Appendix D): does a head's mask cover an object that nobody named?

A mask keeps the fewest patches that hold 60 % of the [CLS] token's attention. For every object the best of the heads
counts; their Jaccard similarity with the object is averaged over a picture's objects, then over the pictures.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import torch

from dino_ssl import distributed
from dino_ssl.data.benchmarks.voc import CLASSES, Kind, Masked, open_voc
from dino_ssl.data.dataset import BadImage, ImageDataset, Skipped
from dino_ssl.data.folder import Folder
from dino_ssl.data.masks import BACKGROUND, VOID
from dino_ssl.data.sources import WORDS, DatasetSource, open_dataset
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import UserError
from dino_ssl.evals.base import Autocast, EvalContext, Scores, Source, evaluating
from dino_ssl.models.backbone import Attentive, Backbone

MAX_PATCHES = 10_000
"""Attention between all pairs of so many patches takes 2.4 GB at six heads."""
UNREADABLE = -1
"""Stands for the object's number where a picture or its mask cannot be read."""

# -- what the network sees, and what it attends to ---------------------------------------------------------


def size_to_look_at(trained: int) -> int:
    """Short side for attention maps: the authors' 480, or twice the training side of a network below 224."""
    return 480 if trained >= 224 else min(480, 2 * trained)


def resize_to_patches(image: np.ndarray, size: int, patch: int) -> np.ndarray:
    """The whole picture with its short side about `size`, and both sides multiples of `patch`.

    The authors crop the rest that is no whole patch; here each side is scaled to the nearest multiple, so
    that the maps cover all of the picture.
    """
    height, width = image.shape[:2]
    scale = size / min(height, width)
    rows, columns = (max(1, round(side * scale / patch)) for side in (height, width))
    if rows * columns > MAX_PATCHES:
        raise UserError(
            f"A {width} x {height} picture at short side {size} is {columns} x {rows} patches of {patch}, "
            f"and at most {MAX_PATCHES} can be shown.\nTake a smaller size, or crop the picture."
        )
    shrinks = rows * patch < height
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (columns * patch, rows * patch), interpolation=interpolation)


def attentive(backbone: Backbone) -> Attentive:
    """The network, which has attention to read; UserError where it has none."""
    if not isinstance(backbone, Attentive):
        raise UserError(
            f"Attention maps were asked of {type(backbone).__name__}, which has no attention to read: "
            "expected a Vision Transformer.\nGive one, for example dino_vits16; a ConvNet such as ResNet has none."
        )
    return backbone


def patch_attention(
    backbone: Backbone,
    picture: np.ndarray,
    queries: Sequence[int | None] = (None,),
    *,
    layer: int = -1,
    autocast: Autocast = nullcontext,
) -> np.ndarray:
    """What [CLS] (None) or the patch of a number, row by row, attends to: [queries, heads, h, w] float32.

    picture: uint8 [h patch, w patch, 3] RGB. layer: 0 is the first block, -1 the last. The keys are the patches
    alone: the class token and registers are left out, and what is left does not sum to 1.
    """
    backbone = attentive(backbone)
    blocks = backbone.num_blocks
    if not -blocks <= layer < blocks:
        raise UserError(f"layer must lie in {-blocks} .. {blocks - 1} for a network of {blocks} blocks, not {layer}.")
    extra = 1 + backbone.registers
    tokens = [0 if query is None else extra + query for query in queries]
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1))[None]
    with evaluating(backbone):
        device = next(backbone.parameters()).device
        with autocast():
            weights = backbone.attention(normalize(torch.from_numpy(planes).to(device)), layer)
        rows = weights[0][:, tokens, extra:].float().transpose(0, 1).cpu().numpy()
    grid = (picture.shape[0] // backbone.patch, picture.shape[1] // backbone.patch)
    return rows.reshape(*rows.shape[:2], *grid)


def top_mass_mask(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """Which of N patches hold `mass` of the attention (Fig. 4). [..., N] -> bool [..., N]

    Patches are taken from the most to the least attended, and those go that together weigh 1 - mass or less.
    So at least `mass` is kept, and always one patch. Between equal patches the later ones are kept first.
    """
    if not 0 < mass <= 1:
        raise UserError(f"the mass to keep must lie above 0 and not above 1, e.g. 0.6; received {mass}.")
    order = np.argsort(attention, axis=-1, kind="stable")
    ascending = np.take_along_axis(attention, order, axis=-1)
    total = ascending.sum(axis=-1, keepdims=True)
    share = ascending / np.where(total > 0, total, 1)
    kept = np.cumsum(share, axis=-1) > 1 - mass
    kept[..., -1] = True  # rounding must not empty a mask
    mask = np.empty_like(kept)
    np.put_along_axis(mask, order, kept, axis=-1)
    return mask


# -- masks against objects ---------------------------------------------------------------------------------


class PatchCounts(NamedTuple):
    """An annotation seen through the grid of patches: how many of each patch's pixels are what."""

    objects: list[int]  # the numbers in the annotation, ascending
    inside: np.ndarray  # [objects, h, w] int64: pixels of the object
    counted: np.ndarray  # [h, w] int64: pixels that are not void


def cells_of(annotation: np.ndarray, grid: tuple[int, int]) -> PatchCounts:
    """uint8 [H, W] -> `PatchCounts`. A pixel belongs to the patch its middle lies in, as in nearest upsampling."""
    h, w = grid
    rows, columns = (
        (2 * np.arange(side) + 1) * n // (2 * side) for side, n in zip(annotation.shape, grid, strict=True)
    )
    patch = (rows[:, None] * w + columns[None]).ravel()
    flat = annotation.ravel()

    def count(which: np.ndarray) -> np.ndarray:
        return np.bincount(patch[which], minlength=h * w).reshape(h, w)

    objects = [int(value) for value in np.unique(flat) if value not in (BACKGROUND, VOID)]
    inside = [count(flat == value) for value in objects]
    return PatchCounts(objects, np.stack(inside) if inside else np.zeros((0, h, w), int), count(flat != VOID))


def jaccard(masks: np.ndarray, cells: PatchCounts) -> np.ndarray:
    """Intersection over union, in pixels that are not void: bool [masks, h, w] -> [objects, masks] in 0 .. 1.

    The masks' patches are squares over the picture as it was annotated, so nothing of the annotation is resized.
    """
    area = masks.reshape(len(masks), -1).astype(np.int64)
    inside = cells.inside.reshape(len(cells.objects), cells.counted.size)
    both = inside @ area.T  # [objects, masks]
    either = inside.sum(axis=1)[:, None] + (area @ cells.counted.ravel())[None] - both
    return both / np.maximum(either, 1)


class ObjectScore(NamedTuple):
    """How well the masks of one share of the mass cover one object."""

    picture: int
    object: int
    area: float  # share of the pixels that count
    mass: float
    best: float  # Jaccard of the best head
    head: int  # which head that was
    mean: float  # Jaccard of the mask of the mean over heads: nobody chose


def object_scores(
    picture: int, heads: np.ndarray, annotation: np.ndarray, masses: Sequence[float]
) -> Iterator[ObjectScore]:
    """heads [heads, h, w] float, annotation uint8 [H, W] -> one score per object and mass; none without objects."""
    cells = cells_of(annotation, heads.shape[1:])  # type: ignore[arg-type]
    areas = cells.inside.sum(axis=(1, 2)) / max(int(cells.counted.sum()), 1)
    maps = np.concatenate([heads, heads.mean(axis=0, keepdims=True)])
    for mass in masses:
        scores = jaccard(top_mass_mask(maps.reshape(len(maps), -1), mass).reshape(maps.shape), cells)
        for value, area, of_heads in zip(cells.objects, areas, scores, strict=True):
            head = int(of_heads[:-1].argmax())
            yield ObjectScore(picture, value, float(area), mass, float(of_heads[head]), head, float(of_heads[-1]))


def over_pictures(scores: Sequence[ObjectScore], field: str) -> float:
    """The mean over a picture's objects, then over the pictures that have an object, in percent."""
    dataset: dict[int, list[float]] = {}
    for score in scores:
        dataset.setdefault(score.picture, []).append(getattr(score, field))
    return 100 * float(np.mean([np.mean(values) for values in dataset.values()]))


# -- the evaluation ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionMasks:
    """How well the masks of the [CLS] token's attention cover objects, with no label seen: Jaccard similarity."""

    name: ClassVar[str] = "attention-masks"
    paper: ClassVar[str] = "Fig. 4; Appendix D, self-attention maps"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("voc", "Folder of PASCAL VOC 2012 (VOC2012, or the VOCdevkit around it); `scenes` draws pictures."),
    )
    examples: ClassVar[str] = """\
  dino eval attention-masks dino_vits16 VOCdevkit/VOC2012
  dino eval attention-masks runs/photos scenes                   pictures with masks that dino draws itself
  dino eval attention-masks dino_vits8 VOC2012 --objects instance --mass 0.6"""

    mass: tuple[float, ...] = (0.6, 0.8)
    """Shares of the attention that the masks keep: 0.6 in Fig. 4, 0.8 in Appendix D."""
    objects: Kind = "class"
    """An object is all that is of one class in a picture (SegmentationClass), or one instance (SegmentationObject)."""
    split: str = "val"
    """The list in ImageSets/Segmentation."""
    layer: int = -1
    """Block whose attention is read: 0 the first, -1 the last."""
    size: int | None = None
    """Short side in pixels of what the network sees; 480, or twice what it was trained on where that is below 224."""

    def bind(self, sources: Sequence[DatasetSource], context: EvalContext) -> "BoundAttentionMasks":
        if not self.mass:
            raise UserError("attention-masks needs a share of the attention to keep: --mass 0.6, or --mass 0.6 0.8.")
        for mass in self.mass:
            top_mass_mask(np.ones(1), mass)  # says what is wrong with it
        (source,) = sources
        if isinstance(source, ImageDataset | Scenes) or str(source) in WORDS:
            dataset = open_dataset(source, part="val")
        else:
            with context.progress("looking at the pictures") as done:
                root = source.path if isinstance(source, Folder) else source
                dataset = open_voc(root, split=self.split, kind=self.objects, progress=done)
        if not isinstance(dataset, Masked):
            raise UserError(
                f"attention-masks needs pictures with masks, and {type(dataset).__name__} has none: give the folder "
                "of PASCAL VOC 2012, `scenes`, or Pictures with a method mask(i)."
            )
        return BoundAttentionMasks(self, dataset, context)


@dataclass(frozen=True)
class BoundAttentionMasks:
    """An `Evaluator`: the settings with the pictures and the machine."""

    settings: AttentionMasks
    dataset: ImageDataset
    context: EvalContext
    name: str = AttentionMasks.name

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        return {"voc": {"images": len(self.dataset), "fingerprint": self.dataset.fingerprint}}

    def validate(self, backbone: Backbone) -> None:
        attentive(backbone)

    def __call__(self, backbone: Backbone) -> Scores:
        """{"jaccard 60%": percent, ..., "jaccard 60% of the mean map": percent, ...}, the same on every rank."""
        mine: list[ObjectScore] = []
        share = range(distributed.rank(), len(self.dataset), distributed.world_size())
        with self.context.progress("attention of pictures") as done:
            for count, index in enumerate(share, 1):
                try:
                    mine += self.of_picture(backbone, index)
                except BadImage:
                    mine.append(ObjectScore(index, UNREADABLE, 0, 0, 0, 0, 0))
                done(count, len(share))
        found = sorted(self._gathered(mine))
        scores = [score for score in found if score.object != UNREADABLE]
        bad = [self._why(score.picture) for score in found if score.object == UNREADABLE]
        if not scores:
            why = f"; {len(bad)} could not be read, the first: {bad[0].name}: {bad[0].reason}" if bad else ""
            raise UserError(f"None of the {len(self.dataset)} pictures has an object to cover{why}.")
        return Scores(self._numbers(scores), self._details(scores, bad))

    def of_picture(self, backbone: Backbone, index: int) -> list[ObjectScore]:
        """The scores of one picture's objects."""
        assert isinstance(self.dataset, Masked)
        settings = self.settings
        annotation = self.dataset.mask(index)
        picture = resize_to_patches(
            self.dataset.read(index), settings.size or size_to_look_at(self.context.size), backbone.patch
        )
        (heads,) = patch_attention(backbone, picture, layer=settings.layer, autocast=self.context.autocast)
        return list(object_scores(index, heads, annotation, settings.mass))

    def _why(self, index: int) -> Skipped:
        """The ranks tell each other which pictures cannot be read, not why: reading once more tells."""
        assert isinstance(self.dataset, Masked)
        try:
            self.dataset.mask(index)
            self.dataset.read(index)
        except BadImage as error:
            return Skipped(self.dataset.names[index], error.reason)
        return Skipped(self.dataset.names[index], "could not be read at first, could be later")

    def _gathered(self, mine: list[ObjectScore]) -> list[ObjectScore]:
        rows = torch.tensor(mine, dtype=torch.float64).reshape(len(mine), len(ObjectScore._fields))
        if distributed.world_size() > 1:
            rows = distributed.all_gather(rows.to(self.context.device)).cpu()
        return [
            ObjectScore(int(picture), int(value), area, mass, best, int(head), mean)
            for picture, value, area, mass, best, head, mean in rows.tolist()
        ]

    def _numbers(self, scores: Sequence[ObjectScore]) -> dict[str, float]:
        by_mass = {mass: [score for score in scores if score.mass == mass] for mass in self.settings.mass}
        best = {f"jaccard {mass:.0%}": over_pictures(those, "best") for mass, those in by_mass.items()}
        mean = {f"jaccard {mass:.0%} of the mean map": over_pictures(those, "mean") for mass, those in by_mass.items()}
        return best | mean

    def _details(self, scores: Sequence[ObjectScore], bad: Sequence[Skipped]) -> dict[str, Any]:
        first = [score for score in scores if score.mass == self.settings.mass[0]]
        names = CLASSES if getattr(self.dataset, "kind", None) == "class" else ()
        listed = [
            score._asdict()
            | {"picture": self.dataset.names[score.picture]}
            | ({"object": names[score.object]} if score.object < len(names) else {})
            for score in scores
        ]
        return {
            "pictures with objects": len({score.picture for score in first}),
            "objects": len(first),
            "over objects": {
                f"jaccard {mass:.0%}": 100 * float(np.mean([score.best for score in scores if score.mass == mass]))
                for mass in self.settings.mass
            },
            "a mask of everything": over_pictures(first, "area"),
            "per object": listed,
            "skipped": [item._asdict() for item in bad],
        }
