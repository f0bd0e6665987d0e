"""Packing a folder of images into tar shards.

Shards are written one after the other into `OUT.part`, each of them atomically; a stopped run continues after the last
one. Its result has the same bytes as that of an uninterrupted run. The directory is renamed at the end.
"""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from dino_ssl.config import differences, to_dict
from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.decode import decode, probe
from dino_ssl.data.folder import Folder
from dino_ssl.data.shard_index import ImageRow, map_in_order, scan_shard, write_index
from dino_ssl.data.shards import INFO, PackSettings, ShardDataset, ShardInfo, read_info, write_info
from dino_ssl.errors import UserError
from dino_ssl.files import PART, atomic_write, remove_parts, write_errors, write_json
from dino_ssl.progress import Progress

SHARD = "shard-{:06d}.tar"
THREADS = min(16, 4 + (os.cpu_count() or 1))  # mostly waiting for disks
EXTENSIONS = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "apng": "png", "dib": "bmp", "tif": "tiff"}
"""Extensions of members in the spelling that other readers expect."""
Stored = tuple[bytes, tuple[int, int], str]
"""An image file as it is stored: its bytes, (width, height) and extension."""


def pack(
    source: str | Path, out: str | Path, settings: PackSettings | None = None, progress: Progress | None = None
) -> ShardDataset:
    """Write the images of the folder `source` as tar shards into the directory `out`, and open it.

    The dataset equals that of the folder, except for images that `settings` makes smaller. A run that was stopped is
    resumed; if `out` is complete, nothing is written. Raises UserError if the folder or the settings are not those that
    `out` was started with, or if a file cannot be read or written.

    Args:
        source: a folder of images, or shards.
        out: a new directory.
        settings: `PackSettings()` by default.
        progress: called while the folder is read, then with (packed images, all images).
    """
    source, out, settings = Path(source).expanduser(), Path(out).expanduser(), settings or PackSettings()
    dataset = Folder(path=str(source)).open(progress)
    info = ShardInfo(
        source=source.resolve().name,
        settings=settings,
        images=len(dataset),
        classes=tuple(dataset.classes),
        skipped=tuple(dataset.skipped),
        source_key=dataset.content_key,
    )
    if out.exists():
        _check_unchanged(out, info)
        return ShardDataset(out)
    part = Path(f"{out}{PART}")
    remove_parts(part)
    if (part / INFO).exists():
        _check_unchanged(part, info)
    else:
        write_json(part / INFO, to_dict(info))
    write_index(part, _shards(part, dataset, settings, progress), info.classes)
    if dataset.content_key != info.source_key:
        raise UserError(f"Images in {source} changed while they were packed. Remove {part} and start again.")
    write_info(part, part, info)
    with write_errors(out):
        os.rename(part, out)
    return ShardDataset(out)


def _check_unchanged(directory: Path, info: ShardInfo) -> None:
    """Raise UserError if `directory` was not started with these images and settings."""
    if not (directory / INFO).exists():
        raise UserError(f"{directory} exists and was not written by `dino data pack`. Choose a different `out`.")
    before = replace(read_info(directory), shards={}, fingerprint="", index_sha256="")
    advice = f"Choose a different `out`, or remove {directory} and start again."
    if changes := differences(before.settings, info.settings):
        text = ", ".join(f"`{name}` was {old} and is {new}" for name, old, new in changes)
        raise UserError(f"{directory} was begun with other settings: {text}. {advice}")
    if before != info:
        raise UserError(
            f"The images in {info.source} have changed since {directory} was begun ({before.images} then, "
            f"{info.images} now). {advice}"
        )


def _shards(
    part: Path, dataset: ImageDataset, settings: PackSettings, progress: Progress | None
) -> Iterator[list[ImageRow]]:
    """Yield the rows of each shard: first of those that exist, then of the others, which are written."""
    done, number = 0, 0
    while (tar := part / SHARD.format(number)).exists():
        rows, damage = scan_shard(tar)
        if damage or not rows:
            break
        yield [
            row._replace(path=dataset.names[index], class_name=_class_name(dataset, index))
            for index, row in enumerate(rows, done)
        ]
        done, number = done + len(rows), number + 1
    images = map_in_order(
        lambda index: _load(dataset, index, settings), range(done, len(dataset)), THREADS, 4 * THREADS
    )
    stream = enumerate(images, done)
    while done < len(dataset):
        rows = _write_shard(part / SHARD.format(number), dataset, stream, settings.shard_size * 2**20, progress)
        yield rows
        done, number = done + len(rows), number + 1


def _write_shard(
    shard: Path, dataset: ImageDataset, images: Iterator[tuple[int, Stored]], limit: float, progress: Progress | None
) -> list[ImageRow]:
    """Write a tar file atomically, with images until it has `limit` bytes; return their rows."""
    rows: list[ImageRow] = []

    def write(aside: Path) -> None:
        with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, (data, size, extension) in images:
                path, class_name = dataset.names[index], _class_name(dataset, index)
                offset = tar.offset + tarfile.BLOCKSIZE  # the member's header comes first
                rows.append(ImageRow(path, offset, len(data), size, zlib.crc32(data), class_name))
                members, description = {extension: data}, {"path": path}
                if class_name is not None and dataset.labels is not None:
                    label = int(dataset.labels[index])
                    members["cls"] = str(label).encode()
                    description |= {"label": label, "class": class_name}
                members["json"] = json.dumps(description, ensure_ascii=False).encode()
                for name, content in members.items():
                    member = tarfile.TarInfo(f"{index:09d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                if progress is not None:
                    progress(index + 1, len(dataset))
                if tar.offset >= limit:
                    break

    atomic_write(shard, write)
    return rows


def _class_name(dataset: ImageDataset, index: int) -> str | None:
    label = -1 if dataset.labels is None else dataset.labels[index]
    return dataset.classes[label] if label >= 0 else None


def _load(dataset: ImageDataset, index: int, settings: PackSettings) -> Stored:
    """Return image `index` as it is stored; raise UserError if its file cannot be read or has changed."""
    name = dataset.names[index]
    try:
        data = dataset.encoded(index)
        size = probe(name, data)
    except BadImage as bad:
        raise UserError(f"{name} cannot be read: {bad.reason}. Make it readable; the same command resumes.") from bad
    if size != tuple(dataset.sizes[index]):
        raise UserError(f"{name} changed while it was packed. Remove the incomplete shards and start again.")
    if settings.side is not None and min(size) > settings.side:
        with suppress(BadImage):  # stored unchanged: training skips it, as it does in the folder
            return *downscale(decode(name, data), settings), "jpg"
    extension = os.path.splitext(name)[1][1:].lower()
    return data, size, EXTENSIONS.get(extension, extension)


def downscale(image: np.ndarray, settings: PackSettings) -> tuple[bytes, tuple[int, int]]:
    """Return (JPEG, (width, height)) of an image [H, W, 3], area-averaged to the short side `settings.side`."""
    assert settings.side is not None
    height, width = image.shape[:2]
    scale = settings.side / min(height, width)
    size = max(settings.side, round(width * scale)), max(settings.side, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
    return data.tobytes(), size
