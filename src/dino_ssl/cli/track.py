"""dino track: objects tracked through a video."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dino_ssl.cli.images import Checkpoint, Json, ShortSide, Trust
from dino_ssl.cli.options import parse
from dino_ssl.errors import UserError
from dino_ssl.terminal import command_output

EXAMPLES = """\
  dino track dino_vits8 video.mp4 --mask first.png -o out   a video file, and a mask of its first frame
  dino track runs/photos frames/ --mask first.png -o out    a folder of frames: masks get the names of the frames
  dino track dino_vits16 video.mp4 --mask first.png --size 320 --context 3     faster

The mask is a PNG of the first frame: black is the background, each plain color an object (or an indexed PNG with the
object numbers, as in DAVIS). Paint it in any image editor, with a hard brush on black."""


@dataclass(frozen=True, kw_only=True)
class TrackOptions:
    """Track objects through a video from a mask of its first frame, by the similarity of features of a frozen network.

    OUT/masks/ gets an indexed PNG for every frame, OUT/overlay.mp4 the video with colored objects, and OUT/strip.png a
    preview. Nothing is trained: each patch takes the labels of the most similar patches near it in the first frame and
    in the last CONTEXT frames (Table 5).
    """

    checkpoint: Checkpoint
    video: tyro.conf.Positional[str]
    """A video file, or a folder or packed dataset of frames, in natural order of their names."""
    mask: str
    """PNG of the objects in the first frame, with the same size or aspect ratio."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "track"
    """Output folder."""
    size: ShortSide = None
    context: int = 7
    """Number of previous frames that labels are taken from, in addition to the first."""
    radius: int = 12
    """Maximum distance in patches between a patch and those it takes labels from; 0 is unlimited."""
    top_k: int = 5
    """Number of most similar patches that labels are taken from."""
    temperature: float = 0.1
    """Temperature of their softmax weights."""
    fps: float | None = None
    """Frames per second of the overlay. Default: those of the video, 25 for a folder."""
    trust: Trust = False
    json: Json = False


def track(argv: Sequence[str]) -> int:
    """Run `dino track`."""
    options = parse(TrackOptions, argv, "dino track", EXAMPLES)
    with command_output(options.json) as (terminal, write_result):
        import numpy as np

        from dino_ssl.api.calls import open_checkpoint
        from dino_ssl.data.masks import write_mask
        from dino_ssl.evals.attention_maps import attention_size
        from dino_ssl.evals.base import EvalContext
        from dino_ssl.evals.video_segmentation import VideoSegmentation
        from dino_ssl.viz import tracking
        from dino_ssl.viz.saving import save_image
        from dino_ssl.viz.video import open_video

        with terminal.progress(f"reading {options.video}") as progress:
            video = open_video(options.video, options.fps, progress)
        first = next(iter(video), None)
        if first is None:
            raise UserError(f"{options.video} has no frame that can be read.")
        mask = tracking.read_first_mask(options.mask, *first.shape[:2])
        checkpoint = open_checkpoint(options.checkpoint, trust=options.trust)
        settings = VideoSegmentation(
            size=options.size or attention_size(checkpoint.size), multiple=1, context=options.context,
            radius=options.radius, top_k=options.top_k, temperature=options.temperature,
        )  # fmt: skip
        too_small = tracking.too_small_objects(mask, checkpoint.backbone.patch, settings)
        if too_small:
            terminal.print(
                f"Object {', '.join(map(str, too_small))}: too small for patches of {checkpoint.backbone.patch} pixels "
                f"at size {settings.size}, and not tracked. Use a larger --size.",
                style="yellow",
            )
        out, areas = Path(options.out), []
        context = EvalContext(device=next(checkpoint.backbone.parameters()).device)
        with terminal.progress("tracking") as progress:
            for name, labels in tracking.track(checkpoint.backbone, video, mask, settings, context):
                write_mask(out / "masks" / f"{name}.png", labels)
                areas.append(np.bincount(labels.ravel(), minlength=256) / labels.size)
                progress(len(areas), max(len(areas), video.num_frames))
        with terminal.progress("overlay") as progress:
            overlay = tracking.write_overlay(out / "overlay.mp4", video, out / "masks", len(areas), progress)
        frames = tracking.overlay_frames(video, out / "masks")
        strip = save_image(out / "strip.png", tracking.frame_strip(frames, len(areas)))
        objects = [
            {"object": label, "area": [round(float(area[label]), 6) for area in areas], "too_small": label in too_small}
            for label in np.setdiff1d(mask, 0).tolist()
        ]
        for entry in objects:
            first_area, last_area = entry["area"][0], entry["area"][-1]
            terminal.print(
                f"object {entry['object']}: {first_area:.1%} of the first frame, {last_area:.1%} of the last"
            )
        terminal.print(f"{len(areas)} masks in {out / 'masks'}/, overlay {overlay}, preview {strip}")
        write_result({
            "checkpoint": options.checkpoint, "frames": len(areas), "size": settings.size,
            "masks": str(out / "masks"), "overlay": str(overlay), "strip": str(strip), "objects": objects,
        })  # fmt: skip
    return 0
