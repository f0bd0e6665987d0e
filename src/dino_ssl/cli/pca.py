"""dino pca: patches of images colored by the principal components of their features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dino_ssl.cli.images import Checkpoint, Json, NamedImage, ShortSide, Trust, named_images, read_images
from dino_ssl.cli.options import parse
from dino_ssl.errors import UserError
from dino_ssl.terminal import command_output

EXAMPLES = """\
  dino pca runs/photos cat.jpg dog.jpg               colors in pca/
  dino pca dino_vits8 photos/cats -o maps/           all images of a folder, with common components
  dino pca dino_vits8 cat*.jpg --foreground 0.5      the object only; the background is black"""

SHEET_IMAGES = 24
"""Images in the overview."""


@dataclass(frozen=True, kw_only=True)
class PcaOptions:
    """Color the patches of images by the principal components of their features.

    Red, green and blue are the first three components of the patches of all images. Similar colors are similar
    features, within and between images. Works with any network.
    """

    checkpoint: Checkpoint
    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, folders or packed datasets, or `scenes`. Use images of the same kind of object."""
    foreground: float | None = None
    """Threshold between 0 and 1 on the first component, e.g. 0.5: patches below it are background, and the components
    are those of the other patches. The side with more border patches is the background."""
    size: ShortSide = None
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "pca"
    """Output folder."""
    trust: Trust = False
    json: Json = False


def pca(argv: Sequence[str]) -> int:
    """Run `dino pca`."""
    options = parse(PcaOptions, argv, "dino pca", EXAMPLES)
    if not options.images:
        raise UserError("No images: expected files or folders: dino pca CHECKPOINT IMAGE ...")
    with command_output(options.json) as (terminal, write_result):
        from dino_ssl.api.calls import open_checkpoint
        from dino_ssl.evals.attention_maps import attention_size
        from dino_ssl.viz.pca import patch_colors
        from dino_ssl.viz.rendering import patch_color_image, sheet
        from dino_ssl.viz.saving import save_image

        readable: list[NamedImage] = []
        skipped: list[dict[str, str]] = []
        images = named_images(options.images, terminal, skipped)
        checkpoint = open_checkpoint(options.checkpoint, trust=options.trust)
        pixels = (
            (readable.append(image), array)[1] for image, array in read_images(images, terminal, "features", skipped)
        )
        size = options.size or attention_size(checkpoint.size)
        colors, variance = patch_colors(checkpoint.backbone, pixels, size=size, foreground=options.foreground)
        out, results, blocks = Path(options.out), [], []
        for image, patches in zip(readable, colors, strict=True):
            colored = patch_color_image(patches.colors, patches.foreground, patches.display.shape[:2])
            file = save_image(out / f"{image.stem}.png", colored)
            results.append({
                "image": image.name, "grid": list(patches.foreground.shape), "file": str(file),
                "foreground": float(patches.foreground.mean()),
            })  # fmt: skip
            blocks.append([("image", patches.display), ("components", colored)])
        names = [Path(image.name).name for image in readable]
        overview = save_image(out / "all.png", sheet(blocks[:SHEET_IMAGES], names=names))
        shares = ", ".join(f"{share:.0%}" for share in variance)
        terminal.print(f"{len(results)} images in {out}/, overview in {overview}")
        terminal.print(f"  red, green and blue have {shares} of the variance of the patches", style="dim")
        write_result({
            "checkpoint": options.checkpoint, "out": options.out, "variance": variance, "images": results,
            "skipped": skipped,
        })  # fmt: skip
    return 0
