"""dino track: objects followed through a film."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError
from dino_ssl.terminal import command_output

EXAMPLES = """\
  dino track dino_vits8 film.mp4 --mask first.png -o out    a video file, and a mask of its first frame
  dino track runs/photos frames/ --mask first.png -o out    a folder of frames: masks take the frames' names
  dino track dino_vits16 film.mp4 --mask first.png --size 320 --context 3     faster

The mask is a PNG of the first frame: black is the ground, each plain colour an object (or an indexed PNG whose pixels
are the numbers of the objects, as in DAVIS). Any painting program makes one: paint with a hard brush on black."""


@dataclass(frozen=True, kw_only=True)
class TrackOptions:
    """Follow objects through a film: from a mask of its first frame, by likeness of a frozen network's features.

    OUT/masks/ has an indexed PNG for every frame, OUT/overlay.mp4 the film with its objects in colour, OUT/strip.png a
    glance at it. Nothing is trained. Each place takes the labels of the places most like it, among those near it in
    the first frame and in the last CONTEXT frames (Table 5).
    """

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a weights file, a released network (dino_vits8) or timm:NAME."""
    frames: tyro.conf.Positional[str]
    """A video file, or a folder of pictures in the order of their names."""
    mask: str
    """PNG of the objects in the first frame, of the frame's proportions."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "track"
    """Folder for the masks and the overlay."""
    size: int | None = None
    """Short side in pixels of what the network sees; larger is finer. 480, or less if it was trained on below 224."""
    context: int = 7
    """Frames before that labels are taken from, beside the first."""
    radius: int = 12
    """Places of the network's map this far away may give their label; more for fast objects, 0 for all."""
    top_k: int = 5
    """How many of the most alike do give it."""
    temperature: float = 0.1
    """Of their weights."""
    fps: float | None = None
    """Frames per second of the overlay; without it, as the video says, 25 for a folder."""
    video: Literal["mp4", "gif"] = "mp4"
    """Format of the overlay; where no MP4 can be written, it is a GIF."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def track(argv: Sequence[str]) -> int:
    options = parse(TrackOptions, argv, "dino track", EXAMPLES)
    with command_output(options.json) as (terminal, give):
        import numpy as np

        from dino_ssl.api.calls import open_checkpoint
        from dino_ssl.data.masks import write_mask
        from dino_ssl.evals.attention_masks import size_to_look_at
        from dino_ssl.evals.base import EvalContext
        from dino_ssl.evals.video_segmentation import VideoSegmentation
        from dino_ssl.viz.rendering import save
        from dino_ssl.viz.tracking import first_mask, overlays, side_by_side, too_small, write_overlay
        from dino_ssl.viz.tracking import track as follow
        from dino_ssl.viz.video import open_video

        film = open_video(options.frames, options.fps)
        first = next(iter(film), None)
        if first is None:
            raise UserError(f"{options.frames} has no frame that can be read.")
        mask = first_mask(Path(options.mask), *first.shape[:2])
        found = open_checkpoint(options.checkpoint)
        settings = VideoSegmentation(
            size=options.size or size_to_look_at(found.size), multiple=1, context=options.context,
            radius=options.radius, top_k=options.top_k, temperature=options.temperature,
        )  # fmt: skip
        lost = too_small(mask, found.backbone.patch, settings)
        if lost:
            terminal.print(
                f"Object {', '.join(map(str, lost))}: too small for places of {found.backbone.patch} pixels at size "
                f"{settings.size}, and lost at once. Take a larger --size.",
                style="yellow",
            )
        out, areas = Path(options.out), []
        context = EvalContext(device=next(found.backbone.parameters()).device)
        with terminal.progress("following") as done:
            for name, labels in follow(found.backbone, film, mask, settings, context):
                write_mask(out / "masks" / f"{name}.png", labels)
                areas.append(np.bincount(labels.ravel(), minlength=256) / labels.size)
                done(len(areas), max(len(areas), film.count))
        with terminal.progress("drawing") as done:
            overlay = write_overlay(out, film, len(areas), options.video, done)
        strip = save(out / "strip.png", side_by_side(overlays(film, out / "masks"), len(areas)))
        objects = [
            {"object": label, "area": [round(float(area[label]), 6) for area in areas], "lost": label in lost}
            for label in np.setdiff1d(mask, 0).tolist()
        ]
        for entry in objects:
            terminal.print(f"object {entry['object']}: {entry['area'][0]:.1%} of the first frame, "
                         f"{entry['area'][-1]:.1%} of the last")  # fmt: skip
        terminal.print(f"{len(areas)} masks in {out / 'masks'}/, the film {overlay}, a glance {strip}")
        give({
            "checkpoint": options.checkpoint, "frames": len(areas), "size": settings.size,
            "masks": str(out / "masks"), "overlay": str(overlay), "strip": str(strip), "objects": objects,
        })  # fmt: skip
    return 0
