"""Image retrieval (Table 3): rank the images of the query's landmark first, on revisited Oxford and Paris.

The descriptor is the [CLS] token (the pooled feature of a ConvNet) of the image at its aspect ratio, at one scale or
averaged over three. Scores follow the revisited benchmarks (Radenovic et al., 2018).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.benchmarks.revisited import Landmarks, Truth, open_revisited
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import DatasetSource, described, folder_path, synthetic_scenes
from dino_ssl.data.synthetic.landmarks import synthetic_landmarks
from dino_ssl.data.transforms.native_size import scale_to, scaled
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, Evaluation, PreparedEval, Scores, Source
from dino_ssl.evals.features import ImageFeatures, extract_resized, raw_pixels, skipped_details
from dino_ssl.evals.ranking import average_precision, precision_at, remove_junk, sequential_mean, target_ranks
from dino_ssl.models.backbone import Backbone

SCALES = (1.0, 2**-0.5, 0.5)  # of multi-scale descriptors, from the authors' code
KAPPAS = (1, 5, 10)
PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Positives of each protocol, and rows that are removed from the ranking before it is scored."""
SYNTHETIC_QUERIES = 100  # of `scenes`


class ProtocolScores(NamedTuple):
    """Scores of a benchmark under one protocol, from 0 to 1."""

    mean_ap: float  # nan if no query has positives
    precision: tuple[float, ...]  # mean precision at each kappa
    ap: list[float | None]  # per query; None for a query without positives, which is not counted


def protocol_scores(ranks: Sequence[Truth], protocol: str, kappas: Sequence[int] = KAPPAS) -> ProtocolScores:
    """Return the scores for the ranks of each query's easy, hard and junk images."""
    aps: list[float | None] = []
    precisions: list[list[float]] = []
    for query in ranks:
        positives, junk = (
            np.sort(np.concatenate([getattr(query, kind) for kind in kinds])) for kinds in PROTOCOLS[protocol]
        )
        if not len(positives):
            aps.append(None)
            continue
        positives = remove_junk(positives, junk)
        aps.append(average_precision(positives, len(positives)))
        precisions.append([precision_at(positives, k) for k in kappas])
    precision = tuple(sequential_mean(column) for column in zip(*precisions, strict=True))
    return ProtocolScores(sequential_mean([ap for ap in aps if ap is not None]), precision, aps)


def multiscale(backbone: Backbone, images: Tensor, scales: Sequence[float] = SCALES) -> Tensor:
    """Return the mean feature over the scaled images, not normalized: [B, 3, H, W] -> [B, D]."""
    copies = (images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear") for scale in scales)
    return torch.stack([backbone(copy).float() for copy in copies]).sum(0) / len(scales)


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluation):
    """Landmark retrieval: mAP and mP@1, 5, 10 on revisited Oxford and Paris; easy, medium and hard protocols."""

    name: ClassVar[str] = "retrieval"
    paper: ClassVar[str] = "Table 3, Sec. 4.2.1"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("BENCHMARK", "Folder with gnd_*.pkl and jpg/, or its gnd file; `scenes` generates a small one."),
    )
    examples: ClassVar[str] = """\
  dino eval retrieval dino_vits16 roxford5k/                            Table 3, Oxford: 224 pixels, one scale
  dino eval retrieval dino_vits16 rparis6k/ --size 512 --multiscale     Table 3, Paris
  dino eval retrieval timm:resnet50 rparis6k/gnd_rparis6k.pkl --json
  dino eval retrieval runs/photos scenes                                no download"""

    size: int | None = None
    """Longest side of the input in pixels; smaller images are not enlarged. Default: the training size."""
    multiscale: bool = False
    """Average the features over three scales: 1, 1/sqrt(2) and 1/2."""
    query: Literal["box", "whole"] = "box"
    """Query by the landmark's box, as the benchmark defines, or by the whole image, as the authors' code does."""

    def __post_init__(self) -> None:
        check_range(self, "size", least=1)

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open the images and the ground truth of the benchmark."""
        (source,) = sources
        with context.progress("reading the benchmark") as progress:
            if scenes := synthetic_scenes(source, count=SYNTHETIC_QUERIES, part="test"):
                marks = synthetic_landmarks(scenes, progress)
            elif path := folder_path(source):
                marks = open_revisited(path, progress)
            else:
                raise UserError("Retrieval needs ground truth: expected the folder of a benchmark, or `scenes`.")
        queries = marks.boxed if self.query == "box" else marks.queries
        parts = (queries, marks.queries), (marks.database, marks.database)  # (images, the same without a crop)
        truth = {"benchmark": marks.name, "ground_truth": marks.ground_truth.fingerprint}
        return PreparedEval(
            name=self.name,
            data={"database": described(marks.database), "queries": described(marks.queries) | truth},
            score=lambda backbone: _score(marks, context, *(self._features(backbone, *p, context) for p in parts)),
            references={
                "raw_pixels": lambda: _score(marks, context, *(raw_pixels(part, context) for part, _ in parts))
            },
        )

    def _features(
        self, backbone: Backbone, dataset: ImageDataset, uncropped: ImageDataset, context: EvalContext
    ) -> ImageFeatures:
        """Extract the descriptors; a cropped query is scaled as its whole image would be."""
        scales = SCALES if self.multiscale else (1.0,)
        least = -int(-backbone.patch // min(scales))  # one patch at the smallest scale
        shapes = scaled(dataset.sizes, scale_to(uncropped.sizes, self.size or context.size), least)
        describe = partial(multiscale, backbone, scales=scales)
        width, key = backbone.embed_dim, f"cls at scales {scales}"
        return extract_resized(backbone, dataset, shapes, describe, width=width, key=key, context=context)


def _score(landmarks: Landmarks, context: EvalContext, queries: ImageFeatures, database: ImageFeatures) -> Scores:
    """Rank and score. Unreadable queries are skipped; unreadable database images rank last."""
    indices = queries.indices.tolist()
    truth = [landmarks.ground_truth.truth[q] for q in indices]
    rows, targets = database.every_row(len(landmarks.database)), [np.concatenate(kinds) for kinds in truth]
    with context.progress("ranking") as progress:
        ranks = target_ranks(queries.features, rows, targets, progress)
    cuts = [np.cumsum([len(part) for part in kinds])[:-1] for kinds in truth]
    by_kind = [Truth(*np.split(query, cut)) for query, cut in zip(ranks, cuts, strict=True)]
    scores = {protocol: protocol_scores(by_kind, protocol) for protocol in PROTOCOLS}
    scores = {protocol: score for protocol, score in scores.items() if any(ap is not None for ap in score.ap)}
    values = {f"mAP {protocol}": 100 * score.mean_ap for protocol, score in scores.items()}
    for protocol, score in scores.items():
        values |= {f"mP@{k} {protocol}": 100 * p for k, p in zip(KAPPAS, score.precision, strict=True)}
    names = [landmarks.queries.names[q] for q in indices]
    aps = {protocol: dict(zip(names, score.ap, strict=True)) for protocol, score in scores.items()}
    return Scores(values, {"AP": aps, "skipped": skipped_details(queries, database)})
