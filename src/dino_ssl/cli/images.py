"""Arguments and helpers of the commands that read a checkpoint and images."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from dino_ssl.config import import_type
from dino_ssl.terminal import Terminal

if TYPE_CHECKING:
    import numpy as np

    from dino_ssl.data.dataset import DatasetConfig, Skipped

Checkpoint = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(help="A run folder, a weights file, a released network (dino_vits16) or timm:NAME."),
]
DatasetName = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
        help="A folder of images, with or without class folders, a packed dataset, `scenes`, or MODULE:CLASS."
    ),
]
InputSize = Annotated[
    int | None, tyro.conf.arg(help="Side in pixels of the network input. Default: the training size.")
]
ShortSide = Annotated[
    int | None,
    tyro.conf.arg(
        help="Short side in pixels of the network input; larger inputs give finer maps. Default: 480, or twice the "
        "training size if that is below 224."
    ),
]
BatchSize = Annotated[int, tyro.conf.arg(help="Images per forward pass.")]
Workers = Annotated[int, tyro.conf.arg(help="Worker processes that decode images; 0 decodes in the main process.")]
Json = Annotated[
    tyro.conf.FlagCreatePairsOff[bool],
    tyro.conf.arg(help="Print one JSON object to standard output, and messages to standard error."),
]
Trust = Annotated[
    tyro.conf.FlagCreatePairsOff[bool],
    tyro.conf.arg(help="Import types from outside the package that the checkpoint names, which runs their code."),
]

NUM_SCENES = 12
"""Number of images that `scenes` generates in commands that write files for each image."""
MAX_SKIPPED_LINES = 5


class NamedImage(NamedTuple):
    """An image of the command line."""

    name: str
    """In messages."""
    stem: str
    """Unique path of its output, relative to the output folder and without suffix."""
    read: Callable[[], "np.ndarray"]
    """Returns uint8 [H, W, 3] RGB. Raises UserError for a file named on the command line, BadImage otherwise."""


def dataset_named(name: str) -> "str | DatasetConfig":
    """Return the settings of a dataset from outside the package, MODULE:CLASS; any other name unchanged."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) or Path(name).exists():
        return name
    from dino_ssl.data.dataset import DatasetConfig

    kind: Any = import_type(name, DatasetConfig)
    return kind()


def named_images(names: Sequence[str], terminal: Terminal, skipped: list[dict[str, str]]) -> list[NamedImage]:
    """Return the named image files, and all images of the named datasets; extend `skipped` by what they skip."""
    from dino_ssl.api.calls import read_image
    from dino_ssl.data.decode import SUFFIXES
    from dino_ssl.data.sources import WORDS, open_dataset

    images: list[NamedImage] = []
    stems: set[str] = set()
    for name in names:
        path = Path(name)
        if path.is_file() or (path.suffix.lower() in SUFFIXES and not path.is_dir()):
            read_image(name)  # report a bad file before any work
            images.append(NamedImage(name, unique_name(path.stem, stems), lambda name=name: read_image(name)))
            continue
        with terminal.progress(f"reading {name}") as progress:
            dataset = open_dataset(dataset_named(name), progress, part="val" if name in WORDS else "train")
        skipped += report_skipped(dataset.skipped, terminal)
        for index in range(min(len(dataset), NUM_SCENES) if name in WORDS else len(dataset)):
            inner = dataset.names[index]
            stem = unique_name(str(Path(inner).with_suffix("")), stems)
            images.append(NamedImage(f"{name.rstrip('/')}/{inner}", stem, lambda d=dataset, i=index: d.read(i)))
    return images


def unique_name(name: str, taken: set[str]) -> str:
    """Return the name, with -2, -3, ... if it is taken, and add the result to `taken`."""
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    return unique


def read_images(
    images: Sequence[NamedImage], terminal: Terminal, label: str, skipped: list[dict[str, str]]
) -> Iterator[tuple[NamedImage, "np.ndarray"]]:
    """Yield the readable images with a progress bar; append the others to `skipped` and print them."""
    from dino_ssl.data.dataset import BadImage

    with terminal.progress(label) as progress:
        for done, image in enumerate(images, 1):
            try:
                pixels = image.read()
            except BadImage as error:
                skipped.append({"name": image.name, "reason": error.reason})
                terminal.print(f"  skipped: {image.name}: {error.reason}", style="yellow")
            else:
                yield image, pixels
            progress(done, len(images))


def report_skipped(skipped: Sequence["Skipped"], terminal: Terminal) -> list[dict[str, str]]:
    """Print the first skipped images, and return all of them for the JSON result."""
    for item in skipped[:MAX_SKIPPED_LINES]:
        terminal.print(f"  skipped: {item.name}: {item.reason}", style="yellow")
    if len(skipped) > MAX_SKIPPED_LINES:
        terminal.print(f"  ... {len(skipped)} skipped in total; --json lists them", style="yellow")
    return [{"name": item.name, "reason": item.reason} for item in skipped]
