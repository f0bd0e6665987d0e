"""dino attention: what a backbone looks at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dino.cli.options import Switch, parse
from dino.errors import UserError
from dino.terminal import speaking

EXAMPLES = """\
  dino attention runs/photos cat.jpg dog.jpg         maps in attention/
  dino attention runs/photos cat.jpg --point 120 80  what the patch at this place attends to (Fig. 8)
  dino attention dino_vits8 cat.jpg --layer 3 --size 480 -o maps/"""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Draw what a backbone attends to: every head, their mean, the mask of 60 % of the mass, overlays."""

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    pictures: tyro.conf.Positional[tuple[str, ...]] = ()
    """Picture files."""
    layer: int = -1
    """Block whose attention is drawn: 0 the first, -1 the last."""
    point: tuple[float, float] | None = None
    """X Y in pixels of the picture: draw what this place attends to, instead of the [CLS] token."""
    mass: float = 0.6
    """Share of the attention that the masks hold."""
    size: int | None = None
    """Short side in pixels of what the network sees; 480, or twice what it was trained on if that is less."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "attention"
    """Folder for the figures."""
    json: Switch = False
    """One JSON object on standard output, messages on standard error."""


def attention(argv: Sequence[str]) -> int:
    options = parse(AttentionOptions, argv, "dino attention", EXAMPLES)
    if not options.pictures:
        raise UserError("Which pictures? Expected files: dino attention CHECKPOINT PICTURE ...")
    with speaking(options.json) as (terminal, give):
        from dino.analysis.render import figure, panels, save
        from dino.api import attention as attend
        from dino.api import open_checkpoint, read_picture

        images = [(Path(name), read_picture(name)) for name in options.pictures]
        found = open_checkpoint(options.checkpoint)
        folder, seen, written = Path(options.out), [], []
        for place, (path, image) in enumerate(images):
            maps = attend(
                found,
                image,
                layer=options.layer,
                point=options.point or "cls",
                mass=options.mass,
                size=options.size,
            )
            seen.append(maps)
            own = folder / _unique(path.stem, [other.stem for other, _ in images[:place]])
            files = [save(own / f"{_file(name)}.png", drawn) for name, drawn in panels(maps)]
            covered = float(maps.mask.mean())
            terminal.say(
                f"{path}: {len(maps.heads)} heads on {maps.mean.shape[1]}x{maps.mean.shape[0]} patches, "
                f"{options.mass:.0%} of the mass on {covered:.0%} of them; {own}/"
            )
            written.append({
                "picture": str(path),
                "heads": len(maps.heads),
                "grid": list(maps.mean.shape),
                "layer": maps.layer,
                "kind": maps.kind,
                "mask_share": covered,
                "files": list(map(str, files)),
            })  # fmt: skip
        page = save(folder / "all.png", figure(seen, names=[path.name for path, _ in images]))
        terminal.say(f"All of it: {page}")
        give({"checkpoint": options.checkpoint, "figure": str(page), "pictures": written})
    return 0


def _unique(stem: str, taken: list[str]) -> str:
    return stem if stem not in taken else f"{stem}-{taken.count(stem) + 1}"


def _file(panel: str) -> str:
    """`mask 60%` -> `mask-60`."""
    return panel.replace("%", "").replace(" ", "-")
