"""Attention maps of a Vision Transformer, and masks of the patches that hold most of the attention (Fig. 4)."""

from collections.abc import Sequence
from contextlib import nullcontext

import cv2
import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.dataset import BadImage
from dino_ssl.errors import UserError, check_value
from dino_ssl.evals.base import Autocast, evaluating
from dino_ssl.models.backbone import Attentive, Backbone

MAX_PATCHES = 10_000  # attention between this many patches takes 2.4 GB with six heads

MAX_RATIO = 16
"""Longer by shorter side of an image: the short side is that of the network's input, and the long one follows."""


def check_ratio(name: str, height: int, width: int) -> None:
    """Raise BadImage if an image is too long for a network's input with all of it."""
    if max(height, width) > MAX_RATIO * min(height, width):
        raise BadImage(name, f"{width} x {height} pixels: longer than {MAX_RATIO} times its short side")


def attention_size(training_size: int) -> int:
    """Return the short side for attention maps: 480 as the authors, or twice a training size below 224."""
    return 480 if training_size >= 224 else min(480, 2 * training_size)


def resize_to_patches(image: np.ndarray, size: int, patch: int) -> np.ndarray:
    """Resize the whole image to a short side of about `size`, with both sides multiples of `patch`.

    The authors crop the remainder; here each side is rounded to the nearest multiple, so that the maps cover the whole
    image.
    """
    height, width = image.shape[:2]
    rows, columns = patch_grid(height, width, size, patch)
    interpolation = cv2.INTER_AREA if rows * patch < height else cv2.INTER_CUBIC
    return cv2.resize(image, (columns * patch, rows * patch), interpolation=interpolation)


def patch_grid(height: int, width: int, size: int, patch: int) -> tuple[int, int]:
    """Return (rows, columns) of patches of an image that is resized to a short side of about `size`."""
    if size < 1:
        raise UserError(f"`size` must be at least 1; got {size}.")
    scale = size / min(height, width)
    rows, columns = (max(1, round(side * scale / patch)) for side in (height, width))
    if rows * columns > MAX_PATCHES:
        raise UserError(
            f"expected an input of at most {MAX_PATCHES} patches; a {width} x {height} image at short side {size} has "
            f"{columns} x {rows} patches of {patch}. Use a smaller size, or crop the image."
        )
    return rows, columns


def require_attention(backbone: Backbone) -> Attentive:
    """Return the network, or raise UserError if it has no attention."""
    if not isinstance(backbone, Attentive):
        raise UserError(f"{type(backbone).__name__} has no attention: expected a Vision Transformer (dino_vits16).")
    return backbone


def patch_attention(
    backbone: Backbone,
    image: np.ndarray,
    queries: Sequence[int | None] = (None,),
    *,
    layer: int = -1,
    autocast: Autocast = nullcontext,
) -> np.ndarray:
    """Return the attention of each query to all patches of an image: uint8 RGB -> [queries, heads, h, w] float32.

    A query is None for [CLS], or the index of a patch, row by row. layer: 0 is the first block, -1 the last. Attention
    to the class token and the registers is omitted, so the values sum to less than 1.
    """
    backbone = require_attention(backbone)
    blocks = backbone.num_blocks
    if not -blocks <= layer < blocks:
        raise UserError(f"`layer` must be in {-blocks} .. {blocks - 1} for a network of {blocks} blocks; got {layer}.")
    tokens = [0 if query is None else 1 + backbone.registers + query for query in queries]
    with evaluating(backbone), autocast():
        rows = attention_rows(backbone, network_input(backbone, image[None]), tokens, layer)[0].cpu().numpy()
    return rows.reshape(*rows.shape[:2], image.shape[0] // backbone.patch, image.shape[1] // backbone.patch)


def attention_rows(backbone: Attentive, images: Tensor, tokens: Sequence[int], layer: int) -> Tensor:
    """Return the attention of tokens to all patches: normalized [B, 3, H, W] -> [B, tokens, heads, h w] float32."""
    attention = backbone.attention(images, layer)
    return attention[:, :, list(tokens), 1 + backbone.registers :].float().transpose(1, 2)


def network_input(backbone: Backbone, images: np.ndarray) -> Tensor:
    """Return images, uint8 RGB [B, H, W, 3], normalized on the device of the network: [B, 3, H, W]."""
    planes = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return backbone.transform.normalize(planes.to(next(backbone.parameters()).device))


def top_mass_mask(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
    """Fig. 4: the smallest set of patches that holds `mass` of the attention, [..., N] -> bool [..., N].

    At least one patch is kept. Among equal patches, later ones are kept first.
    """
    check_value("mass", mass, above=0, most=1)
    order = np.argsort(attention, axis=-1, kind="stable")
    ascending = np.take_along_axis(attention, order, axis=-1)
    total = ascending.sum(axis=-1, keepdims=True)
    fraction = ascending / np.where(total > 0, total, 1)
    keep = np.cumsum(fraction, axis=-1) > 1 - mass
    keep[..., -1] = True  # rounding must not empty a mask
    mask = np.empty_like(keep)
    np.put_along_axis(mask, order, keep, axis=-1)
    return mask
