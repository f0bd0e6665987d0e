"""dino attention: attention maps of images and videos."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dino_ssl.cli.images import Checkpoint, Json, NamedImage, ShortSide, Trust, named_images, read_images, unique_name
from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError
from dino_ssl.terminal import Terminal, command_output

if TYPE_CHECKING:
    import numpy as np

    from dino_ssl.viz.attention import AttentionMaps

EXAMPLES = """\
  dino attention runs/photos cat.jpg dog.jpg         maps in attention/
  dino attention runs/photos photos/ -o maps/        every image of a folder
  dino attention runs/photos cat.jpg --point 120 80 --point 300 200
                                                     attention of these two points, one color each (Fig. 8)
  dino attention dino_vits8 cat.jpg --heads 0 3 5    these heads, and all three in one image (Fig. 3)
  dino attention dino_vits8 cat.jpg --layer 3 --size 480 -o maps/
  dino attention runs/photos walk.mp4                a video: frame, mean attention, colored heads
  dino attention runs/photos frames/ --video --fps 10"""

SHEET_IMAGES = 24
"""Images in the overview."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Draw attention maps: each head, their mean, an overlay, and the mask that holds 60 % of the attention.

    Each image gets a folder with one file per panel; all.png shows all panels. A video becomes an MP4 of frame, mean
    and heads side by side. For a network without attention (a ResNet), the similarity of each patch to the pooled
    feature is drawn instead.
    """

    checkpoint: Checkpoint
    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, folders or packed datasets, video files, or `scenes`."""
    layer: int = -1
    """Block whose attention is drawn: 0 is the first, -1 the last."""
    heads: tuple[int, ...] = ()
    """Heads to draw and to average, counted from 0. Default: all."""
    point: tyro.conf.UseAppendAction[tuple[tuple[float, float], ...]] = ()
    """X Y in pixels of the image: draw the attention of this point instead of the [CLS] token. Repeat --point for more
    points: each gets a color."""
    mass: float = 0.6
    """Share of the attention that the masks hold."""
    size: ShortSide = None
    video: Flag = False
    """Treat folders as videos: their images, in natural order of their names, are the frames."""
    fps: float | None = None
    """Frames per second of the output video. Default: those of the input, 25 for a folder of frames."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "attention"
    """Output folder."""
    trust: Trust = False
    json: Json = False


def attention(argv: Sequence[str]) -> int:
    """Run `dino attention`."""
    options = parse(AttentionOptions, argv, "dino attention", EXAMPLES)
    if not options.images:
        raise UserError(
            "No images: expected files, folders or videos: dino attention CHECKPOINT IMAGE ...\n"
            "Put an option that takes several values after the images: dino attention CHECKPOINT IMAGE --heads 0 3."
        )
    with command_output(options.json) as (terminal, write_result):
        from dino_ssl.api.calls import open_checkpoint
        from dino_ssl.viz.video import VIDEO_SUFFIXES

        videos = [
            path for path in map(Path, options.images)
            if path.suffix.lower() in VIDEO_SUFFIXES or (options.video and path.is_dir())
        ]  # fmt: skip
        skipped: list[dict[str, str]] = []
        images = named_images([name for name in options.images if Path(name) not in videos], terminal, skipped)
        checkpoint = open_checkpoint(options.checkpoint, trust=options.trust)
        results = _draw_images(checkpoint, images, options, terminal, skipped) if images else []
        stems: set[str] = set()
        video_results = [
            _draw_video(checkpoint, path, f"{unique_name(path.stem, stems)}.mp4", options, terminal) for path in videos
        ]
        write_result({
            "checkpoint": options.checkpoint, "out": options.out, "images": results, "videos": video_results,
            "skipped": skipped,
        })  # fmt: skip
    return 0


def _draw_images(
    checkpoint: Any,
    images: Sequence[NamedImage],
    options: AttentionOptions,
    terminal: Terminal,
    skipped: list[dict[str, str]],
) -> list[dict[str, Any]]:
    """Write the panels of each image, and the overview of the first ones."""
    from dino_ssl.viz.rendering import attention_panels, sheet
    from dino_ssl.viz.saving import save_image

    out, results, overview = Path(options.out), [], []
    for image, pixels in read_images(images, terminal, "attention", skipped):
        maps = _maps(checkpoint, pixels, options)
        panels = attention_panels(maps)
        names = (name.replace("%", "").replace(" ", "-") for name, _ in panels)
        files = [
            save_image(out / image.stem / f"{name}.png", panel) for name, (_, panel) in zip(names, panels, strict=True)
        ]
        results.append({
            "image": image.name, "heads": len(maps[0].heads), "grid": list(maps[0].mean.shape), "layer": maps[0].layer,
            "kind": maps[0].kind, "points": list(options.point), "files": list(map(str, files)),
            "mask_share": [float(query.mask.mean()) for query in maps],
        })  # fmt: skip
        if len(overview) < SHEET_IMAGES:
            overview.append((Path(image.name).name, maps))
    if not results:
        raise UserError(f"None of the {len(images)} images could be read; the last: {skipped[-1]['reason']}.")
    blocks = [attention_panels(maps) for _, maps in overview]
    file = save_image(out / "all.png", sheet(blocks, names=[name for name, _ in overview]))
    terminal.print(f"{len(results)} images in {out}/, overview in {file}")
    return results


def _maps(checkpoint: Any, image: "np.ndarray", options: AttentionOptions) -> "list[AttentionMaps]":
    """Return one map per point, or that of [CLS]."""
    from dino_ssl.api.calls import attention as attention_of

    maps = attention_of(
        checkpoint, image, layer=options.layer, heads=options.heads or None, point=list(options.point) or "cls",
        mass=options.mass, size=options.size,
    )  # fmt: skip
    return maps if isinstance(maps, list) else [maps]


def _draw_video(
    checkpoint: Any, path: Path, name: str, options: AttentionOptions, terminal: Terminal
) -> dict[str, Any]:
    """Write the video with its mean attention and its heads or points in color next to each frame."""
    from dino_ssl.viz.rendering import video_frame
    from dino_ssl.viz.video import open_video, write_video

    video, file = open_video(path, options.fps), Path(options.out) / name

    def frames() -> Iterator["np.ndarray"]:
        with terminal.progress(f"attention of {path.name}") as progress:
            for done, frame in enumerate(video, 1):
                yield video_frame(_maps(checkpoint, frame, options))
                progress(done, max(done, video.num_frames))

    count = write_video(file, frames(), video.fps)
    terminal.print(f"{path}: {count} frames at {video.fps:g} per second: {file}")
    if count < video.num_frames:
        terminal.print(f"  the file states {video.num_frames} frames; the others cannot be read", style="yellow")
    return {"video": str(path), "frames": count, "fps": video.fps, "file": str(file)}
