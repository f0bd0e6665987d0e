"""Masks of a whole folder: files are written while the images are segmented, and the same call resumes.

OUT/labels/NAME.png     numbers of the objects, an indexed PNG; the other formats are made from these files
OUT/soft/NAME.png       soft masks
OUT/segments.jsonl      a line per image: digest of its content, number of objects, scores
OUT/settings.json       the network and the settings; others are refused
OUT/exported.json       the classes of the objects in the files of each format
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dino_ssl.config import to_dict
from dino_ssl.data.dataset import BadImage, ImageDataset, Skipped
from dino_ssl.data.folder import FolderDataset
from dino_ssl.data.masks import write_mask
from dino_ssl.data.workers import map_in_order
from dino_ssl.errors import UserError
from dino_ssl.files import append_jsonl, atomic_write, check_format, mark_output, read_json, read_lines, write_json
from dino_ssl.formatting import visible
from dino_ssl.loading import Checkpoint
from dino_ssl.progress import Progress, StartProgress, no_progress
from dino_ssl.segmentation import export
from dino_ssl.segmentation.export import Annotated, FoundObject
from dino_ssl.segmentation.masks import Segmentation, Segmenter, SegmentSettings
from dino_ssl.viz.rendering import save_array, save_image, sheet
from dino_ssl.viz.tracking import overlay_mask

Format = Literal["classes", "coco", "labelme", "yolo", "sheet"]
SoftFormat = Literal["none", "png", "npy"]
FORMAT = 1
"""Version of settings.json."""
PER_IMAGE = {
    "classes": (export.write_class_map, ".png"),
    "labelme": (export.write_labelme, ".json"),
    "yolo": (export.write_yolo, ".txt"),
}
SHEET_IMAGES = 24


@dataclass(frozen=True)
class Item:
    """An image to segment."""

    name: str
    """Its name in the files; unique."""
    stem: str
    """Unique path of its files, relative to the folder of a format and without suffix."""
    dataset: ImageDataset
    index: int
    class_name: str | None = None

    @property
    def source(self) -> Path | None:
        """The image file; None if there is none."""
        return Path(self.dataset.path(self.index)) if isinstance(self.dataset, FolderDataset) else None

    def digest(self) -> str:
        """Return a hash of the file's content, or of the pixels if there is no file. Raises BadImage."""
        try:
            content = self.dataset.encoded(self.index)
        except BadImage:
            content = np.ascontiguousarray(self.dataset.read(self.index)).tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class FolderResult:
    """Images and files of `segment_folder`."""

    segmented: int
    """Images that were new or had changed."""
    unchanged: int
    objects: int
    """In all images."""
    empty: list[Skipped]
    """Images without an object, with the reason."""
    skipped: list[Skipped]
    """Images that could not be segmented."""
    files: dict[str, str]
    """Path of each format."""


def segment_folder(
    checkpoint: Checkpoint,
    items: Sequence[Item],
    settings: SegmentSettings,
    out: Path,
    *,
    soft: SoftFormat = "none",
    formats: Sequence[Format] = (),
    batch_size: int = 8,
    progress: StartProgress = no_progress,
) -> FolderResult:
    """Write the masks of images to a folder; only those that are new, have changed, or lack a file.

    Raises UserError if the folder has masks of other weights or settings.
    """
    if "coco" in formats:
        export.require_pycocotools()
    segmenter = Segmenter(checkpoint.backbone, settings)
    mark_output(out)
    check_settings(out, checkpoint, segmenter)
    lines, skipped = out / "segments.jsonl", list[Skipped]()
    records = {row["stem"]: row for row in read_lines(lines)}  # images of other folders may have the same files
    with progress("checking the files") as show:
        pending = list(_pending(items, records, out, soft, segmenter, skipped, show))
    with progress("masks") as show:
        done = 0
        for batch, digests, images in _read_batches(pending, batch_size, skipped):
            results = segmenter(images) if images else []
            for item, digest, result in zip(batch, digests, results, strict=True):
                _write_masks(out, item, result, soft)
                objects = [
                    {"number": int(number), "score": round(float(score), 4), "class": name}
                    for number, score, name in zip(result.numbers, result.scores, result.classes, strict=True)
                ]
                names = {"name": item.name, "image": item.dataset.names[item.index], "stem": item.stem}
                row = {**names, "digest": digest, "objects": objects, "note": result.note}
                append_jsonl(lines, row)
                records[item.stem] = row
                done += 1
            show(done + len(skipped), len(pending) + len(skipped))
    failed = {skip.name for skip in skipped}
    annotated = [
        Annotated(item.name, item.stem, item.source, labels_path(out, item), _found(record, item))
        for item in items
        if item.name not in failed and (record := records.get(item.stem)) is not None
    ]
    empty = [Skipped(each.name, records[each.stem]["note"]) for each in annotated if not each.found]
    files = {"labels": f"{out}/labels"} | ({"soft": f"{out}/soft"} if soft != "none" else {})
    files |= export_all(out, annotated, items, formats, segmenter.head.classes if segmenter.head else ())
    objects = sum(len(each.found) for each in annotated)
    return FolderResult(done, len(annotated) - done, objects, empty, skipped, files)


def _found(record: Mapping[str, Any], item: Item) -> list[FoundObject]:
    return [FoundObject(each["number"], each["score"], each["class"] or item.class_name) for each in record["objects"]]


def check_settings(out: Path, checkpoint: Checkpoint, segmenter: Segmenter) -> None:
    """Write settings.json, or raise UserError if the folder has masks of other weights or settings."""
    settings, head = segmenter.settings, segmenter.head
    digest = None if head is None else hashlib.sha256(head.weight.numpy().tobytes()).hexdigest()[:16]
    used = {**to_dict(settings), "size": segmenter.size, "head": digest}
    current = {"format": FORMAT, "weights": checkpoint.hash, "settings": used}
    path = out / "settings.json"
    if (stored := read_json(path)) is None:
        write_json(path, {**current, "checkpoint": checkpoint.source})
        return
    check_format(path, stored.get("format"), FORMAT)
    old, new = _flat(stored.get("settings", {})), _flat(current["settings"])
    changes = [f"{name} {old.get(name)} instead of {new[name]}" for name in new if old.get(name) != new[name]]
    if stored.get("weights") != checkpoint.hash:
        changes.insert(0, f"the weights of {stored.get('checkpoint')} ({stored.get('weights')})")
    if changes:
        raise UserError(f"{out} has masks with {', '.join(changes)}. Choose a different `out`, or remove the folder.")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested = {name: value for part in settings.values() if isinstance(part, dict) for name, value in part.items()}
    own = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    return {name: value for name, value in (own | nested).items() if name != "type"}


def labels_path(out: Path, item: Item) -> Path:
    """Return the path of an image's label map."""
    return out / "labels" / f"{item.stem}.png"


def _pending(
    items: Sequence[Item],
    records: Mapping[str, Any],
    out: Path,
    soft: SoftFormat,
    segmenter: Segmenter,
    skipped: list[Skipped],
    show: Progress,
) -> Iterator[tuple[tuple[int, int], Item]]:
    """Yield (grid of patches, item) of the images without up-to-date files; skip images that are too long."""
    for done, item in enumerate(items, 1):
        record = records.get(item.stem)
        try:
            files = [labels_path(out, item)] + ([out / "soft" / f"{item.stem}.{soft}"] if soft != "none" else [])
            if not (record and all(file.is_file() for file in files) and item.digest() == record["digest"]):
                width, height = item.dataset.sizes[item.index].tolist()
                yield segmenter.grid(height, width), item
        except BadImage as error:
            skipped.append(Skipped(item.name, error.reason))
        show(done, len(items))


def _read_batches(
    pending: Sequence[tuple[tuple[int, int], Item]], batch_size: int, skipped: list[Skipped]
) -> Iterator[tuple[list[Item], list[str], list[np.ndarray]]]:
    """Yield (items, digests, images) whose network inputs have one shape; images are read ahead by a thread."""

    def read(item: Item) -> tuple[Item, str, np.ndarray] | Skipped:
        try:
            return item, item.digest(), item.dataset.read(item.index)
        except BadImage as error:
            return Skipped(item.name, error.reason)

    ordered = sorted(pending, key=lambda pair: pair[0])
    images = map_in_order(read, (item for _, item in ordered), threads=1)
    for _, group in groupby(ordered, key=lambda pair: pair[0]):
        remaining = len(list(group))
        while remaining:
            batch = [next(images) for _ in range(min(batch_size, remaining))]
            remaining -= len(batch)
            skipped += [each for each in batch if isinstance(each, Skipped)]
            readable = [each for each in batch if not isinstance(each, Skipped)]
            yield [each[0] for each in readable], [each[1] for each in readable], [each[2] for each in readable]


def _write_masks(out: Path, item: Item, result: Segmentation, soft: SoftFormat) -> None:
    path = out / "soft" / f"{item.stem}.{soft}"
    if soft == "png":
        strongest = result.soft.max(axis=0, initial=0)
        save_image(path, (255 * strongest).round().astype(np.uint8))
    elif soft == "npy":
        save_array(path, result.soft.astype(np.float16))
    write_mask(labels_path(out, item), result.labels)


def export_all(
    out: Path,
    annotated: Sequence[Annotated],
    items: Sequence[Item],
    formats: Sequence[Format],
    head_classes: Sequence[str],
) -> dict[str, str]:
    """Write the masks in other formats; files of one image only if its label map is newer or its classes are others."""
    assigned = {each.stem: [found.class_name for found in each.found] for each in annotated}
    classes = list(head_classes) or sorted({name for names in assigned.values() for name in names if name is not None})
    listed = out / "classes.txt"
    text = "".join(f"{visible(name)}\n" for name in classes or [export.OBJECT])
    if formats and not (listed.is_file() and listed.read_text(encoding="utf-8") == text):
        atomic_write(listed, lambda part: part.write_text(text, encoding="utf-8"))
    exported: dict[str, Any] = read_json(out / "exported.json") or {"format": FORMAT}
    check_format(out / "exported.json", exported.get("format"), FORMAT)
    files = {}
    for kind in (kind for kind in formats if kind in PER_IMAGE):
        write, suffix = PER_IMAGE[kind]
        state = exported.get(kind, {})
        known = state["assigned"] if state.get("classes") == classes else {}
        for each in annotated:
            path = out / kind / f"{each.stem}{suffix}"
            is_same = known.get(each.stem) == assigned[each.stem] and path.is_file()
            if not is_same or path.stat().st_mtime_ns < each.labels.stat().st_mtime_ns:
                write(path, each, classes)
        if state != (current := {"classes": classes, "assigned": known | assigned}):
            exported[kind] = current
            write_json(out / "exported.json", exported)
        files[kind] = f"{out}/{kind}"
    if "coco" in formats:
        files["coco"] = str(export.write_coco(out / "coco.json", annotated, classes))
    if "sheet" in formats and annotated:
        files["sheet"] = str(save_image(out / "sheet.png", _sheet(annotated, items)))
    return files


def _sheet(annotated: Sequence[Annotated], items: Sequence[Item]) -> np.ndarray:
    """Return the first images with their objects in color."""
    by_name = {item.name: item for item in items}
    panels = []
    for each in annotated[:SHEET_IMAGES]:
        item = by_name[each.name]
        panels.append((Path(each.name).name, overlay_mask(item.dataset.read(item.index), each.read())))
    return sheet([panels])
