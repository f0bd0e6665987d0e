"""dino attention: attention maps of images and videos."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dino_ssl.cli.images import (
    SHEET_PANELS,
    CheckpointOptions,
    NamedImages,
    ShortSide,
    read_images,
    run_command,
    unique_name,
)
from dino_ssl.cli.options import Flag
from dino_ssl.evals.attention_maps import attention_size
from dino_ssl.files import mark_output
from dino_ssl.formatting import plural
from dino_ssl.terminal import Terminal
from dino_ssl.viz.attention import AttentionMaps, attention_maps, raw_arrays
from dino_ssl.viz.rendering import cutout, panels, save_array, save_image, sheet, video_frame
from dino_ssl.viz.video import VIDEO_SUFFIXES, open_video, write_video

Attend = Callable[[np.ndarray], list[AttentionMaps]]
"""Returns the attention of an image: one map per point, or that of [CLS]."""

EXAMPLES = """\
  dino attention runs/photos cat.jpg dog.jpg         maps in attention/
  dino attention runs/photos photos/ -o maps/        every image of a folder
  dino attention runs/photos cat.jpg --point 120 80 --point 300 200      two points, one color each (Fig. 8)
  dino attention dino_vits8 cat.jpg --heads 0 3 5    these heads, and all three in one image (Fig. 3)
  dino attention runs/photos photos/ --raw           also as arrays
  dino attention runs/photos walk.mp4                a video: frame, mean attention, colored heads"""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(CheckpointOptions):
    """Draw attention maps: each head, their mean, an overlay, and the mask that holds 60 % of the attention.

    all.png shows the first images, with up to 120 panels. Every image gets a folder with one file per panel. A video
    becomes an MP4 of frame, mean and heads side by side. For a network without attention (a ResNet), the similarity of
    each patch to the pooled feature is drawn instead.
    """

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, folders or packed datasets, video files, or `scenes` (whose objects are drawn as well)."""
    layer: int = -1
    """Block whose attention is drawn: 0 is the first, -1 the last."""
    heads: tuple[int, ...] = ()
    """Heads to draw and to average, counted from 0. Default: all."""
    point: tyro.conf.UseAppendAction[tuple[tuple[float, float], ...]] = ()
    """X Y in pixels of the image: draw the attention of this point instead of the [CLS] token. Repeat --point for more
    points: each gets a color."""
    mass: float = 0.6
    """Share of the attention that the masks hold."""
    raw: Flag = False
    """Also write the attention of every head as float32 arrays: raw-patches.npy [heads, h, w], and raw-pixels.npy
    [heads, H, W] at the size of the image, enlarged bilinearly; with several points [points, heads, ...]."""
    size: ShortSide = None
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "attention"
    """Output folder."""


def attention(argv: Sequence[str]) -> int:
    """Run `dino attention`."""
    return run_command(_attention, AttentionOptions, argv, "dino attention", EXAMPLES)


def _attention(options: AttentionOptions, terminal: Terminal) -> dict[str, Any]:
    checkpoint = options.open_checkpoint()
    attend = partial(
        attention_maps,
        checkpoint.backbone,
        queries=options.point or ("cls",),
        layer=options.layer,
        heads=options.heads or None,
        mass=options.mass,
        size=options.size or attention_size(checkpoint.backbone.transform.size),
    )
    out, stems, skipped = Path(options.out), set[str](), list[dict[str, str]]()
    videos = [name for name in options.images if Path(name).suffix.lower() in VIDEO_SUFFIXES]
    names = [name for name in options.images if name not in videos]
    read = partial(read_images, names, terminal, "attention", skipped, checkpoint.backbone.transform.bit_depth)
    images = _draw_images(read(), attend, out, terminal, is_raw=options.raw) if names or not videos else []
    drawn = [_draw_video(name, attend, out / f"{unique_name(Path(name).stem, stems)}.mp4", terminal) for name in videos]
    result = {"checkpoint": options.checkpoint, "out": options.out, "images": images, "videos": drawn}
    return {**result, "skipped": skipped}


def _draw_images(
    images: NamedImages, attend: Attend, out: Path, terminal: Terminal, *, is_raw: bool
) -> list[dict[str, Any]]:
    """Write the panels of each image, and the overview of the first ones as soon as it is complete."""
    results, overview, file = [], [], None
    for name, stem, image, mask in images:
        maps = attend(image)
        mark_output(out)
        drawn = panels(maps)
        if mask is not None:
            drawn.insert(1, ("object", cutout(maps[0].display, mask > 0)))
        if file is None and (not overview or (len(overview) + 1) * len(drawn) <= SHEET_PANELS):
            overview.append([(Path(name).name, drawn[0][1]), *drawn[1:]])
        elif file is None:
            file = save_image(out / "all.png", sheet(overview))
        paths = [out / stem / f"{label.replace('%', '').replace(' ', '-')}.png" for label, _ in drawn]
        files = [str(save_image(path, panel)) for path, (_, panel) in zip(paths, drawn, strict=True)]
        if is_raw:
            for part, array in raw_arrays(maps, *image.shape[:2]).items():
                files.append(str(save_array(out / stem / f"raw-{part}.npy", array)))
        described = {"image": name, "kind": maps[0].kind, "layer": maps[0].layer, "grid": list(maps[0].mean.shape)}
        results.append({**described, "files": files, "mask_share": [float(query.mask.mean()) for query in maps]})
    file = file or save_image(out / "all.png", sheet(overview))
    terminal.print(f"Overview of {plural(len(overview), 'image')}: {file}")
    folder = Path(results[0]["files"][0]).parent
    terminal.print(f"Panels of {plural(len(results), 'image')}: {folder}/{', ...' if len(results) > 1 else ''}")
    if results[0]["kind"] == "similarity":
        terminal.print(
            "This network has no attention: the maps are the similarity of each patch to the pooled feature."
        )
    return results


def _draw_video(name: str, attend: Attend, file: Path, terminal: Terminal) -> dict[str, Any]:
    """Write the video with its mean attention and its heads or points in color next to each frame."""
    video = open_video(name)
    mark_output(file.parent)

    def frames() -> Iterator[np.ndarray]:
        with terminal.progress(f"attention of {name}") as progress:
            for done, frame in enumerate(video, 1):
                yield video_frame(attend(frame))
                progress(done, max(done, video.num_frames))

    num_frames = write_video(file, frames(), video.fps)
    terminal.print(f"{name}: {num_frames} frames at {video.fps:g} per second: {file}")
    return {"video": name, "frames": num_frames, "fps": video.fps, "file": str(file)}
