"""Options and helpers of the commands that read a checkpoint and images."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from dino_ssl.api.calls import Embedding, embed
from dino_ssl.cli.options import Device, Json, NumHeads, Trust, Weights, parse
from dino_ssl.config import import_type
from dino_ssl.data.benchmarks.voc import Masked
from dino_ssl.data.dataset import BadImage, DatasetConfig, ImageDataset, Skipped
from dino_ssl.data.image_header import SUFFIXES
from dino_ssl.data.sources import WORDS, open_dataset
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_maps import check_ratio
from dino_ssl.files import check_writable
from dino_ssl.loading import Checkpoint, open_checkpoint
from dino_ssl.names import is_import
from dino_ssl.terminal import Terminal, command_output, is_rank0

ShortSide = Annotated[
    int | None,
    tyro.conf.arg(help="Short side in pixels of the network input. Default: 480, or twice a training size below 224."),
]

NamedImages = Iterator[tuple[str, str, np.ndarray, np.ndarray | None]]
"""Name, stem, pixels and mask of images; see `read_images`."""
NUM_SCENES = 12
"""Number of images that `scenes` generates in commands that write files for each image."""
SHEET_PANELS = 120
"""Panels in the overview that `dino attention` and `dino pca` write: those of the first images."""
MAX_SKIPPED_LINES = 5


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Options of every command that reads a checkpoint."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    weights: Weights = "last"
    num_heads: NumHeads = None
    device: Device = None
    trust: Trust = False
    json: Json = False

    def open_checkpoint(self) -> Checkpoint:
        """Load the checkpoint, and move it to the device."""
        settings: dict[str, Any] = dict(weights=self.weights, num_heads=self.num_heads, trust=self.trust)
        return open_checkpoint(self.checkpoint, self.device, **settings)


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(CheckpointOptions):
    """Options of every command that computes the features of a dataset."""

    dataset: tyro.conf.Positional[str]
    """A folder of images, with or without class folders, a packed dataset, `scenes`, or MODULE:CLASS."""
    size: int | None = None
    """Side in pixels of the network input. Default: the size at which the run evaluates its network."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 0
    """Worker processes that decode images; 0 decodes in the main process."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Precision of forward passes. Default: bfloat16 if the device supports it, otherwise float32."""


def run_command(
    command: Callable[[Any, Terminal], dict[str, Any]], kind: type, argv: Sequence[str], prog: str, examples: str
) -> int:
    """Call a command with its parsed options, print the result if `--json` is given, and return exit code 0."""
    options: Any = parse(kind, argv, prog, examples)
    with command_output(options.json) as (terminal, write_result):
        write_result(command(options, terminal))
    return 0


def compute_features(
    options: DatasetOptions,
    dataset: str | DatasetConfig | ImageDataset,
    terminal: Terminal,
    partial: Path | None = None,
) -> tuple[Checkpoint, Embedding]:
    """Return the opened checkpoint and its features of a dataset; partial: see `embed`."""
    checkpoint = options.open_checkpoint()
    names = ("size", "batch_size", "workers", "device", "precision")
    settings: Any = {name: getattr(options, name) for name in names}
    with terminal.progress("features") as progress:
        return checkpoint, embed(checkpoint, dataset, progress=progress, partial=partial, **settings)


@contextmanager
def partial_features(path: Path, terminal: Terminal) -> Iterator[Path]:
    """Yield the folder that keeps the features until `path` is written; after an interruption, it stays."""
    folder = path.with_name(f"{path.name}.partial")
    try:
        yield folder
    except KeyboardInterrupt:
        terminal.print(f"Interrupted; the same command resumes from {folder}.", style="yellow")
        raise
    if is_rank0():
        shutil.rmtree(folder, ignore_errors=True)  # there is none if the features are read from a file


def check_output_file(path: str | None) -> None:
    """Raise UserError if a page or a table cannot be written, or would replace an image that was named by mistake."""
    if path is None:
        return
    if Path(path).suffix.lower() in SUFFIXES:
        raise UserError(f"{path} has the name of an image. Expected a new file, such as result.html or result.csv.")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder. Expected a new file in it, such as {Path(path) / 'result.html'}.")
    check_writable(Path(path).parent)


def dataset_named(name: str) -> str | DatasetConfig:
    """Return the settings of a dataset from outside the package, MODULE:CLASS; any other name unchanged."""
    if not is_import(name):
        return name
    kind: Any = import_type(name, DatasetConfig)
    return kind()


class ListedImage(NamedTuple):
    """An image of a named file or dataset."""

    name: str
    """The file, or DATASET/NAME."""
    stem: str
    """Unique path of its output, relative to the output folder and without suffix."""
    dataset: ImageDataset
    index: int


def list_images(
    names: Sequence[str], terminal: Terminal, skipped: list[dict[str, str]], bit_depth: int | None = None
) -> list[ListedImage]:
    """Return each named image file and all images of the named datasets; print what is skipped and append it.

    bit_depth: that of the network's training. Raises UserError for a named file that is no image, and if there is none.
    """
    images: list[ListedImage] = []
    stems: set[str] = set()
    for name in names:
        is_file = Path(name).is_file() or (Path(name).suffix.lower() in SUFFIXES and not Path(name).is_dir())
        source, part = [name] if is_file else dataset_named(name), "val" if name in WORDS else "train"
        with terminal.progress(f"reading {name}") as progress:
            dataset = open_dataset(source, progress, part=part).with_bit_depth(bit_depth)
        skipped += report_skipped(dataset.skipped, terminal)
        for index in range(min(len(dataset), NUM_SCENES) if name in WORDS else len(dataset)):
            inner = Path(name).name if is_file else dataset.names[index]
            full = name if is_file else f"{name.rstrip('/')}/{inner}"
            images.append(ListedImage(full, unique_name(str(Path(inner).with_suffix("")), stems), dataset, index))
    if not images:
        raise UserError("No images: expected image files or folders, before options with several values like --heads.")
    return images


def read_images(
    names: Sequence[str],
    terminal: Terminal,
    label: str,
    skipped: list[dict[str, str]],
    bit_depth: int | None = None,
) -> NamedImages:
    """Yield (name, stem, uint8 RGB [H, W, 3], mask) of the images of `list_images`.

    mask: uint8 [H, W], positive on objects; None if the dataset has no masks. Unreadable images of a dataset are
    printed and appended to `skipped`. Raises UserError if no image is left.
    """
    images, num_read = list_images(names, terminal, skipped, bit_depth), 0
    with terminal.progress(label) as progress:
        for done, (name, stem, dataset, index) in enumerate(images, 1):
            try:
                pixels, mask = dataset.read(index), dataset.mask(index) if isinstance(dataset, Masked) else None
                check_ratio(name, *pixels.shape[:2])
            except BadImage as error:
                skipped += report_skipped([Skipped(name, error.reason)], terminal)
            else:
                num_read += 1
                yield name, stem, pixels, mask
            progress(done, len(images))
    if not num_read:
        raise UserError(f"None of the {len(images)} images can be read.")


def unique_name(name: str, taken: set[str]) -> str:
    """Return the name, with -2, -3, ... if it is taken, and add the result to `taken`."""
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    return unique


def report_skipped(skipped: Sequence[Skipped], terminal: Terminal) -> list[dict[str, str]]:
    """Print the first skipped images, and return all of them for the JSON result."""
    for item in skipped[:MAX_SKIPPED_LINES]:
        terminal.print(f"  skipped: {item.name}: {item.reason}", style="yellow")
    if len(skipped) > MAX_SKIPPED_LINES:
        terminal.print(f"  ... {len(skipped)} skipped in total; --json lists them", style="yellow")
    return [{"name": item.name, "reason": item.reason} for item in skipped]
