"""dino track: objects tracked through a video."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dino_ssl.cli.images import CheckpointOptions, ShortSide, run_command
from dino_ssl.data.masks import write_mask
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_maps import attention_size
from dino_ssl.evals.base import EvalContext
from dino_ssl.evals.object_masks import ObjectMasks
from dino_ssl.evals.video_segmentation import VideoSegmentation
from dino_ssl.files import mark_output
from dino_ssl.models.backbone import Backbone
from dino_ssl.segmentation.masks import Segmenter, SegmentSettings
from dino_ssl.terminal import Terminal
from dino_ssl.viz import tracking
from dino_ssl.viz.rendering import save_image
from dino_ssl.viz.video import open_video, write_video

EXAMPLES = """\
  dino track dino_vits8 video.mp4 --mask first.png -o out   a video file, and a mask of its first frame
  dino track runs/photos frames/ --mask first.png -o out    a folder of frames: masks get the names of the frames
  dino track runs/photos video.mp4 --discover tokencut -o out    no mask: the object is found in the first frame
  dino track dino_vits16 video.mp4 --mask first.png --size 320 --context 3     faster

The mask is a PNG of the first frame: black is the background, each plain color an object (or an indexed PNG with the
object numbers, as in DAVIS). Paint it in any image editor, with a hard brush on black."""


@dataclass(frozen=True, kw_only=True)
class TrackOptions(CheckpointOptions):
    """Track objects through a video from a mask of its first frame, by the similarity of features of a frozen network.

    With --discover, the objects of the first frame are found without a mask.

    OUT/masks/ gets an indexed PNG for every frame, OUT/overlay.mp4 the video with colored objects, and OUT/strip.png a
    preview. Nothing is trained: each patch takes the labels of the most similar patches near it in the first frame and
    in the last CONTEXT frames (Table 5).
    """

    video: tyro.conf.Positional[str]
    """A video file, or a folder or packed dataset of frames, in natural order of their names."""
    mask: str = ""
    """PNG of the objects in the first frame, with the same size or aspect ratio."""
    discover: Literal["none", "tokencut", "maskcut", "lost", "attention"] = "none"
    """Find the objects of the first frame by this method of `dino segment` instead of a mask: maskcut several, the
    others one."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "track"
    """Output folder."""
    size: ShortSide = None
    context: int = 7
    """Number of previous frames that labels are taken from, in addition to the first."""
    radius: int = 12
    """Maximum distance in patches between a patch and those it takes labels from; 0 is unlimited."""
    fps: float | None = None
    """Frames per second of the overlay. Default: those of the video, 25 for a folder."""


def track(argv: Sequence[str]) -> int:
    """Run `dino track`."""
    return run_command(_track, TrackOptions, argv, "dino track", EXAMPLES)


def _first_mask(options: TrackOptions, frame: np.ndarray, backbone: Backbone) -> np.ndarray:
    """Read the mask of the first frame, or find its objects."""
    if bool(options.mask) == (options.discover != "none"):
        raise UserError("expected a PNG of the first frame as `mask`, or a method as `discover`; not both.")
    if options.discover == "none":
        return tracking.read_first_mask(options.mask, *frame.shape[:2])
    segmenter = Segmenter(backbone, SegmentSettings(find=ObjectMasks(method=options.discover), size=options.size))
    segmenter.grid(*frame.shape[:2])  # raises if it is too long
    (found,) = segmenter([frame])
    if found.note:
        raise UserError(f"No object was found in the first frame: {found.note}. Paint a mask and give it as `mask`.")
    return found.labels


def _track(options: TrackOptions, terminal: Terminal) -> dict[str, Any]:
    with terminal.progress(f"reading {options.video}") as progress:
        video = open_video(options.video, options.fps, progress)
    first = next(iter(video), None)
    if first is None:
        raise UserError(f"{options.video} has no frame that can be read.")
    checkpoint = options.open_checkpoint()
    mask = _first_mask(options, first, checkpoint.backbone)
    backbone, context = checkpoint.backbone, EvalContext(device=next(checkpoint.backbone.parameters()).device)
    size = options.size or attention_size(checkpoint.backbone.transform.size)
    settings = VideoSegmentation(size=size, multiple=1, context=options.context, radius=options.radius)
    too_small = tracking.too_small_objects(mask, backbone.patch, settings)
    if too_small:
        numbers = ", ".join(map(str, too_small))
        terminal.print(f"object {numbers}: not tracked, too small for the patches: use a larger --size", style="yellow")
    out, areas = Path(options.out), []
    mark_output(out)

    def overlays() -> Iterator[np.ndarray]:
        with terminal.progress("tracking") as progress:
            for name, frame, labels in tracking.track(backbone, video, mask, settings, context):
                write_mask(out / "masks" / f"{name}.png", labels)
                areas.append(np.bincount(labels.ravel(), minlength=256) / labels.size)
                progress(len(areas), max(len(areas), video.num_frames))
                yield tracking.overlay_mask(frame, labels)

    write_video(out / "overlay.mp4", overlays(), video.fps)
    save_image(out / "strip.png", tracking.frame_strip(open_video(out / "overlay.mp4"), len(areas)))
    objects = []
    for label in np.setdiff1d(mask, 0).tolist():
        area = [round(float(area[label]), 6) for area in areas]
        objects.append({"object": label, "area": area, "too_small": label in too_small})
        terminal.print(f"object {label}: {area[0]:.1%} of the first frame, {area[-1]:.1%} of the last")
    terminal.print(f"{len(areas)} frames: masks in {out}/masks/, {out}/overlay.mp4, preview {out}/strip.png")
    files = {"masks": f"{out}/masks", "overlay": f"{out}/overlay.mp4", "strip": f"{out}/strip.png"}
    return {"checkpoint": options.checkpoint, "frames": len(areas), "size": size, **files, "objects": objects}
