"""dino segment: masks of objects without labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow.csv
import tyro

from dino_ssl.cli.images import CheckpointOptions, list_images, report_skipped, run_command
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import check_writable
from dino_ssl.formatting import plural
from dino_ssl.segmentation.folder import Format, Item, SoftFormat, segment_folder
from dino_ssl.segmentation.masks import SegmentSettings
from dino_ssl.terminal import Terminal

EXAMPLES = """\
  dino segment runs/photos photos/ -o masks             label maps and an overview; the same command resumes
  dino segment dino_vits16 photos/ -o masks --formats coco labelme yolo sheet
  dino segment runs/photos cat.jpg --method maskcut     up to three objects
  dino segment runs/photos cat.jpg --method attention --attention-head 2 --mass 0.8
  dino segment runs/photos photos/ -o masks --classes clusters.csv --formats classes    of `dino clusters`
  dino segment runs/photos photos/ -o masks --head runs/photos/evals/weak-segmentation-tokencut.safetensors"""


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(CheckpointOptions):
    """Write masks of the objects in images, without labels: TokenCut, MaskCut, LOST, or the mask of the attention.

    OUT/labels/ gets an indexed PNG per image, at its own size as viewed (after its EXIF orientation): 0 the
    background, 1, 2, ... the objects. Other formats are made from these files. After an interruption, or with new or
    changed images, the same command computes only what is missing.
    """

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, folders or packed datasets, or `scenes`."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "segments"
    """Output folder."""
    settings: Annotated[SegmentSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=SegmentSettings)
    formats: tuple[Format, ...] = ("sheet",)
    """Also write: classes (maps of class numbers), coco (coco.json; needs pycocotools), labelme (polygons), yolo
    (boxes), sheet (an overview of the first images)."""
    soft: SoftFormat = "none"
    """Also write soft masks: png (0 to 255, one file per image) or npy (float16 [objects, height, width])."""
    classes: str = "folders"
    """Names of the objects: folders (class folders, if there are some), none, or a CSV file with the columns name and
    cluster, of `dino clusters`."""
    batch_size: int = 8
    """Images of one shape per forward pass."""

    def __post_init__(self) -> None:
        check_range(self, "batch_size", least=1)


def segment(argv: Sequence[str]) -> int:
    """Run `dino segment`."""
    return run_command(_segment, SegmentOptions, argv, "dino segment", EXAMPLES)


def _segment(options: SegmentOptions, terminal: Terminal) -> dict[str, Any]:
    out, unused = Path(options.out), list[dict[str, str]]()
    check_writable(out)
    clusters = None if options.classes in ("folders", "none") else read_clusters(Path(options.classes))
    checkpoint, items = options.open_checkpoint(), []
    bit_depth = checkpoint.backbone.transform.bit_depth
    for name, stem, dataset, index in list_images(options.images, terminal, unused, bit_depth):
        inner, label = dataset.names[index], -1 if dataset.labels is None else int(dataset.labels[index])
        class_name = dataset.classes[label] if options.classes == "folders" and label >= 0 else None
        items.append(Item(name, stem, dataset, index, clusters.get(inner) if clusters is not None else class_name))
    if clusters is not None and not any(item.class_name for item in items):
        raise UserError(f"{options.classes} names none of the {plural(len(items), 'image')}; its names are relative.")
    settings: Any = dict(soft=options.soft, formats=options.formats, batch_size=options.batch_size)
    result = segment_folder(checkpoint, items, options.settings, out, progress=terminal.progress, **settings)
    skipped = report_skipped(result.skipped, terminal)
    empty = result.empty
    for item in empty[:5]:
        terminal.print(f"  empty mask: {item.name}: {item.reason}", style="yellow")
    if len(empty) > 5:
        terminal.print(f"  ... {len(empty)} empty masks in total; --json lists them", style="yellow")
    total = result.segmented + result.unchanged
    unchanged = f", {result.unchanged:,} of them unchanged" if result.unchanged else ""
    terminal.print(f"{plural(result.objects, 'object')} in {plural(total, 'image')}{unchanged}:")
    for kind, path in result.files.items():
        terminal.print(f"  {kind:<8} {path}{'' if Path(path).suffix else '/'}")
    if not total:
        raise UserError(f"Of {plural(len(items), 'image')}, none can be segmented.")
    return {
        "checkpoint": options.checkpoint,
        "out": options.out,
        "images": total,
        "segmented": result.segmented,
        "unchanged": result.unchanged,
        "objects": result.objects,
        "empty": [item._asdict() for item in empty],
        "files": result.files,
        "skipped": unused + skipped,
    }


def read_clusters(path: Path) -> Mapping[str, str]:
    """Return the cluster of each image, by its name in the dataset. Raises UserError if the columns are missing."""
    if not path.is_file():
        raise UserError(f"`classes` expected folders, none, or a CSV file; there is no file {path}.")
    text = pyarrow.csv.ConvertOptions(column_types={"name": pyarrow.string(), "cluster": pyarrow.string()})
    try:
        table = pyarrow.csv.read_csv(path, convert_options=text).select(["name", "cluster"])
    except (pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path}: expected a CSV file with the columns name and cluster ({error}).") from error
    names, clusters = (column.to_pylist() for column in table.columns)
    return {str(name).removeprefix("'"): f"cluster {cluster}" for name, cluster in zip(names, clusters, strict=True)}
