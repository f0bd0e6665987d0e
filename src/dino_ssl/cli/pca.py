"""dino pca: patches of images colored by the principal components of their features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dino_ssl.cli.images import SHEET_PANELS, CheckpointOptions, ShortSide, read_images, run_command
from dino_ssl.evals.attention_maps import attention_size
from dino_ssl.files import mark_output
from dino_ssl.formatting import plural
from dino_ssl.terminal import Terminal
from dino_ssl.viz.pca import patch_colors
from dino_ssl.viz.rendering import save_image, sheet

EXAMPLES = """\
  dino pca runs/photos cat.jpg dog.jpg               colors in pca/
  dino pca dino_vits8 photos/cats -o maps/           all images of a folder, with common components
  dino pca dino_vits8 cat*.jpg --foreground 0.5      the object only; the background is black"""


@dataclass(frozen=True, kw_only=True)
class PcaOptions(CheckpointOptions):
    """Color the patches of images by the principal components of their features.

    Red, green and blue are the first three components of the patches of all images. Similar colors are similar
    features, within and between images. Works with any network.
    """

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, folders or packed datasets, or `scenes`. Use images of the same kind of object."""
    foreground: float | None = None
    """Threshold between 0 and 1 on the first component, e.g. 0.5: patches below it are background, and the components
    are those of the other patches. The side with more border patches is the background."""
    size: ShortSide = None
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "pca"
    """Output folder."""


def pca(argv: Sequence[str]) -> int:
    """Run `dino pca`."""
    return run_command(_pca, PcaOptions, argv, "dino pca", EXAMPLES)


def _pca(options: PcaOptions, terminal: Terminal) -> dict[str, Any]:
    checkpoint = options.open_checkpoint()
    skipped: list[dict[str, str]] = []
    names: list[tuple[str, str]] = []

    def pixels() -> Iterator[np.ndarray]:
        for name, stem, image, _ in read_images(options.images, terminal, "features", skipped, bit_depth):
            names.append((name, stem))
            yield image

    size = options.size or attention_size(checkpoint.backbone.transform.size)
    bit_depth = checkpoint.backbone.transform.bit_depth
    colored, variance = patch_colors(checkpoint.backbone, pixels(), size=size, foreground=options.foreground)
    out, results, blocks = Path(options.out), [], []
    mark_output(out)
    for (name, stem), patches in zip(names, colored, strict=True):
        drawn = patches.draw()
        file = save_image(out / f"{stem}.png", drawn)
        grid, foreground = list(patches.foreground.shape), float(patches.foreground.mean())
        results.append({"image": name, "grid": grid, "file": str(file), "foreground": foreground})
        blocks.append([(Path(name).name, patches.display), ("components", drawn)])
    overview = save_image(out / "all.png", sheet(blocks[: SHEET_PANELS // 2]))
    shares = ", ".join(f"{share:.0%}" for share in variance)
    terminal.print(f"{plural(len(results), 'image')} in {out}/, overview in {overview}")
    terminal.print(f"  red, green and blue have {shares} of the variance of the patches", style="dim")
    named = {"checkpoint": options.checkpoint, "out": options.out}
    return {**named, "variance": variance, "images": results, "skipped": skipped}
