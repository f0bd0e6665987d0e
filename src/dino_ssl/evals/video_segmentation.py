"""Video object segmentation with nothing trained (Table 5): the first mask is handed on from frame to frame, by
likeness of the last spatial map of a frozen network, and nothing else.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.benchmarks.davis import open_davis
from dino_ssl.data.clips import Clip, SyntheticClip
from dino_ssl.data.masks import write_mask
from dino_ssl.data.sources import WORDS
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, Scores, Source, evaluating
from dino_ssl.evals.davis_score import STATISTICS, object_name, objects_of, sequence_statistics, summary
from dino_ssl.evals.label_propagation import input_size, label_map, nearest, one_hot, propagate
from dino_ssl.models.backbone import Backbone, Features

SIZE = 480  # short side in pixels: DAVIS-2017 "480p"
DRAWN_CLIPS, DRAWN_FRAMES = 8, 24
DRAWN_SIZE = 192  # at least: on smaller ones, J tells how coarse the grid of patches is, and little else


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, as the published code; strong reductions by area, which it does not meet."""
    how = cv2.INTER_AREA if 2 * height < image.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how)


def segment(
    backbone: Backbone,
    frames: Iterable[np.ndarray],
    mask: np.ndarray,
    settings: "VideoSegmentation",
    context: EvalContext,
) -> Iterator[np.ndarray]:
    """Label maps, uint8 [H, W], of the second frame, the third, ...: from all frames [H, W, 3], and the first's mask.

    One frame at a time: what is kept is the features of the first and of the last `context` frames. The caller holds
    the backbone still: `with evaluating(backbone)`.
    """
    height, width = mask.shape
    seen = input_size(height, width, size=settings.size or SIZE, patch=backbone.patch, multiple=settings.multiple)

    def features() -> Iterator[Tensor]:
        for image in frames:
            if image.shape[:2] != (height, width):
                raise UserError(
                    f"A frame is {image.shape[1]} x {image.shape[0]} pixels, and the first mask {width} x {height}: "
                    "expected one size for all frames of a video and its masks."
                )
            pixels = torch.from_numpy(resized(image, *seen)).permute(2, 0, 1)[None]
            with context.autocast():
                yield backbone.features(normalize(pixels.to(context.device)))[0].patches[0]

    maps = features()
    begin = next(maps, None)
    if begin is None:
        return
    numbers, first = one_hot(mask, *begin.shape[:2])
    known = dict(context=settings.context, radius=settings.radius, top_k=settings.top_k)
    for soft in propagate(chain([begin], maps), first.to(begin.device), temperature=settings.temperature, **known):
        yield nearest(numbers[label_map(soft, *seen)], height, width)


@dataclass(frozen=True, kw_only=True)
class VideoSegmentation:
    """Objects of DAVIS-2017 followed through a video from their first mask: J&F of frozen features, nothing trained.

    Also the share of frames found (recall) and what is lost over time (decay), of J and of F.
    """

    name: ClassVar[str] = "video-segmentation"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "DAVIS", "Folder of DAVIS-2017 at 480p, with ImageSets, JPEGImages, Annotations; `scenes` draws videos."
        ),
    )
    paper: ClassVar[str] = "Table 5; protocol of Jabri et al., 2020"
    examples: ClassVar[str] = """\
  dino eval video-segmentation dino_vits8 DAVIS/                  Table 5: 69.9 on all of val
  dino eval video-segmentation runs/photos DAVIS/ -o out          masks in out/video-segmentation/
  dino eval video-segmentation runs/photos scenes                 videos that dino draws itself
  dino eval video-segmentation --score out/video-segmentation DAVIS/ --json"""

    split: str = "val"
    """Which list of ImageSets/2017."""
    size: int | None = None
    """Short side in pixels of what the network sees; without it 480, for drawn ones 192 or twice its training size."""
    multiple: int = 64
    """The long side is rounded down to a multiple of this, where that holds whole patches."""
    context: int = 7
    """Frames before that labels are taken from, beside the first."""
    radius: int = 12
    """Places this far away, up, down and sideways, may give their label; 0: all."""
    top_k: int = 5
    """How many of the most alike do give it."""
    temperature: float = 0.1
    """Of their weights exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        check_range(self, "size", "context", "radius", least=0)
        check_range(self, "multiple", "top_k", least=1)
        check_range(self, "temperature", above=0)

    def bind(self, sources: Sequence[Any], context: EvalContext) -> "BoundVideoSegmentation":
        (source,) = sources
        if isinstance(source, str | Path) and str(source) not in WORDS:
            return BoundVideoSegmentation(self, open_davis(source, self.split), context)
        size = self.size or min(SIZE, max(DRAWN_SIZE, 2 * context.size))
        drawn = WORDS.get(str(source))
        drawn = source if drawn is None else replace(drawn, count=DRAWN_CLIPS, size=size, part="val")
        if not isinstance(drawn, Scenes):
            raise UserError(
                "video-segmentation needs videos with masks, "
                f"and a {type(drawn).__name__} has none: give the folder of DAVIS 2017, or `scenes`."
            )
        clips = [SyntheticClip(drawn, index, DRAWN_FRAMES) for index in range(drawn.count)]
        return BoundVideoSegmentation(replace(self, size=self.size or drawn.size, multiple=1), clips, context)


@dataclass(frozen=True)
class BoundVideoSegmentation:
    """The evaluator: the settings with the videos, and where it works."""

    settings: VideoSegmentation
    clips: Sequence[Clip]
    context: EvalContext
    name: str = VideoSegmentation.name

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        fingerprint = hashlib.sha256("".join(clip.fingerprint for clip in self.clips).encode()).hexdigest()[:16]
        frames = sum(map(len, self.clips))
        return {"davis": {"sequences": len(self.clips), "frames": frames, "fingerprint": fingerprint}}

    def __call__(self, backbone: Backbone) -> Scores:
        """{"J&F": percent, "J": ..., ...}, the same on every rank."""
        with evaluating(backbone):
            found = self._score(lambda clip, first: self._segment(backbone, clip, first), "frames", self.context.out)
        kept = self._score(lambda clip, first: (first for _ in clip.frame_names[1:]), "first mask, kept")
        return Scores(percent(found), {"official": found, "first_mask_kept": percent(kept)})

    def pixel_reference(self) -> Scores:
        """The same of raw pixels: a place is the 8 x 8 pixels that it shows."""
        floor = self._score(lambda clip, first: self._segment(RawPatches(), clip, first), "raw pixels")
        return Scores(percent(floor), {"official": floor})

    def _segment(self, backbone: Backbone, clip: Clip, first: np.ndarray) -> Iterator[np.ndarray]:
        return segment(backbone, clip.frames(), first, self.settings, self.context)

    def _score(
        self, follow: Callable[[Clip, np.ndarray], Iterable[np.ndarray]], label: str, out: Path | None = None
    ) -> dict[str, Any]:
        """`summary` of the masks that `follow` gives for the second frame on; rank r takes videos r, r + world, ..."""
        mine, rows, done = range(distributed.rank(), len(self.clips), distributed.world_size()), [], 0
        total = sum(len(self.clips[index]) - 1 for index in mine)

        def pairs(
            clip: Clip, first: np.ndarray, truths: Iterator[np.ndarray]
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            nonlocal done
            masks = zip(clip.frame_names[1:], follow(clip, first), truths, strict=True)
            for place, (name, mask, truth) in enumerate(masks, 2):
                if out is not None:
                    write_mask(out / self.name / clip.name / f"{name}.png", mask)
                done += 1
                progress(done, total)
                if place < len(clip):  # the last frame does not count
                    yield mask, truth

        with self.context.progress(label) as progress:
            for index in mine:
                clip = self.clips[index]
                truths = clip.masks()
                first = next(truths)
                if out is not None:
                    write_mask(out / self.name / clip.name / f"{clip.frame_names[0]}.png", first)
                statistics = sequence_statistics(pairs(clip, first, truths), objects_of(first))
                rows += [[index, place, *row] for place, row in enumerate(statistics.tolist(), 1)]
        return self._summary(torch.tensor(rows, dtype=torch.float64).reshape(-1, 2 + len(STATISTICS)))

    def _summary(self, rows: Tensor) -> dict[str, Any]:
        """Of all ranks' objects; a row: the video's place, the object's number, its statistics."""
        if distributed.world_size() > 1:
            rows = distributed.all_gather(rows.to(self.context.device)).cpu()
        ordered = sorted(rows.tolist())
        names = [object_name(self.clips[int(index)].name, int(label)) for index, label, *_ in ordered]
        return summary(names, np.array([row[2:] for row in ordered]))


class RawPatches(Backbone):
    """No network: the feature of a place is its pixels."""

    embed_dim, patch = 3 * 8 * 8, 8

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[0].cls

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        places = F.pixel_unshuffle(images, self.patch).permute(0, 2, 3, 1)
        return [Features(places.mean((1, 2)), places)]


def percent(official: Mapping[str, Any]) -> dict[str, float]:
    """The official numbers in percent, as the paper gives them: J&F, J, J recall, J decay, F, ..."""
    fractions = {name: value for name, value in official.items() if name != "per_object"}
    return {
        name.removesuffix("-Mean").replace("-R", " r").replace("-D", " d"): 100 * value
        for name, value in fractions.items()
    }
