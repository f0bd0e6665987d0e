"""Video object segmentation without training (Table 5).

The first mask is propagated from frame to frame by the similarity of a frozen network's last feature map.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl.data.benchmarks.davis import open_davis
from dino_ssl.data.clips import Clip, SyntheticClip
from dino_ssl.data.masks import write_mask
from dino_ssl.data.sources import DatasetSource, folder_path, synthetic_scenes
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, Evaluation, PreparedEval, Scores, Source, evaluating
from dino_ssl.evals.davis_score import score_clips
from dino_ssl.evals.label_propagation import input_size, label_map, one_hot, propagate, resize_nearest
from dino_ssl.models.backbone import Backbone, Features

SIZE = 480  # short side in pixels: DAVIS-2017 "480p"
SYNTHETIC_CLIPS, SYNTHETIC_FRAMES = 8, 24
SYNTHETIC_SIZE = 192  # minimum; at smaller sizes, J mostly measures the coarseness of the patch grid


def segment(
    backbone: Backbone,
    frames: Iterable[np.ndarray],
    mask: np.ndarray,
    settings: "VideoSegmentation",
    context: EvalContext,
) -> Iterator[np.ndarray]:
    """Yield the label map, uint8 [H, W], of every frame after the first, given all frames and the first label map.

    Frames, uint8 [H, W, 3], are read one at a time. The caller sets eval mode: `with evaluating(backbone)`.
    """
    height, width = mask.shape
    size = input_size(height, width, size=settings.size or SIZE, patch=backbone.patch, multiple=settings.multiple)

    resize = cv2.INTER_AREA if 2 * size[0] < height else cv2.INTER_LINEAR  # bilinear in the published code

    def features() -> Iterator[Tensor]:
        for image in frames:
            if image.shape[:2] != (height, width):
                raise UserError(
                    f"expected one size for all frames and masks of a video; a frame is {image.shape[1]} x "
                    f"{image.shape[0]} pixels, and the first mask {width} x {height}."
                )
            pixels = torch.from_numpy(cv2.resize(image, size[::-1], interpolation=resize)).permute(2, 0, 1)[None]
            with context.autocast():
                yield backbone.features(backbone.transform.normalize(pixels.to(context.device)))[0].patches[0]

    maps = features()
    first = next(maps, None)
    if first is None:
        return
    numbers, first_labels = one_hot(mask, *first.shape[:2])
    soft_labels = propagate(
        chain([first], maps),
        first_labels.to(first.device),
        context=settings.context,
        radius=settings.radius,
        top_k=settings.top_k,
        temperature=settings.temperature,
    )
    for soft in soft_labels:
        yield resize_nearest(numbers[label_map(soft, *size)], height, width)


@dataclass(frozen=True, kw_only=True)
class VideoSegmentation(Evaluation):
    """Segmentation of the objects of DAVIS-2017 from their first mask: J&F of frozen features, without training.

    Recall is the fraction of frames above 0.5, decay the loss from the first to the last quarter of the frames.
    """

    name: ClassVar[str] = "video-segmentation"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("DAVIS", "Folder of DAVIS-2017 (ImageSets, JPEGImages, Annotations); `scenes` generates videos."),
    )
    paper: ClassVar[str] = "Table 5; protocol of Jabri et al., 2020"
    examples: ClassVar[str] = """\
  dino eval video-segmentation dino_vits8 DAVIS/                  Table 5: 69.9 on all of val
  dino eval video-segmentation runs/photos DAVIS/ -o out          masks in out/video-segmentation/
  dino eval video-segmentation runs/photos scenes                 synthetic videos
  dino eval video-segmentation --score out/video-segmentation DAVIS/ --json"""

    split: str = "val"
    """List in ImageSets/2017."""
    size: int | None = None
    """Short side of the input in pixels; default: 480; for synthetic videos 192, or twice the training size."""
    multiple: int = 64
    """The long side is rounded down to a multiple of this, if that is a multiple of the patch."""
    context: int = 7
    """Preceding frames that labels are propagated from, in addition to the first."""
    radius: int = 12
    """Labels are propagated from positions at most this far away, horizontally and vertically; 0: from all."""
    top_k: int = 5
    """Number of most similar positions whose labels are averaged."""
    temperature: float = 0.1
    """Temperature of their weights exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        check_range(self, "size", "context", "radius", least=0)
        check_range(self, "multiple", "top_k", least=1)
        check_range(self, "temperature", above=0)

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open the videos."""
        (source,) = sources
        clips: Sequence[Clip]
        if (path := folder_path(source)) is not None:
            clips, settings = open_davis(path, self.split), self
        else:
            size = self.size or min(SIZE, max(SYNTHETIC_SIZE, 2 * context.size))
            scenes = synthetic_scenes(source, count=SYNTHETIC_CLIPS, size=size, part="val")
            if scenes is None:
                raise UserError(f"expected the folder of DAVIS-2017 or `scenes`; got a {type(source).__name__}.")
            clips = [SyntheticClip(scenes, index, SYNTHETIC_FRAMES) for index in range(scenes.count)]
            settings = replace(self, size=self.size or scenes.size, multiple=1)
        fingerprint = hashlib.sha256("".join(clip.fingerprint for clip in clips).encode()).hexdigest()[:16]
        no_files = replace(context, out=None)
        return PreparedEval(
            name=self.name,
            data={"davis": {"sequences": len(clips), "frames": sum(map(len, clips)), "fingerprint": fingerprint}},
            score=lambda backbone: settings._score(backbone, clips, context),
            score_reference=lambda backbone: settings._score(backbone, clips, no_files),
            references={"raw_pixels": lambda: settings._score(RawPatches(), clips, no_files)},
        )

    def _score(self, backbone: Backbone, clips: Sequence[Clip], context: EvalContext) -> Scores:
        """Return {"J&F": percent, "J": ..., ...}, equal on every rank; write masks to OUT/NAME/VIDEO/FRAME.png."""

        def predict(clip: Clip, first: np.ndarray) -> Iterator[np.ndarray]:
            masks = chain([first], segment(backbone, clip.frames(), first, self, context))
            for number, (frame, mask) in enumerate(zip(clip.frame_names, masks, strict=True)):
                if context.out is not None:
                    write_mask(context.out / self.name / clip.name / f"{frame}.png", mask)
                if number:
                    yield mask

        with evaluating(backbone), context.progress("frames") as progress:
            official = score_clips(clips, predict, progress, context.device)
        scores = {_percent_name(name): 100 * value for name, value in official.items() if name != "per_object"}
        return Scores(scores, {"official": official})


class RawPatches(Backbone):
    """A backbone without weights: the feature of a position is its 8 x 8 pixels."""

    embed_dim, patch = 3 * 8 * 8, 8

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean patch: [B, 3, H, W] -> [B, D]."""
        return self.features(images)[0].cls

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        """Return the mean patch and all patches."""
        patches = F.pixel_unshuffle(images, self.patch).permute(0, 2, 3, 1)
        return [Features(patches.mean((1, 2)), patches)]


def _percent_name(official: str) -> str:
    """Return the paper's name of an official score: J&F, J, J recall, J decay, F, ..."""
    return official.removesuffix("-Mean").replace("-R", " r").replace("-D", " d")
