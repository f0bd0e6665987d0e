"""dino attention: what a backbone looks at, in pictures, folders of pictures and videos."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dino_ssl.cli.images import Named, named_images
from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError
from dino_ssl.terminal import Terminal, command_output

if TYPE_CHECKING:
    import numpy as np

    from dino_ssl.viz.attention import Attention

EXAMPLES = """\
  dino attention runs/photos cat.jpg dog.jpg         maps in attention/
  dino attention runs/photos photos/ -o maps/        every picture of a folder
  dino attention runs/photos cat.jpg --point 120 80 --point 300 200
                                                     what these places attend to, a colour each (Fig. 8)
  dino attention dino_vits8 cat.jpg --heads 0 3 5    these heads, and all three in one picture (Fig. 3)
  dino attention dino_vits8 cat.jpg --layer 3 --size 480 -o maps/
  dino attention runs/photos walk.mp4                a film: frame, mean attention, heads in colours
  dino attention runs/photos frames/ --video --fps 10"""

PAGE = 24
"""Pictures in one overview; more go to the next."""
LISTED = 20
"""More pictures than this are told by the progress alone."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Draw what a backbone attends to: each head, their mean, the mask of 60 % of the mass, overlays.

    Of every picture: a folder with one file per panel; and all.png with everything side by side. Of a video: an
    MP4 with frame, mean and heads side by side. A network without attention (a ResNet) shows how alike each place
    is to its pooled feature instead.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    dataset: tyro.conf.Positional[tuple[str, ...]] = ()
    """Picture files, folders of pictures, video files; `scenes` draws pictures."""
    layer: int = -1
    """Block whose attention is drawn: 0 the first, -1 the last."""
    heads: tuple[int, ...] = ()
    """Heads to draw and to average, counted from 0; all without it."""
    point: tyro.conf.UseAppendAction[tuple[tuple[float, float], ...]] = ()
    """X Y in pixels of the picture: draw what this place attends to, instead of the [CLS] token. Give --point again
    for more places: each gets a colour, and all are in one picture."""
    mass: float = 0.6
    """Share of the attention that the masks hold."""
    size: int | None = None
    """Short side in pixels of what the network sees; 480, or twice what it was trained on if that is less."""
    video: Flag = False
    """A folder is a video: its pictures, in the order of their names, are the frames."""
    fps: float | None = None
    """Frames per second of the film; the video's own without it, 25 for a folder of frames."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "attention"
    """Folder for the figures."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def attention(argv: Sequence[str]) -> int:
    options = parse(AttentionOptions, argv, "dino attention", EXAMPLES)
    if not options.dataset:
        raise UserError(
            "Which pictures? Expected files, folders or videos: dino attention CHECKPOINT PICTURE ...\n"
            "An option that takes several values must not stand right before them: pictures first, then --heads 0 3."
        )
    with command_output(options.json) as (terminal, give):
        from dino_ssl.api.calls import open_checkpoint
        from dino_ssl.viz.video import VIDEOS

        films = [
            path for path in map(Path, options.dataset)
            if path.suffix.lower() in VIDEOS or (options.video and path.is_dir())
        ]  # fmt: skip
        with terminal.progress("looking at the pictures") as done:
            dataset = named_images([name for name in options.dataset if Path(name) not in films], done)
        found = open_checkpoint(options.checkpoint)
        result: dict[str, Any] = {"checkpoint": options.checkpoint, "figure": None}
        if dataset:
            result |= _draw(found, dataset, options, terminal)
        names: list[str] = []
        result["videos"] = []
        for film in films:
            names.append(_unique(film.stem, names))
            result["videos"].append(_film(found, film, Path(options.out) / f"{names[-1]}.mp4", options, terminal))
        give(result)
    return 0


def _draw(found: Any, dataset: Sequence[Named], options: AttentionOptions, terminal: Terminal) -> dict[str, Any]:
    """Every picture's panels as files, and the overviews."""
    from dino_ssl.data.dataset import BadImage
    from dino_ssl.viz.rendering import figure, save

    out, page, pages = Path(options.out), [], []
    written: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with terminal.progress("attention") as done:
        for place, seen in enumerate(dataset):
            try:
                maps = _maps(found, seen.read(), options)
            except BadImage as bad:
                skipped.append({"name": seen.name, "reason": bad.reason})
                terminal.print(f"  left out: {seen.name}: {bad.reason}", style="yellow")
            else:
                written.append(_save(seen, maps, out / seen.place, options))
                page.append((Path(seen.name).name, maps))
                if len(dataset) <= LISTED:
                    terminal.print(_sentence(written[-1], options, out / seen.place))
            done(place + 1, len(dataset))
            if page and (len(page) == PAGE or place + 1 == len(dataset)):
                path = out / ("all.png" if not pages else f"all-{len(pages) + 1}.png")
                pages.append(save(path, figure([maps for _, maps in page], names=[name for name, _ in page])))
                page = []
    if not written:
        raise UserError(f"None of the {len(dataset)} pictures could be read, the first: {skipped[0]['reason']}.")
    terminal.print(f"{len(written)} pictures in {out}/; all of it: {', '.join(map(str, pages))}")
    return {"figure": str(pages[0]), "figures": [str(path) for path in pages], "images": written, "skipped": skipped}


def _maps(found: Any, image: "np.ndarray", options: AttentionOptions) -> "Attention | list[Attention]":
    """One map for [CLS] or one point; a list for several points."""
    from dino_ssl.api.calls import attention as attend

    query: Any = "cls" if not options.point else options.point[0] if len(options.point) == 1 else list(options.point)
    heads = options.heads or None
    return attend(found, image, layer=options.layer, heads=heads, point=query, mass=options.mass, size=options.size)


def _save(seen: Named, maps: "Attention | list[Attention]", folder: Path, options: AttentionOptions) -> dict[str, Any]:
    from dino_ssl.viz.rendering import panels, point_panels, save

    drawn = point_panels(maps) if isinstance(maps, list) else panels(maps)
    files = [save(folder / f"{_file(name)}.png", image) for name, image in drawn]
    one = maps[0] if isinstance(maps, list) else maps
    covered = [float(each.mask.mean()) for each in (maps if isinstance(maps, list) else [maps])]
    return {
        "picture": seen.name,
        "heads": len(one.heads),
        "grid": list(one.mean.shape),
        "layer": one.layer,
        "kind": one.kind,
        "points": [list(point) for point in options.point],
        "mask_share": covered[0] if len(covered) == 1 else covered,
        "files": list(map(str, files)),
    }


def _sentence(written: dict[str, Any], options: AttentionOptions, folder: Path) -> str:
    rows, columns = written["grid"]
    shares = written["mask_share"] if isinstance(written["mask_share"], list) else [written["mask_share"]]
    what = f"{written['heads']} heads" if written["kind"] == "attention" else "similarity to the pooled feature"
    of = f" ({len(shares)} points)" if len(shares) > 1 else ""
    covered = ", ".join(f"{share:.0%}" for share in shares)
    return (
        f"{written['picture']}: {what} on {columns}x{rows} patches{of}, "
        f"{options.mass:.0%} of the mass on {covered} of them; {folder}/"
    )


def _film(found: Any, path: Path, target: Path, options: AttentionOptions, terminal: Terminal) -> dict[str, Any]:
    """The video with, beside each frame, its mean attention and its heads (or points) in colours."""
    from dino_ssl.viz.rendering import video_frame
    from dino_ssl.viz.video import open_video, write_video

    film = open_video(path, options.fps)

    def frames() -> Iterator["np.ndarray"]:
        with terminal.progress(f"attention of {path.name}") as done:
            for count, frame in enumerate(film, 1):
                yield video_frame(_maps(found, frame, options))
                done(count, max(count, film.count))

    count = write_video(target, frames(), film.fps)
    terminal.print(f"{path}: {count} frames, {film.fps:g} a second: {target}")
    if count < film.count:
        terminal.print(f"  the file says {film.count} frames; the rest could not be read", style="yellow")
    return {"video": str(path), "frames": count, "fps": film.fps, "file": str(target)}


def _unique(stem: str, taken: Sequence[str]) -> str:
    number, name = 2, stem
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def _file(panel: str) -> str:
    """`mask 60%` -> `mask-60`."""
    return panel.replace("%", "").replace(" ", "-")
