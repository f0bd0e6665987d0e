"""Two-crop retrieval, a score without labels: is the nearest neighbor of a crop the other crop of the same image?

The task of instance discrimination (Wu et al., 2018), on images that were not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from dino_ssl.data.dataset import ImageDataset, derived_key
from dino_ssl.data.loader import sample_rng
from dino_ssl.data.sources import DatasetSource, described, open_dataset
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, Evaluation, PreparedEval, RunDatasets, Scores, Source
from dino_ssl.evals.features import ImageFeatures, extract_resized, raw_pixels, skipped_details
from dino_ssl.evals.ranking import target_ranks
from dino_ssl.feature_stats import effective_rank
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.heads import l2_normalize

VIEWS = MultiCrop(local=0, global_scale=(0.1, 0.4), jitter=0, gray=0, blur=(0, 0, 0), solarize=(0, 0, 0))
"""Crops of 10 to 40 % of the area, flipped with probability 0.5. Color jitter lowers the score of a network after short
training far below that of raw pixels, and raw pixels find larger crops (LOG.md)."""
MAX_IMAGES = 2000
"""Images that are compared: more cost time, and make the task harder."""


class CropPairs(ImageDataset):
    """Two random crops of each of N images, a function of (seed, image): 2 i and 2 i + 1 are crops of image i."""

    def __init__(self, source: ImageDataset, views: MultiCrop, seed: int) -> None:
        names = [f"{name}#{crop}" for name in source.names for crop in (1, 2)]
        super().__init__(names=names, sizes=np.full((len(names), 2), views.size))
        self.source, self.views, self.seed = source, views, seed
        self._last: tuple[int, list[np.ndarray]] = (-1, [])  # both crops of an image are read consecutively

    @property
    def content_key(self) -> str | None:
        """Key over the images and the settings of the crops."""
        return derived_key(self.source.content_key, repr((self.seed, self.views)).encode())

    def read(self, index: int) -> np.ndarray:
        """Return crop `index`, uint8 RGB [size, size, 3]."""
        image, crop = divmod(index, 2)
        if self._last[0] != image:
            width, height = self.source.sizes[image].tolist()
            pixels = self.source.read_downscaled(image, self.views.decode_scale(height, width))
            self._last = image, self.views(pixels, sample_rng(self.seed, 0, image))
        return self._last[1][crop]


@dataclass(frozen=True, kw_only=True)
class TwoCropRetrieval(Evaluation):
    """Retrieval without labels: is the nearest neighbor of a random crop the other crop of the same image?"""

    name: ClassVar[str] = "two-crop-retrieval"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("IMAGES", "Folder of images, or `scenes`; default: those that the run held out.", required=False),
    )
    examples: ClassVar[str] = """\
  dino eval two-crop-retrieval runs/photos                   the images that the run held out
  dino eval two-crop-retrieval runs/photos more_photos/      a flat folder is enough
  dino eval two-crop-retrieval dino_vits16 photos/ --json    a released network; scores as JSON
  dino eval two-crop-retrieval runs/photos scenes            no files needed"""

    size: int | None = None
    """Side of the crops in pixels; default: the size at which the run evaluates its network."""
    max_images: int = MAX_IMAGES
    """Maximum number of images, evenly spaced. Scores of different numbers are not comparable."""
    seed: int = 0
    """Seed of the crops."""

    def __post_init__(self) -> None:
        check_range(self, "size", least=1)
        check_range(self, "max_images", least=2)
        check_range(self, "seed", least=0)

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open the images."""
        if not sources:
            raise UserError(f"{self.name} expected IMAGES: the run held out none.")
        with context.progress("reading the dataset") as progress:
            dataset = open_dataset(sources[0], progress, part="val")
        return self.prepare_dataset(dataset, context)

    def run_sources(self, run: RunDatasets) -> tuple[ImageDataset, ...]:
        """Return the validation set, if the run has one."""
        return () if run.val is None else (run.val,)

    def prepare_dataset(self, dataset: ImageDataset, context: EvalContext) -> PreparedEval:
        """Prepare the evaluation of at most `max_images` images. Raises UserError for fewer than two."""
        if len(dataset) < 2:
            raise UserError(f"Two-crop retrieval expected at least 2 images, got {len(dataset)}.")
        images = dataset.evenly_spaced(self.max_images)
        side = self.size or context.size
        crops = CropPairs(images, replace(VIEWS, global_size=side), self.seed)
        shapes = np.full((len(crops), 2), side)

        def features(backbone: Backbone) -> ImageFeatures:
            width = backbone.embed_dim
            return extract_resized(backbone, crops, shapes, backbone, width=width, key="cls", context=context)

        return PreparedEval(
            name=self.name,
            data={"images": described(images)},
            score=lambda backbone: two_crop_scores(features(backbone)),
            references={"raw_pixels": lambda: two_crop_scores(raw_pixels(crops, context))},
            size=side,
        )


def two_crop_scores(crops: ImageFeatures) -> Scores:
    """Return the percentage of crops whose image ranks first, and among the first five, and the effective rank.

    Each crop is a query among the other crops of all N images, so chance is 100 / N and 500 / N percent. Images of
    which a crop could not be read are ignored.
    """
    features = crops.features[torch.isin(crops.indices ^ 1, crops.indices)]  # rows 2 i and 2 i + 1 are of one image
    first, second = features[0::2], features[1::2]
    targets = list(np.arange(len(first))[:, None])
    ranks = np.concatenate([*target_ranks(first, second, targets), *target_ranks(second, first, targets)])
    hits = {f"two-crop retrieval{suffix}": 100 * float((ranks < n).mean()) for n, suffix in ((1, ""), (5, " top-5"))}
    rank = float(effective_rank(l2_normalize(features)))
    return Scores(hits | {"effective rank": rank}, {"skipped": skipped_details(crops)})
