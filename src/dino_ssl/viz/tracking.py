"""Tracking of objects through a video from a mask of its first frame, by label propagation (Sec. 4.2.2).

Uses the same propagation as the evaluation `evals.video_segmentation`. Frames are read one at a time.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dino_ssl.data.dataset import spaced_indices
from dino_ssl.data.masks import PALETTE, VOID
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, evaluating
from dino_ssl.evals.label_propagation import input_size, resize_nearest
from dino_ssl.evals.video_segmentation import VideoSegmentation, segment
from dino_ssl.models.backbone import Backbone
from dino_ssl.viz.video import Video

MAX_OBJECTS = 20
"""A file with more colors is rejected: it is a photo, or has antialiased edges."""
BRIGHT_PALETTE = (PALETTE / np.maximum(PALETTE.max(axis=1, keepdims=True), 1) * 255).astype(np.uint8)
"""[256, 3]: the colors of DAVIS masks at full brightness."""


def read_first_mask(path: str | Path, height: int, width: int) -> np.ndarray:
    """Read the mask of the first frame as uint8 [height, width]: 0 the background, 1, 2, ... the objects.

    Accepted are indexed PNGs (labels are the indices), and PNGs with a few solid colors: black or transparent is
    background, every other color is one object.

    Raises:
        UserError: If the file is not such a PNG, shows no object, or has a different aspect ratio than the frame.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            is_indexed = image.mode == "P"
            pixels = np.array(image if is_indexed else image.convert("RGBA"), dtype=np.int64)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"The mask {path} cannot be read as PNG: {error}.") from error
    if is_indexed:
        mask = np.where(pixels == VOID, 0, pixels)
    else:
        colors = np.where(pixels[..., 3] > 127, pixels[..., :3] @ (1, 256, 65536), 0)
        palette = np.union1d(0, colors)
        if len(palette) > MAX_OBJECTS + 1:
            raise UserError(
                f"The mask {path} has {len(palette)} colors: expected black for the background and one plain color for "
                "each object. Paint with a hard brush, and save as PNG, not as JPEG."
            )
        mask = np.searchsorted(palette, colors)
    if abs(mask.shape[0] * width - mask.shape[1] * height) > max(height, width, *mask.shape):
        raise UserError(
            f"The mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels and the first frame {width} x {height}: "
            "expected the same size or the same aspect ratio."
        )
    if not mask.any():
        raise UserError(f"The mask {path} has no object: every pixel is background (0, black or transparent).")
    return resize_nearest(mask.astype(np.uint8), height, width)


def track(
    backbone: Backbone, video: Video, mask: np.ndarray, settings: VideoSegmentation, context: EvalContext
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (name, frame, mask uint8 [H, W]) of every frame; the first mask is the given one."""
    masks = segment(backbone, video, mask, settings, context)
    for index, (name, frame) in enumerate(zip(video.frame_names(), video, strict=False)):  # names may be endless
        with evaluating(backbone):  # entered for each frame, so that the caller's code runs outside of it
            current = mask if index == 0 else next(masks)
        yield name, frame, current


def too_small_objects(mask: np.ndarray, patch: int, settings: VideoSegmentation) -> list[int]:
    """Return the labels that no patch of the first frame gets: these objects cannot be tracked."""
    size = input_size(*mask.shape, size=settings.size or 480, patch=patch, multiple=settings.multiple)
    return np.setdiff1d(mask, resize_nearest(mask, size[0] // patch, size[1] // patch)).tolist()


def overlay_mask(frame: np.ndarray, mask: np.ndarray, strength: float = 0.45) -> np.ndarray:
    """Return the frame uint8 [H, W, 3] with its objects in color and a line around each."""
    color = BRIGHT_PALETTE[mask]
    mixed = cv2.addWeighted(frame, 1 - strength, color, strength, 0)
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return np.where(mask[..., None] > 0, np.where(edge[..., None], color, mixed), frame)


def frame_strip(frames: Iterable[np.ndarray], count: int, *, num_tiles: int = 6, height: int = 160) -> np.ndarray:
    """Return about `num_tiles` of `count` evenly spaced frames side by side: [height, W, 3] uint8."""
    indices = spaced_indices(count, num_tiles)
    tiles = []
    for frame in (frame for index, frame in enumerate(frames) if index in indices):
        width = max(1, round(frame.shape[1] * height / frame.shape[0]))
        tiles += [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.full((height, 4, 3), 255)]
    return np.concatenate(tiles[:-1], axis=1).astype(np.uint8)
