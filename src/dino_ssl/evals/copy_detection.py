"""Copy detection (Table 4): the original of an edited picture first, among many pictures that it is not; Copydays.

The descriptor is [CLS || GeM of the patches], whitened on pictures of another set. Legend of the shapes: B pictures,
h x w places, D width of the network's vector, P of its patches, N descriptors, W = D + P.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.benchmarks.copydays import BLOCKS, Copies, distort, find_copies, make_copies
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import WORDS, DatasetSource, described, open_dataset
from dino_ssl.data.synthetic.dataset import SyntheticDataset
from dino_ssl.data.synthetic.scenes import PARTS, Scenes
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, Extracted, Scores, Source, evaluating
from dino_ssl.evals.descriptors import describe, every_row, skipped_of
from dino_ssl.evals.pixels import raw_pixels_of
from dino_ssl.evals.ranking import average_precision, mean, places_of
from dino_ssl.models.backbone import Backbone
from dino_ssl.progress import Progress

DRAWN = 100
"""Originals that the word `scenes` draws; four times as many others, and five times as many to whiten on."""
FIT_ROWS = 4096  # descriptors that are float64 at once while a whitening is fitted: 50 MB at 1536 wide


def gem(patches: Tensor, p: float = 4.0, floor: float = 1e-6) -> Tensor:
    """Generalised mean over the places (Radenovic et al., 2018): (mean of x^p)^(1/p), [B, h, w, P] -> [B, P].

    What lies below `floor` counts as that. p = 1 is the average of what is positive, p towards infinity the maximum.
    """
    return patches.float().clamp(min=floor).pow(p).mean((1, 2)).pow(1 / p)


def copy_descriptor(backbone: Backbone, images: Tensor, p: float = 4.0) -> Tensor:
    """[B, 3, H, W] -> [B, D + P]: [CLS || GeM of the patches] of the last layer (Sec. 4.2.2)."""
    last = backbone.features(images)[-1]
    return torch.cat([last.cls.float(), gem(last.patches, p)], dim=1)


class Whitening(NamedTuple):
    """x -> (x - mean) basis: decorrelated, of equal spread in every direction kept."""

    mean: Tensor  # [W]
    basis: Tensor  # [W, d], the columns by falling eigenvalue


def fit_whitening(
    x: Tensor,  # [N, W]
    dimensions: int | None = None,
    *,
    power: float = 0.5,
    floor: float = 1e-5,
    center: bool = True,
) -> Whitening:
    """PCA whitening: eigenvectors of the covariance, each over its eigenvalue^power; eigenvalues of at least
    floor times the largest. `dimensions`: how many are kept; None keeps all that N pictures can tell.

    center=False takes second moments about zero instead of the covariance. The authors' code mixes the two (it moves
    by the mean and decorrelates about zero), which whitens neither; this project moves and decorrelates alike.
    """
    if len(x) < 2:
        raise UserError(f"A whitening is learnt on many pictures; got {len(x)}.")
    center_of = x.double().mean(0) if center else x.new_zeros(x.shape[1], dtype=torch.float64)
    moments = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for rows in x.split(FIT_ROWS):
        rows = rows.double() - center_of
        moments += rows.T @ rows
    values, vectors = torch.linalg.eigh(moments / len(x))  # ascending
    kept = min(dimensions or x.shape[1], x.shape[1], len(x) - center)
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    smallest = max(floor * values[0].item(), 1e-12)  # of a network that gives one vector to everything, all are 0
    return Whitening(center_of, vectors * values.clamp(min=smallest).pow(-power))


def whiten(x: Tensor, whitening: Whitening) -> Tensor:
    """[N, W] -> [N, d], of the type of x."""
    parts = [(rows.double() - whitening.mean) @ whitening.basis for rows in x.split(FIT_ROWS)]
    return torch.cat(parts).to(x.dtype) if parts else x.new_zeros(0, whitening.basis.shape[1])


def copy_scores(places: Sequence[int], blocks: Sequence[tuple[str, str]]) -> tuple[dict[str, float], dict[str, float]]:
    """(mAP of each block, mAP of each strength within it), from 0 to 1, from the places of the copies' originals.

    A copy has one original, so its AP is 1 at place 0, and 1 / (2 (r + 1)) at place r.
    """
    whole, parts = defaultdict(list), defaultdict(list)
    for place, (block, strength) in zip(places, blocks, strict=True):
        ap = average_precision([place], 1)
        whole[block].append(ap)
        parts["/".join(filter(None, (block, strength)))].append(ap)
    order = [*(b for b in BLOCKS if b in whole), *sorted(b for b in whole if b not in BLOCKS)]
    return {block: mean(whole[block]) for block in order}, {part: mean(parts[part]) for part in sorted(parts)}


@dataclass(frozen=True, kw_only=True)
class CopyDetection:
    """Finding the original of an edited picture: mAP of each block of Copydays; the paper reports strong."""

    name: ClassVar[str] = "copy-detection"
    paper: ClassVar[str] = "Table 4, Sec. 4.2.2"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "PICTURES",
            "Copydays (original/, crops/*, jpeg/*, strong/), or any folder: copies of some of its pictures are made, "
            "and the others are what they must be told from; `scenes` draws pictures.",
        ),
        Source("DISTRACTORS", "Folder of pictures that nobody looks for; `none` without.", required=False),
        Source("WHITENING", "Folder of yet other pictures that a whitening is learnt on.", required=False),
    )
    examples: ClassVar[str] = """\
  dino eval copy-detection dino_vitb16 copydays/ yfcc10k/ yfcc20k/                Table 4: 224 pixels
  dino eval copy-detection dino_vitb8 copydays/ yfcc10k/ yfcc20k/ --size 320
  dino eval copy-detection runs/photos photos/ none more_photos/                  edited copies of your own pictures
  dino eval copy-detection runs/photos scenes                                     nothing to download"""

    size: int | None = None
    """Side in pixels of the square that a picture is resized to. None: the side the network was trained at."""
    gem: float = 4.0
    """Exponent of the generalised mean over the patches."""
    dimensions: int | None = None
    """Directions that the whitening keeps; None: all, or one fewer than there are pictures to learn it on."""
    whiten: bool = True
    """Whiten, where there are pictures to learn it on; `scenes` draws them."""
    originals: int = 100
    """Pictures of a plain folder that are edited; at most half of them."""
    seed: int = 0
    """Of the choice of these pictures, and of their edits."""

    def __post_init__(self) -> None:
        check_range(self, "size", "dimensions", "originals", least=1)
        check_range(self, "seed", least=0)
        check_range(self, "gem", above=0)

    def bind(self, sources: Sequence[DatasetSource], context: EvalContext) -> "BoundCopyDetection":
        given: list[DatasetSource | None] = [None if str(s) == "none" else s for s in sources]
        dataset, others, extra = [*given, None, None][:3]
        folders = [Path(s).expanduser().resolve() for s in given if isinstance(s, str | Path) and str(s) not in WORDS]
        if len(set(folders)) < len(folders):
            raise UserError("Copies, distractors and whitening must be different pictures; a folder is named twice.")
        with context.progress("looking at the pictures") as done:
            copies, whitening = self._copies(dataset, done)
            more = None if others is None else open_dataset(others, done, part="val")
            whitening = whitening if extra is None else open_dataset(extra, done)
        database = [copies.originals, *(p for p in (copies.others, more) if p is not None)]
        return BoundCopyDetection(self, copies, database, whitening if self.whiten else None, context)

    def _copies(self, source: DatasetSource | None, progress: Progress) -> tuple[Copies, ImageDataset | None]:
        """The copies, and pictures to whiten on where they are drawn."""
        if source is None:
            raise UserError("Copy detection needs pictures: Copydays, any folder, or `scenes`.")
        if str(source) in WORDS:
            source = replace(WORDS[str(source)], count=DRAWN, part="test")
        if isinstance(source, SyntheticDataset):
            source = source.scenes
        if isinstance(source, Scenes):
            return drawn_copies(source, self.seed)
        found = open_dataset(source, progress)
        return find_copies(found) or make_copies(found, self.originals, self.seed), None


def drawn_copies(scenes: Scenes, seed: int = 0) -> tuple[Copies, ImageDataset]:
    """Copies of drawn pictures among others, and yet others to whiten on; no two of these show the same scene."""
    part = PARTS.index(scenes.part)
    other, third = (PARTS[(part + step) % len(PARTS)] for step in (1, 2))
    pages = replace(scenes, part=other).open()
    others = replace(scenes, part=third, count=4 * scenes.count).open()
    whitening = replace(scenes, part=other, count=6 * scenes.count).open()
    return distort(scenes.open(), pages, others, seed), whitening.subset(np.arange(scenes.count, 6 * scenes.count))


@dataclass(frozen=True)
class BoundCopyDetection:
    """The evaluator: the settings with copies, what to find them among, and where it works."""

    settings: CopyDetection
    copies: Copies
    database: list[ImageDataset]
    """The originals, then sets of pictures that nobody looks for."""
    whitening: ImageDataset | None
    context: EvalContext
    name: str = "copy-detection"

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        names = ("originals", *(f"distractors{n}" for n in ["", *range(2, len(self.database))]))
        sides = {"copies": self.copies.copies} | dict(zip(names, self.database, strict=False))
        if self.whitening is not None:
            sides["whitening"] = self.whitening
        return {name: described(dataset) for name, dataset in sides.items()}

    def __call__(self, backbone: Backbone) -> Scores:
        side = self.settings.size or self.context.size
        of = partial(copy_descriptor, backbone, p=self.settings.gem)
        with evaluating(backbone):  # the patches of some ConvNets have a width of their own
            width = of(torch.zeros(1, 3, side, side, device=self.context.device)).shape[1]

        def descriptors(dataset: ImageDataset) -> Extracted:
            shapes, what = np.full((len(dataset), 2), side), f"cls and gem {self.settings.gem}"
            return describe(backbone, dataset, shapes, of, width=width, what=what, context=self.context)

        whitening = None
        if self.whitening is not None:
            whitening = fit_whitening(descriptors(self.whitening).features, self.settings.dimensions)
        return self._score(descriptors(self.copies.copies), [descriptors(p) for p in self.database], whitening)

    def pixel_reference(self) -> Scores:
        """The same search by raw pixels, not whitened."""
        copies, *database = raw_pixels_of(self.copies.copies, *self.database, context=self.context)
        return self._score(copies, database, None)

    def _score(self, copies: Extracted, database: Sequence[Extracted], whitening: Whitening | None) -> Scores:
        """A copy that cannot be read is left out and named; an original that cannot be read is never found."""
        rows = []
        for one, dataset in zip(database, self.database, strict=True):
            if whitening is not None:
                one = one._replace(features=whiten(one.features, whitening))
            rows.append(every_row(one, len(dataset)))
        queries = copies.features if whitening is None else whiten(copies.features, whitening)
        asked = copies.indices.tolist()
        sought = [self.copies.original_of[[q]] for q in asked]
        with self.context.progress("search") as done:
            places = [int(place[0]) for place in places_of(queries, torch.cat(rows), sought, progress=done)]
        blocks, strengths = copy_scores(places, [self.copies.blocks[q] for q in asked])
        return Scores(
            {f"mAP {block}": 100 * value for block, value in blocks.items()},
            {
                "mAP by strength": {name: 100 * value for name, value in strengths.items()},
                "place of the original": dict(zip([self.copies.copies.names[q] for q in asked], places, strict=True)),
                "whitened to": None if whitening is None else whitening.basis.shape[1],
                "skipped": skipped_of(copies, *database),
            },
        )
