"""Packing a folder of images into tar shards.

Shards are written one after the other into `OUT.part`, each of them atomically; a stopped run continues after the last
one. Its result has the same bytes as that of an uninterrupted run. The directory is renamed at the end.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from heapq import heappush, heappushpop
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from dino_ssl.config import differences, to_dict
from dino_ssl.data.bit_depth import SAMPLE, estimate_bit_depth
from dino_ssl.data.bit_depth import SUFFIXES as DEEP_SUFFIXES
from dino_ssl.data.dataset import BadImage, Skipped
from dino_ssl.data.decode import decode
from dino_ssl.data.folder import class_level, no_images, printable, read_bytes, readable_images, walk
from dino_ssl.data.image_header import probe
from dino_ssl.data.shard_index import ImageRow, scan_shard, write_index
from dino_ssl.data.shards import (
    INFO,
    PackSettings,
    ShardDataset,
    ShardInfo,
    is_shards,
    open_shards,
    read_info,
    write_info,
)
from dino_ssl.data.workers import map_in_order
from dino_ssl.errors import UserError
from dino_ssl.files import PART, atomic_write, remove_parts, write_errors, write_json
from dino_ssl.progress import Progress

SHARD = "shard-{:06d}.tar"
THREADS = min(16, 4 + (os.cpu_count() or 1))  # mostly waiting for disks
EXTENSIONS = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "apng": "png", "dib": "bmp", "tif": "tiff"}
"""Extensions of members in the spelling that other readers expect."""


class Source(NamedTuple):
    """An image to be packed."""

    name: str
    class_name: str | None
    read: Callable[[], bytes]
    """Return the content of its file; raises BadImage."""


class Packed(NamedTuple):
    """An image as it is stored."""

    source: Source
    data: bytes
    size: tuple[int, int]
    """Width and height in pixels."""
    extension: str


def pack(
    source: str | Path, out: str | Path, settings: PackSettings | None = None, progress: Progress | None = None
) -> ShardDataset:
    """Write the images of the folder `source` as tar shards into the directory `out`, and open it.

    The dataset equals that of the folder, except for images that `settings` makes smaller. A run that was stopped is
    resumed; if `out` is complete, nothing is written. Of all images, only sizes and labels are in memory: the folder is
    listed twice, first to find its classes and the files that cannot be used. Raises UserError if the folder or the
    settings are not those that `out` was started with, or if a file cannot be read or written.

    Args:
        source: a folder of images, or shards.
        out: a new directory.
        settings: `PackSettings()` by default.
        progress: called while the folder is read, then with (packed images, all images).
    """
    source, out, settings = Path(source).expanduser(), Path(out).expanduser(), settings or PackSettings()
    open_source = _open_shards if is_shards(source) else _open_folder
    info, images, bit_depth = open_source(source, progress)
    info = replace(info, source=source.resolve().name, settings=settings)
    if out.exists():
        _check_unchanged(out, info)
        return ShardDataset(out)
    part = Path(f"{out}{PART}")
    remove_parts(part)
    if (part / INFO).exists():
        _check_unchanged(part, info)
    else:
        write_json(part / INFO, to_dict(info))
    labels = {name: label for label, name in enumerate(info.classes)}
    load = partial(_load, settings, bit_depth)
    write_index(part, _shards(part, images, load, info, labels, progress), labels)
    write_info(part, part, info)
    with write_errors(out):
        os.rename(part, out)
    return ShardDataset(out)


def _open_shards(path: Path, progress: Progress | None) -> tuple[ShardInfo, Iterator[Source], int | None]:
    dataset = open_shards(path, progress)
    classes, labels = [*dataset.classes, None], dataset.labels
    images = (
        Source(dataset.names[i], classes[-1 if labels is None else labels[i]], partial(dataset.encoded, i))
        for i in range(len(dataset))
    )
    key = dataset.info.index_sha256
    return _info(len(dataset), dataset.classes, dataset.skipped, key), images, dataset.bit_depth


def _open_folder(root: Path, progress: Progress | None) -> tuple[ShardInfo, Iterator[Source], int | None]:
    """Read all headers; the returned images raise UserError at the end if files were changed, added or removed.

    The bit depth is estimated from a random sample.
    """
    skipped: list[Skipped] = []
    count, digest = 0, hashlib.sha256()
    sample: list[tuple[int, str]] = []  # the smallest checksums of names

    def names() -> Iterator[str]:
        nonlocal count
        for path, name, _ in readable_images(walk(root, skipped), partial(printable, root=root), skipped, progress):
            count += 1
            digest.update(_file_key(path, name))
            if path.lower().endswith(DEEP_SUFFIXES):
                push = heappushpop if len(sample) == SAMPLE else heappush
                push(sample, (-zlib.crc32(name.encode()), path))
            yield name

    level, classes = class_level(names())
    if not count:
        raise no_images(root, skipped)
    skipped.sort()
    key = digest.hexdigest()

    def images() -> Iterator[Source]:
        unusable, digest = {name for name, _ in skipped}, hashlib.sha256()
        for path in walk(root):
            if (name := printable(path, root)) not in unusable:
                digest.update(_file_key(path, name))
                yield Source(name, name.split("/")[level] if classes else None, partial(read_bytes, path))
        if digest.hexdigest() != key:
            raise UserError(
                f"Images in {root} changed while they were packed. Remove the incomplete shards and start again."
            )

    return _info(count, classes, skipped, key), images(), estimate_bit_depth((path, None) for _, path in sample)


def _info(images: int, classes: list[str], skipped: list[Skipped], source_key: str) -> ShardInfo:
    return ShardInfo(images=images, classes=tuple(classes), skipped=tuple(skipped), source_key=source_key[:16])


def _file_key(path: str, name: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError:  # removed since it was listed
        return f"{name} missing\0".encode()
    return f"{name} {status.st_size} {status.st_mtime_ns}\0".encode()


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
    part: Path,
    images: Iterator[Source],
    load: Callable[[Source], Packed],
    info: ShardInfo,
    labels: dict[str, int],
    progress: Progress | None,
) -> Iterator[list[ImageRow]]:
    """Yield the rows of each shard: first of those that exist, then of the others, which are written."""
    assert info.settings is not None
    done, number = 0, 0
    while (tar := part / SHARD.format(number)).exists():
        rows, damage = scan_shard(tar)
        if damage or not rows:
            break
        pairs = zip(rows, images, strict=False)
        yield [row._replace(path=source.name, class_name=source.class_name) for row, source in pairs]
        done, number = done + len(rows), number + 1
    stream = enumerate(map_in_order(load, images, THREADS), done)
    for first in stream:
        yield _write_shard(part / SHARD.format(number), chain([first], stream), info, labels, progress)
        number += 1


def _write_shard(
    shard: Path,
    images: Iterator[tuple[int, Packed]],
    info: ShardInfo,
    labels: dict[str, int],
    progress: Progress | None,
) -> list[ImageRow]:
    """Write a tar file atomically, with images until it is complete; return their rows."""
    assert info.settings is not None
    limit, rows = info.settings.shard_size * 2**20, []

    def write(aside: Path) -> None:
        with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, (source, data, size, extension) in images:
                offset = tar.offset + tarfile.BLOCKSIZE  # the member's header comes first
                rows.append(ImageRow(source.name, offset, len(data), size, zlib.crc32(data), source.class_name))
                members, description = {extension: data}, {"path": source.name}
                if source.class_name is not None:
                    label = labels[source.class_name]
                    members["cls"] = str(label).encode()
                    description |= {"label": label, "class": source.class_name}
                members["json"] = json.dumps(description, ensure_ascii=False).encode()
                for name, content in members.items():
                    member = tarfile.TarInfo(f"{index:09d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                tar.members.clear()  # type: ignore[attr-defined]  # it would take a kilobyte for each member
                if progress is not None:
                    progress(index + 1, info.images)
                if tar.offset >= limit:
                    break

    atomic_write(shard, write)
    return rows


def _load(settings: PackSettings, bit_depth: int | None, source: Source) -> Packed:
    """Return the image as it is stored; raise UserError if its file cannot be read."""
    try:
        data = source.read()
        size = probe(source.name, data)
    except BadImage as bad:
        raise UserError(
            f"{source.name} cannot be read: {bad.reason}. Make it readable; the same command resumes."
        ) from bad
    if settings.side is not None and min(size) > settings.side:
        with suppress(BadImage):  # stored unchanged: training skips it, as it does in the folder
            return Packed(source, *downscale(decode(source.name, data, bit_depth=bit_depth), settings), "jpg")
    extension = os.path.splitext(source.name)[1][1:].lower()
    return Packed(source, data, size, EXTENSIONS.get(extension, extension))


def downscale(image: np.ndarray, settings: PackSettings) -> tuple[bytes, tuple[int, int]]:
    """Return (JPEG, (width, height)) of an image [H, W, 3], area-averaged to the short side `settings.side`."""
    assert settings.side is not None
    height, width = image.shape[:2]
    scale = settings.side / min(height, width)
    size = max(settings.side, round(width * scale)), max(settings.side, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
    return data.tobytes(), size
