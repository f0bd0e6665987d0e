"""dino pca: the patches of pictures as colours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dino_ssl.cli.images import Named, named_images
from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError
from dino_ssl.terminal import command_output

if TYPE_CHECKING:
    import numpy as np

    from dino_ssl.viz.pca import PatchColours

EXAMPLES = """\
  dino pca runs/photos cat.jpg dog.jpg               colours in pca/
  dino pca dino_vits8 photos/cats -o maps/           the pictures of a folder, all in the same colours
  dino pca dino_vits8 cat*.jpg --foreground 0.5      the thing alone: what is background stays black"""


SHOWN = 24
"""Pictures in the overview."""


@dataclass(frozen=True, kw_only=True)
class PcaOptions:
    """Colour each patch by its feature: the three first principal components of all pictures' patches together are
    red, green and blue, so that like colours are like features, also between pictures. Any network will do.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    dataset: tyro.conf.Positional[tuple[str, ...]] = ()
    """Picture files and folders of pictures; take pictures of the same kind of thing."""
    foreground: float | None = None
    """From 0 to 1: leave out the patches whose first component is below it, and take the components of the rest; try
    0.5. The side that has the pictures' borders counts as background."""
    size: int | None = None
    """Short side in pixels of what the network sees; 480, or twice what it was trained on if that is less."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "pca"
    """Folder for the figures."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def pca(argv: Sequence[str]) -> int:
    options = parse(PcaOptions, argv, "dino pca", EXAMPLES)
    if not options.dataset:
        raise UserError("Which pictures? Expected files or folders: dino pca CHECKPOINT PICTURE ...")
    with command_output(options.json) as (terminal, give):
        from dino_ssl.api.calls import open_checkpoint
        from dino_ssl.data.dataset import BadImage
        from dino_ssl.evals.attention_masks import size_to_look_at
        from dino_ssl.viz.pca import patch_colours

        with terminal.progress("looking at the pictures") as done:
            dataset = named_images(options.dataset, done)
        found = open_checkpoint(options.checkpoint)
        there: list[Named] = []
        skipped: list[dict[str, str]] = []

        def images() -> Iterator["np.ndarray"]:
            with terminal.progress("features") as done:
                for count, seen in enumerate(dataset, 1):
                    try:
                        image = seen.read()
                    except BadImage as bad:
                        skipped.append({"name": seen.name, "reason": bad.reason})
                        terminal.print(f"  left out: {seen.name}: {bad.reason}", style="yellow")
                        continue
                    there.append(seen)
                    yield image
                    done(count, len(dataset))

        size = options.size or size_to_look_at(found.size)
        coloured, share = patch_colours(found.backbone, images(), size=size, foreground=options.foreground)
        page, written = _save(Path(options.out), there, coloured)
        told = ", ".join(f"{part:.0%}" for part in share)
        terminal.print(f"{len(written)} pictures in {options.out}/; all of it: {page}")
        terminal.print(f"  red, green and blue hold {told} of the patches' variance", style="dim")
        give({
            "checkpoint": options.checkpoint, "figure": str(page), "variance": share, "images": written,
            "skipped": skipped,
        })  # fmt: skip
    return 0


def _save(out: Path, there: "Sequence[Named]", coloured: "Sequence[PatchColours]") -> tuple[Path, list[dict[str, Any]]]:
    """Each picture's colours as a file, and the overview of the first ones."""
    from dino_ssl.viz.rendering import coloured_patches, save, sheet

    written, blocks = [], []
    for seen, one in zip(there, coloured, strict=True):
        drawn = coloured_patches(one.colours, one.foreground, one.shown.shape[:2])
        written.append({
            "picture": seen.name, "grid": list(one.foreground.shape), "foreground": float(one.foreground.mean()),
            "file": str(save(out / f"{seen.place}.png", drawn)),
        })  # fmt: skip
        if len(blocks) < SHOWN:
            blocks.append([("picture", one.shown), ("components", drawn)])
    return save(out / "all.png", sheet(blocks, names=[Path(seen.name).name for seen in there])), written
