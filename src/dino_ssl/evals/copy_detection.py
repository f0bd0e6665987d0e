"""Copy detection (Table 4): rank the original of an edited image first among many other images; Copydays.

The descriptor is [CLS || GeM of the patches], whitened on a separate set of images. Shapes: B images, h x w patches,
D dimensions of the network's output, P of its patches, N descriptors, W = D + P.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.benchmarks.copydays import BLOCKS, Copies, distort, find_copies, make_copies
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import DatasetSource, described, folder_path, open_dataset, synthetic_scenes
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, Evaluation, PreparedEval, Scores, Source, evaluating
from dino_ssl.evals.features import ImageFeatures, extract_resized, raw_pixels, skipped_details
from dino_ssl.evals.ranking import average_precision, sequential_mean, target_ranks
from dino_ssl.models.backbone import Backbone

SCALES = (0.5, 0.7, 1.0, 1.4)
"""Sizes of multi-scale descriptors, relative to `size`."""
SYNTHETIC_ORIGINALS = 100
"""Number of originals that `scenes` generates, with 4 times as many distractors and 5 times as many for whitening."""


def gem(patches: Tensor, p: float = 4.0, floor: float = 1e-6) -> Tensor:
    """Generalized mean pooling (Radenovic et al., 2018): (mean of x^p)^(1/p), [B, h, w, P] -> [B, P].

    Values are clamped to at least `floor`. p = 1 is average pooling, p -> infinity max pooling.
    """
    return patches.float().clamp(min=floor).pow(p).mean((1, 2)).pow(1 / p)


def copy_descriptor(backbone: Backbone, images: Tensor, p: float = 4.0) -> Tensor:
    """Sec. 4.2.2: [CLS || GeM of the patches] of the last layer, [B, 3, H, W] -> [B, W]."""
    last = backbone.features(images)[-1]
    return torch.cat([last.cls.float(), gem(last.patches, p)], dim=1)


class Whitening(NamedTuple):
    """The map x -> (x - mean) basis, whose outputs are uncorrelated with unit variance."""

    mean: Tensor  # [W]
    basis: Tensor  # [W, d], columns by descending eigenvalue


def fit_whitening(x: Tensor, dimensions: int | None = None, *, center: bool = True) -> Whitening:
    """Return the PCA whitening of x [N, W]: eigenvectors of the covariance, divided by the square root of eigenvalues.

    Keeps `dimensions` components, at most as many as N descriptors determine. Eigenvalues are at least 1e-5 times
    the largest. center=False uses second moments about zero. (The authors' code subtracts the mean but uses
    second moments about zero, so its outputs are not exactly white.)
    """
    if len(x) < 2:
        raise UserError(f"A whitening needs at least 2 images; got {len(x)}.")
    x = x.double()
    mean = x.mean(0) if center else torch.zeros_like(x[0])
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))  # ascending
    count = min(dimensions or x.shape[1], x.shape[1], len(x) - center)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    smallest = max(1e-5 * values[0].item(), 1e-12)  # all eigenvalues of constant descriptors are 0
    return Whitening(mean, vectors * values.clamp(min=smallest).pow(-0.5))


def whiten(x: Tensor, whitening: Whitening) -> Tensor:
    """Apply a whitening: [N, W] -> [N, d], in the dtype of x."""
    return ((x.double() - whitening.mean) @ whitening.basis).to(x.dtype)


def copy_scores(ranks: Sequence[int], blocks: Sequence[tuple[str, str]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return mAP by block and by strength in percent, for each copy's rank of its original and (block, strength).

    A copy has one original, so its AP is 1 at rank 0 and 1 / (2 (r + 1)) at rank r.
    """
    by_block, by_strength = defaultdict(list), defaultdict(list)
    for rank, (block, strength) in zip(ranks, blocks, strict=True):
        ap = average_precision([rank], 1)
        by_block[block].append(ap)
        by_strength["/".join(filter(None, (block, strength)))].append(ap)
    return (
        {block: 100 * sequential_mean(by_block[block]) for block in BLOCKS if block in by_block},
        {strength: 100 * sequential_mean(by_strength[strength]) for strength in sorted(by_strength)},
    )


@dataclass(frozen=True, kw_only=True)
class CopyDetection(Evaluation):
    """Finding the original of an edited image: mAP of each block of Copydays; the paper reports strong."""

    name: ClassVar[str] = "copy-detection"
    paper: ClassVar[str] = "Table 4, Sec. 4.2.2"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("IMAGES", "Copydays, or any folder, of which some images are edited; `scenes` generates images."),
        Source("DISTRACTORS", "Folder of further distractors; `none`: no further ones.", required=False),
        Source("WHITENING", "Folder of other images that the whitening is fitted on.", required=False),
    )
    examples: ClassVar[str] = """\
  dino eval copy-detection dino_vitb16 copydays/ yfcc10k/ yfcc20k/                Table 4: 224 pixels
  dino eval copy-detection dino_vitb8 copydays/ yfcc10k/ yfcc20k/ --size 320
  dino eval copy-detection runs/photos photos/ none more_photos/ --multiscale     edited copies of your own images
  dino eval copy-detection runs/photos scenes                                     no download"""

    size: int | None = None
    """Side in pixels of the square that an image is resized to; default: the training size."""
    multiscale: bool = False
    """Also describe images at 0.5, 0.7 and 1.4 of the size, for networks that were trained on small crops: the paper's
    descriptor has one size."""
    gem: float = 4.0
    """Exponent of the generalized mean over the patches."""
    dimensions: int | None = None
    """Components of the whitening; default: all, or one fewer than it has images."""
    originals: int = 100
    """Images of a plain folder that are edited, at most half of them."""
    seed: int = 0
    """Seed of the selection of these images and of their edits."""

    def __post_init__(self) -> None:
        check_range(self, "size", "dimensions", "originals", least=1)
        check_range(self, "seed", least=0)
        check_range(self, "gem", above=0)

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open the datasets, and edit images if the folder is not a benchmark."""
        images, distractors, extra = (*sources, "none", "none")[:3]
        folders = [path.resolve() for source in sources if str(source) != "none" and (path := folder_path(source))]
        if len(set(folders)) < len(folders):
            raise UserError("Images, distractors and whitening images must differ; a folder is given twice.")
        with context.progress("reading the datasets") as progress:
            if scenes := synthetic_scenes(images, count=SYNTHETIC_ORIGINALS, part="test"):
                copies, whitening = synthetic_copies(scenes, self.seed)
            else:
                dataset, whitening = open_dataset(images, progress), None
                copies = find_copies(dataset) or make_copies(dataset, self.originals, self.seed)
            more = None if str(distractors) == "none" else open_dataset(distractors, progress, part="val")
            whitening = whitening if str(extra) == "none" else open_dataset(extra, progress)
        searched = [part for part in (copies.copies, copies.originals, copies.others, more) if part is not None]
        names: tuple[str, ...] = ("copies", "originals", "distractors", "distractors2")
        datasets = dict(zip(names, searched, strict=False)) | ({} if whitening is None else {"whitening": whitening})
        return PreparedEval(
            name=self.name,
            data={name: described(dataset) for name, dataset in datasets.items()},
            score=lambda backbone: self._score(backbone, copies, searched, whitening, context),
            references={
                "raw_pixels": lambda: _score(copies, [raw_pixels(d, context) for d in searched], searched, context)
            },
            size=self.size or context.size,
        )

    def _score(
        self,
        backbone: Backbone,
        copies: Copies,
        searched: Sequence[ImageDataset],
        whitening: ImageDataset | None,
        context: EvalContext,
    ) -> Scores:
        size, patch = self.size or context.size, backbone.patch
        scales = SCALES if self.multiscale else (1.0,)
        sides = [max(1, round(scale * size / patch)) * patch if self.multiscale else size for scale in scales]
        by_side = [self._descriptors(backbone, side, searched, whitening, context) for side in sides]
        by_dataset = zip(searched, zip(*by_side, strict=True), strict=True)
        features = [concatenated(parts, len(dataset)) for dataset, parts in by_dataset]
        return _score(copies, features, searched, context, is_whitened=whitening is not None)

    def _descriptors(
        self,
        backbone: Backbone,
        side: int,
        searched: Sequence[ImageDataset],
        whitening: ImageDataset | None,
        context: EvalContext,
    ) -> list[ImageFeatures]:
        """Return the descriptors of each dataset at one size, whitened if there are images for that."""
        describe, key = partial(copy_descriptor, backbone, p=self.gem), f"cls and gem {self.gem}"
        with evaluating(backbone):  # some ConvNets have another width in their patches
            width = describe(torch.zeros(1, 3, side, side, device=context.device)).shape[1]

        def descriptors(dataset: ImageDataset) -> ImageFeatures:
            shapes = np.full((len(dataset), 2), side)
            return extract_resized(backbone, dataset, shapes, describe, width=width, key=key, context=context)

        if whitening is None:
            return [descriptors(dataset) for dataset in searched]
        fit = fit_whitening(descriptors(whitening).features, self.dimensions)
        parts = (descriptors(dataset) for dataset in searched)
        return [part._replace(features=whiten(part.features, fit)) for part in parts]


def concatenated(parts: Sequence[ImageFeatures], count: int) -> ImageFeatures:
    """Return the descriptors of `count` images at several sizes as one each, to which every size contributes equally.

    An image that became unreadable meanwhile is skipped.
    """
    if len(parts) == 1:
        return parts[0]
    rows = torch.cat([F.normalize(part.every_row(count), dim=1) for part in parts], dim=1)
    return parts[-1]._replace(features=rows[parts[-1].indices])


def synthetic_copies(scenes: Scenes, seed: int = 0) -> tuple[Copies, ImageDataset]:
    """Return copies of synthetic images among distractors, and whitening images; no two sets share a scene."""
    n = scenes.count
    more = replace(scenes, part="train" if scenes.part == "test" else "test", count=10 * n).open()
    pages, others, whitening = (more.subset(range(*part)) for part in ((0, n), (n, 5 * n), (5 * n, 10 * n)))
    return distort(scenes.open(), pages, others, seed), whitening


def _score(
    copies: Copies,
    features: Sequence[ImageFeatures],
    datasets: Sequence[ImageDataset],
    context: EvalContext,
    *,
    is_whitened: bool = False,
) -> Scores:
    """Rank and score, given the features of the copies and of each dataset of the database.

    Unreadable copies are skipped; an unreadable original ranks last.
    """
    rows = [part.every_row(len(dataset)) for part, dataset in zip(features, datasets, strict=True)]
    indices = features[0].indices.tolist()
    originals = [copies.original_of[[q]] for q in indices]
    with context.progress("ranking") as progress:
        ranks = target_ranks(features[0].features, torch.cat(rows[1:]), originals, progress)
    ranks = [int(rank[0]) for rank in ranks]
    blocks, strengths = copy_scores(ranks, [copies.blocks[q] for q in indices])
    details = {
        "mAP by strength": strengths,
        "rank of the original": dict(zip([copies.copies.names[q] for q in indices], ranks, strict=True)),
        "whitened dimensions": features[0].features.shape[1] if is_whitened else None,
        "skipped": skipped_details(*features),
    }
    return Scores({f"mAP {block}": value for block, value in blocks.items()}, details)
