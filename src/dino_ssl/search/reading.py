"""From image files to rows of an index: hashes, size and feature of each image, decoded by data workers."""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.decode import decode
from dino_ssl.data.workers import make_loader
from dino_ssl.evals.base import EvalContext, check_finite, evaluating
from dino_ssl.evals.features import forward
from dino_ssl.models.backbone import Backbone
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.search.store import Store


class Record(NamedTuple):
    """The properties of one image."""

    content: bytes | None = None
    perceptual: int | None = None
    width: int | None = None
    height: int | None = None
    reason: str | None = None
    """Why it cannot be read; None for a readable image."""
    known: bool = False
    """The index has the features of this content, so the image was not decoded."""


class KnownContent:
    """The contents whose features an index has. Images without a perceptual hash are read again if it is computed."""

    def __init__(self, store: Store | None) -> None:
        self.store, contents = store, np.empty(0, "S16")
        if store is not None:
            contents = np.frombuffer(b"".join(store.items.table["content"].to_pylist()), "S16")
            if has_perceptual_hashes():
                contents = np.where(store.items.table["perceptual"].is_null().to_numpy(), b"", contents)
        self.rows = np.argsort(contents, kind="stable")
        self.contents = contents[self.rows]
        """[N] digests, sorted: workers search in them."""

    def features(self, record: Record) -> tuple[Record, np.ndarray]:
        """Return the complete record of a known content, and its float16 features [D]."""
        assert self.store is not None
        row = int(self.rows[np.searchsorted(self.contents, np.bytes_(record.content))])
        columns = self.store.items.table.select(["perceptual", "width", "height"]).slice(row, 1).to_pylist()[0]
        return record._replace(**columns), self.store.features[row]


def read_images(
    backbone: Backbone,
    dataset: ImageDataset,
    has_files: bool,
    transform: Preprocessing,
    known: KnownContent,
    context: EvalContext,
) -> Iterator[tuple[list[Record], np.ndarray]]:
    """Yield records of the images in order, and float16 unit features [b, D] of the readable ones among them.

    has_files: the content is that of the files, and not of the pixels.
    """
    if has_perceptual_hashes():
        importlib.import_module("imagehash")  # before workers are forked: each would take a second
    build = partial(_read_batch, dataset, has_files, transform, known.contents, has_perceptual_hashes())
    jobs = (range(at, min(at + context.batch_size, len(dataset))) for at in range(0, len(dataset), context.batch_size))
    loader = make_loader(build, jobs, context.workers, pin_memory=context.device.type == "cuda")
    with evaluating(backbone), torch.random.fork_rng(devices=[]):  # data loaders draw a seed
        for records, images in loader:
            computed = iter(_unit_features(backbone, images, context))
            rows = []
            for number, record in enumerate(records):
                if record.known:
                    records[number], row = known.features(record)
                    rows.append(row)
                elif record.reason is None:
                    rows.append(next(computed))
            yield records, np.stack(rows) if rows else np.empty((0, backbone.embed_dim), np.float16)


def _unit_features(backbone: Backbone, images: Tensor, context: EvalContext) -> np.ndarray:
    """Return float16 unit features [b, D] of uint8 images [b, 3, H, W]. Raises UserError for NaN."""
    if not len(images):
        return np.empty((0, backbone.embed_dim), np.float16)
    features = forward(backbone, images, context)
    check_finite("Features", features)
    return F.normalize(features, dim=1).half().numpy()


def _read_batch(
    dataset: ImageDataset,
    has_files: bool,
    transform: Preprocessing,
    known: np.ndarray,
    with_perceptual_hashes: bool,
    job: range,
) -> tuple[list[Record], Tensor]:
    """Return the records of images, and center crops uint8 [b, 3, size, size] of the readable ones of new content."""
    records, crops = [], []
    dataset.prefetch(np.array(job))
    for index in job:
        try:
            content, image = _read(dataset, index, has_files, known)
        except BadImage as bad:
            records.append(Record(reason=bad.reason))
            continue
        if image is None:
            records.append(Record(content, known=True))
            continue
        perceptual = perceptual_hash(image) if with_perceptual_hashes else None
        records.append(Record(content, perceptual, image.shape[1], image.shape[0]))
        crops.append(transform.center_crop(image))
    shape = (0, transform.size, transform.size, 3)
    return records, torch.from_numpy(np.stack(crops) if crops else np.empty(shape, np.uint8)).movedim(-1, 1)


def _read(dataset: ImageDataset, index: int, has_files: bool, known: np.ndarray) -> tuple[bytes, np.ndarray | None]:
    """Return the digest of an image and its pixels, or None if its content is known. Raises BadImage."""
    if not has_files:
        image = dataset.read(index)
        content = hashlib.blake2b(image.tobytes() + repr(image.shape).encode(), digest_size=16).digest()
        return content, None if _has(known, content) else image
    data = dataset.encoded(index)
    content = hashlib.blake2b(data, digest_size=16).digest()
    return content, None if _has(known, content) else decode(dataset.names[index], data, bit_depth=dataset.bit_depth)


def _has(known: np.ndarray, content: bytes) -> bool:
    place = np.searchsorted(known, np.bytes_(content))
    return bool(place < len(known) and known[place] == np.bytes_(content))


def has_perceptual_hashes() -> bool:
    """Return True if the package that computes perceptual hashes is installed."""
    return importlib.util.find_spec("imagehash") is not None


def perceptual_hash(image: np.ndarray) -> int:
    """Return `imagehash.phash` of an image, uint8 RGB [H, W, 3], as 64 bits.

    It looks at 32 x 32 pixels: the image is first reduced to 128 to 255 on its short side, which takes a third of the
    time.
    """
    import imagehash

    small = Image.fromarray(image).reduce(max(1, min(image.shape[:2]) // 128))
    return int.from_bytes(np.packbits(imagehash.phash(small).hash.ravel()).tobytes(), "big")
