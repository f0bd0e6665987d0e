"""Instance search (Table 3): for a query, the pictures of the same landmark first; revisited Oxford and Paris.

The descriptor is the [CLS] token (the pooled feature of a ConvNet) of the picture at its own proportions, at one
scale or averaged over three. Scored as the revisited benchmarks are (Radenovic et al., 2018).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.benchmarks.revisited import Landmarks, Truth, open_revisited
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.sources import WORDS, DatasetSource, described
from dino_ssl.data.synthetic.dataset import SyntheticDataset
from dino_ssl.data.synthetic.landmarks import synthetic_landmarks
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.native_size import scale_to, scaled
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, Extracted, Scores, Source
from dino_ssl.evals.descriptors import describe, every_row, skipped_of
from dino_ssl.evals.pixels import raw_pixels_of
from dino_ssl.evals.ranking import average_precision, mean, places_of, precision_at, without
from dino_ssl.models.backbone import Backbone

SCALES = (1.0, 2**-0.5, 0.5)
"""Multi-scale, as the authors' code has it."""
KAPPAS = (1, 5, 10)
PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""What counts as right, and what is taken out of the ranking before it is scored: neither right nor wrong."""
DRAWN = 100
"""Pictures that the word `scenes` draws."""


class Protocol(NamedTuple):
    """A benchmark's scores under one of the protocols, each from 0 to 1."""

    mean_ap: float
    precision: tuple[float, ...]  # mean precision at each kappa
    ap: list[float | None]  # per query; None where it has no positives and does not count


def protocol_scores(places: Sequence[Truth], protocol: str, kappas: Sequence[int] = KAPPAS) -> Protocol:
    """Scores from the places (0 the best) at which each query's easy, hard and junk pictures stand."""
    right, ignored = PROTOCOLS[protocol]
    aps: list[float | None] = []
    precisions: list[list[float]] = []
    for query in places:
        positives, junk = (np.sort(np.concatenate([getattr(query, kind) for kind in k])) for k in (right, ignored))
        if not len(positives):
            aps.append(None)
            continue
        positives = without(positives, junk)
        aps.append(average_precision(positives, len(positives)))
        precisions.append([precision_at(positives, k) for k in kappas])
    counted = [ap for ap in aps if ap is not None]
    if not counted:
        return Protocol(float("nan"), tuple(float("nan") for _ in kappas), aps)
    return Protocol(mean(counted), tuple(mean(column) for column in zip(*precisions, strict=True)), aps)


def multiscale(backbone: Backbone, images: Tensor, scales: Sequence[float] = SCALES) -> Tensor:
    """[B, 3, H, W] -> [B, D]: the mean of the features of the images and of smaller copies, not normalised."""
    total = 0
    for scale in scales:
        seen = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        total = total + backbone(seen).float()
    assert isinstance(total, Tensor)
    return total / len(scales)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Landmark search: mAP and mP@1, 5, 10 under the easy, medium and hard protocols of revisited Oxford and Paris."""

    name: ClassVar[str] = "retrieval"
    paper: ClassVar[str] = "Table 3, Sec. 4.2.1"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "BENCHMARK",
            "Folder of a revisited benchmark (gnd_*.pkl and jpg/), or its gnd file; `scenes` draws a small one.",
        ),
    )
    examples: ClassVar[str] = """\
  dino eval retrieval dino_vits16 roxford5k/                            Table 3's Oxford: 224 pixels, one scale
  dino eval retrieval dino_vits16 rparis6k/ --size 512 --multiscale     Table 3's Paris
  dino eval retrieval timm:resnet50 rparis6k/gnd_rparis6k.pkl --json
  dino eval retrieval runs/photos scenes                                nothing to download"""

    size: int | None = None
    """Longest side in pixels of what the network sees, proportions kept; smaller pictures stay as they are. None: the
    side it was trained at."""
    multiscale: bool = False
    """Average the features over three scales: 1, 1/sqrt(2) and 1/2."""
    query: Literal["box", "whole"] = "box"
    """What is asked: the landmark's box, as the benchmark wants it, or the whole picture, as the authors' code does."""

    def __post_init__(self) -> None:
        check_range(self, "size", least=1)

    def bind(self, sources: Sequence[DatasetSource], context: EvalContext) -> "BoundRetrieval":
        (source,) = sources
        with context.progress("looking at the benchmark") as done:
            if str(source) in WORDS:
                source = replace(WORDS[str(source)], count=DRAWN, part="test")
            if isinstance(source, Scenes | SyntheticDataset):
                scenes = source.scenes if isinstance(source, SyntheticDataset) else source
                return BoundRetrieval(self, synthetic_landmarks(scenes, done), context)
            if isinstance(source, ImageDataset):
                raise UserError("Retrieval needs to know what is right: give the folder of a benchmark, or `scenes`.")
            return BoundRetrieval(
                self, open_revisited(source.path if isinstance(source, Folder) else source, done), context
            )


@dataclass(frozen=True)
class BoundRetrieval:
    """The evaluator: the settings with a benchmark, and where it works."""

    settings: Retrieval
    landmarks: Landmarks
    context: EvalContext
    name: str = "retrieval"

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        truth = {"benchmark": self.landmarks.name, "ground_truth": self.landmarks.ground_truth.fingerprint}
        return {"database": described(self.landmarks.database), "queries": described(self.landmarks.queries) | truth}

    @property
    def queries(self) -> ImageDataset:
        return self.landmarks.boxed if self.settings.query == "box" else self.landmarks.queries

    def __call__(self, backbone: Backbone) -> Scores:
        scales = SCALES if self.settings.multiscale else (1.0,)
        longest = self.settings.size or self.context.size
        least = -int(-backbone.patch // min(scales))  # one place of the spatial map at the smallest scale
        sides = []
        for dataset, whole in ((self.queries, self.landmarks.queries), (self.landmarks.database,) * 2):
            shapes = scaled(dataset.sizes, scale_to(whole.sizes, longest), least)  # a box shrinks as its picture does
            sides.append(
                describe(
                    backbone,
                    dataset,
                    shapes,
                    partial(multiscale, backbone, scales=scales),
                    width=backbone.embed_dim,
                    what=f"cls at scales {scales}",
                    context=self.context,
                )
            )
        return self._score(*sides)

    def pixel_reference(self) -> Scores:
        """The same search by raw pixels."""
        return self._score(*raw_pixels_of(self.queries, self.landmarks.database, context=self.context))

    def _score(self, queries: Extracted, database: Extracted) -> Scores:
        """A query that cannot be read is left out and named; a database picture that cannot be read stands last."""
        asked = queries.indices.tolist()
        truth = [self.landmarks.ground_truth.truth[q] for q in asked]
        with self.context.progress("search") as done:
            places = places_of(
                queries.features,
                every_row(database, len(self.landmarks.database)),
                [np.concatenate(lists) for lists in truth],
                progress=done,
            )
        cuts = [np.cumsum([len(part) for part in lists])[:-1] for lists in truth]
        split = [Truth(*np.split(one, cut)) for one, cut in zip(places, cuts, strict=True)]
        scores = {protocol: protocol_scores(split, protocol) for protocol in PROTOCOLS}
        scores = {protocol: score for protocol, score in scores.items() if any(ap is not None for ap in score.ap)}
        values = {f"mAP {name}": 100 * score.mean_ap for name, score in scores.items()}
        for name, score in scores.items():
            values |= {f"mP@{k} {name}": 100 * p for k, p in zip(KAPPAS, score.precision, strict=True)}
        names = [self.landmarks.queries.names[q] for q in asked]
        return Scores(
            values,
            {
                "AP": {name: dict(zip(names, score.ap, strict=True)) for name, score in scores.items()},
                "skipped": skipped_of(queries, database),
            },
        )
