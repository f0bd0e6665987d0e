"""The images that the page shows, uploaded ones included, and what the network computes on their patches.

n = h w patches of an image. The page knows an image by its source: the row in the index, or the digest of an upload.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_ssl.data.bit_depth import estimate_bit_depth
from dino_ssl.data.dataset import BadImage
from dino_ssl.data.decode import decode
from dino_ssl.data.image_header import probe
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_maps import attention_size, patch_attention, resize_to_patches
from dino_ssl.files import read_lines
from dino_ssl.models.backbone import Attentive, Backbone
from dino_ssl.search.query import thumbnail, within
from dino_ssl.viz.attention import last_features
from dino_ssl.viz.pca import principal_components, unit_range
from dino_ssl.viz.rendering import palette

SHOWN_SIDE = 1600
"""Maximum side in pixels of an image that is sent to the page, and of an upload that is kept."""
VIEW_PATCHES = 1600
"""Most patches of the attention view: all pairs of them in six heads take 31 MB in float16."""
KEPT_UPLOADS, KEPT_FEATURES, KEPT_ATTENTION = 16, 128, 3

T = TypeVar("T")


class Cache(OrderedDict[Hashable, Any]):
    """The most recent values of a function, which is called by one thread at a time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.lock = size, threading.Lock()

    def get_or(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the value of this key, computed if it is not kept."""
        with self.lock:
            value = self.pop(key) if key in self else compute()
            self[key] = value
            if len(self) > self.size:
                self.popitem(last=False)
            return value


class Images:
    """Pixels, attention, features and colors of the patches of images.

    Args:
        index: The `Index`.
        masks: The output of `dino segment`, or another folder with an image of labels, 0 for the background, for each.
    """

    def __init__(self, index: Any, masks: Path | None = None) -> None:
        self.index, self.masks = index, masks
        self._uploads: OrderedDict[str, np.ndarray] = OrderedDict()
        self._features, self._attention, self._segments = Cache(KEPT_FEATURES), Cache(KEPT_ATTENTION), Cache(1)

    # -- pixels

    def upload(self, data: bytes) -> str:
        """Decode and keep an image file; return its source. Raises BadImage."""
        digest = hashlib.sha256(data).hexdigest()[:32]
        self._uploads[digest] = within(self._decode(data), SHOWN_SIDE)
        while len(self._uploads) > KEPT_UPLOADS:
            self._uploads.popitem(last=False)
        return digest

    def _decode(self, data: bytes) -> np.ndarray:
        bits = self.index.store.info.preprocessing.bit_depth or estimate_bit_depth([("The file", data)])
        return decode("The file", data, bit_depth=bits)

    def pixels(self, source: str) -> np.ndarray:
        """Return an image, uint8 RGB [H, W, 3]. Raises KeyError if there is none, BadImage if it cannot be read."""
        return self._uploads[source] if source in self._uploads else self.index.read(self.row(source))

    def row(self, source: str) -> int:
        """Return the row of an image of the index. Raises KeyError if there is none."""
        if not (source.isascii() and source.isdigit() and len(source) < 10 and int(source) < len(self.index)):
            raise KeyError(f"image {source}")
        return int(source)

    def shape(self, source: str) -> tuple[int, int]:
        """Return height and width of an image in pixels, as `query` gives it to a search."""
        if source in self._uploads:
            return self._uploads[source].shape[:2]  # type: ignore[return-value]
        items, row = self.index.items, self.row(source)
        return int(items.heights[row]), int(items.widths[row])

    def query(self, source: str) -> int | np.ndarray:
        """Return what `Index.search` takes: a row, or the pixels of an upload."""
        return self._uploads[source] if source in self._uploads else self.row(source)

    def jpeg(self, source: str) -> bytes:
        """Return the image as a JPEG of at most SHOWN_SIDE pixels: the file itself may have any format and metadata."""
        return thumbnail(self.pixels(source), SHOWN_SIDE, quality=90)

    def mask_png(self, row: int) -> bytes:
        """Return the mask of an image as a PNG: a color for each label, and no color for the background.

        Raises KeyError if there is none, and BadImage if it is not readable or has another size than the image.
        """
        path = self._mask_path(self.index.items.names[row])
        width, height = probe(path)
        shape = self.shape(str(row))
        if (height, width) != shape:
            raise BadImage(path, f"the mask has {width} x {height} pixels, its image {shape[1]} x {shape[0]}")
        with Image.open(path, formats=["PNG"]) as image:  # its values are labels, of which `decode` makes colors
            labels = np.asarray(image)
        labels = labels if labels.ndim == 2 else labels[..., 0]
        scale = min(1.0, SHOWN_SIDE / max(shape))
        size = max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))
        values, codes = np.unique(labels, return_inverse=True)
        colors = np.array([(*color, 255) for color in palette(len(values))], np.uint8)
        colors[values == 0] = 0
        painted = colors[codes.reshape(labels.shape)]
        return _png(cv2.resize(painted, size, interpolation=cv2.INTER_NEAREST))

    def _mask_path(self, name: str) -> Path:
        for folder in () if self.masks is None else (self.masks / "labels", self.masks):
            path = folder / f"{self._stems().get(name, os.path.splitext(name)[0])}.png"
            if path.is_file() and path.resolve().is_relative_to(folder.resolve()):  # a link may lead elsewhere
                return path
        raise KeyError(f"mask of {name}")

    def _stems(self) -> Mapping[str, str]:
        """Return the names of the files of `dino segment` by those of the images, of which two may share a stem."""
        file = Path(self.masks or "") / "segments.jsonl"
        if not file.is_file():
            return {}

        def read() -> dict[str, str]:
            return {row["image"]: row["stem"] for row in read_lines(file)}

        return self._segments.get_or(file.stat().st_mtime_ns, read)

    # -- patches

    @property
    def backbone(self) -> Backbone:
        """The network of the index, loaded at its first use."""
        return self.index.backbone

    def layout(self, source: str) -> dict[str, int]:
        """Return rows and columns of the grid of patches, and the numbers of layers and heads, 0 without attention."""
        height, width, _ = self.features(source).shape
        attentive = isinstance(self.backbone, Attentive)
        layers = self.backbone.num_blocks if isinstance(self.backbone, Attentive) else 0
        heads = len(self._all_attention(source, layers - 1)) if attentive else 0
        return {"rows": height, "columns": width, "layers": layers, "heads": heads}

    def attention(self, source: str, layer: int, patch: int) -> np.ndarray:
        """Return the attention of a patch, -1 for [CLS], to all patches: float32 [heads, n]."""
        attention = self._all_attention(source, layer)
        if not -1 <= patch < attention.shape[2]:
            raise UserError(f"`patch` must be in -1 .. {attention.shape[2] - 1}; got {patch}.")
        return attention[:, patch + 1].astype(np.float32)

    def similarity(self, source: str, patch: int) -> np.ndarray:
        """Return the cosine similarity of a patch to all patches of its image: float32 [n]."""
        rows = self.features(source).flatten(0, 1).float()
        return (rows @ self._patch(source, patch)).numpy()

    def colors_png(self, source: str) -> bytes:
        """Return the first three principal components of the patches as the colors of a PNG with a pixel per patch."""
        features = self.features(source).float()
        rows = features.flatten(0, 1)
        colors = torch.zeros(len(rows), 3)
        components = principal_components(rows, 3)
        colors[:, : len(components.directions)] = unit_range(components.project(rows))
        return _png((255 * colors.view(*features.shape[:2], 3)).round().byte().numpy())

    def nearest_patch(self, source: str, patch: int, other: str) -> dict[str, Any]:
        """Return the patch of another image that is most similar to a patch: its box as shares of width and height."""
        features = self.features(other)
        rows, columns, _ = features.shape
        similarity, best = (features.flatten(0, 1).float() @ self._patch(source, patch)).max(dim=0)
        box = [int(best) % columns / columns, int(best) // columns / rows, 1 / columns, 1 / rows]
        return {"row": int(other), "similarity": float(similarity), "box": box}

    def features(self, source: str) -> Tensor:
        """Return the unit-length features of the patches, float16 [h, w, D] in main memory."""

        def compute() -> Tensor:
            patches = last_features(self.backbone, self._input(source)).patches[0].float()
            return torch.nn.functional.normalize(patches, dim=-1).half().cpu()

        return self._features.get_or(source, compute)

    def _all_attention(self, source: str, layer: int) -> np.ndarray:
        """Return the attention of [CLS] and each patch to the patches, float16 [heads, 1 + n, n]."""

        def compute() -> np.ndarray:
            image, patch = self._input(source), self.backbone.patch
            queries = [None, *range(image.shape[0] * image.shape[1] // patch**2)]
            maps = patch_attention(self.backbone, image, queries, layer=layer)
            return maps.reshape(*maps.shape[:2], -1).transpose(1, 0, 2).astype(np.float16)

        return self._attention.get_or((source, layer), compute)

    def _input(self, source: str) -> np.ndarray:
        """Return the image at the resolution of `dino attention`, or less if that has more than VIEW_PATCHES."""
        image, patch = self.pixels(source), self.backbone.patch
        ratio = max(image.shape[:2]) / min(image.shape[:2])
        most = patch * int((VIEW_PATCHES / ratio) ** 0.5)
        return resize_to_patches(image, max(patch, min(attention_size(self.backbone.transform.size), most)), patch)

    def _patch(self, source: str, patch: int) -> Tensor:
        rows = self.features(source).flatten(0, 1)
        if not 0 <= patch < len(rows):
            raise UserError(f"`patch` must be in 0 .. {len(rows) - 1}; got {patch}.")
        return rows[patch].float()


def _png(image: np.ndarray) -> bytes:
    Image.fromarray(image).save(file := BytesIO(), "PNG", compress_level=1)
    return file.getvalue()
