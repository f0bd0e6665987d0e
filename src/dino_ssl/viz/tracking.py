"""Tracking of objects through a video from a mask of its first frame, by label propagation (Sec. 4.2.2).

Uses the same propagation as the evaluation `evals.video_segmentation`. Frames are read one at a time.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dino_ssl.data.dataset import BadImage
from dino_ssl.data.masks import PALETTE, VOID, read_mask
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, evaluating
from dino_ssl.evals.label_propagation import input_size, resize_nearest
from dino_ssl.evals.video_segmentation import VideoSegmentation, segment
from dino_ssl.models.backbone import Backbone
from dino_ssl.progress import Progress
from dino_ssl.viz.video import Video, write_video

MAX_OBJECTS = 20
"""A file with more labels or colors is rejected: it is a photo, or has antialiased edges."""
BRIGHT_PALETTE = (PALETTE / np.maximum(PALETTE.max(axis=1, keepdims=True), 1) * 255).astype(np.uint8)
"""[256, 3]: the colors of DAVIS masks at full brightness."""

# -- the first mask ----------------------------------------------------------------------------------------


def read_first_mask(path: str | Path, height: int, width: int) -> np.ndarray:
    """Read the mask of the first frame as uint8 [height, width]: 0 the background, 1, 2, ... the objects.

    Accepted are indexed PNGs (labels are the indices), black-and-white PNGs (white is object 1), and PNGs with a few
    solid colors: black or transparent is background, every other color is one object. Colors of the DAVIS palette are
    mapped to their DAVIS labels.

    Raises:
        UserError: If the file is not such a PNG, shows no object, or has a different aspect ratio than the frame.
    """
    try:
        mask = _read_labels(Path(path))
    except BadImage as error:
        raise UserError(str(error)) from error
    if abs(mask.shape[0] * width - mask.shape[1] * height) > max(height, width, *mask.shape):
        raise UserError(
            f"The mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels and the first frame {width} x {height}: "
            "expected the same size or the same aspect ratio."
        )
    if not (mask > 0).any():
        raise UserError(f"The mask {path} has no object: every pixel is background (0, black or transparent).")
    return resize_nearest(mask, height, width)


def _read_labels(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.array(image.convert("RGBA")) if image.mode in ("RGB", "RGBA", "LA") else None
            indexed = image.mode == "P"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return read_mask(path)  # raises BadImage with the reason
    if pixels is not None:
        return _labels_by_color(path, pixels)
    mask = read_mask(path)
    labels = np.setdiff1d(mask, [0, VOID])
    if not indexed and not 0 < len(labels) <= MAX_OBJECTS:  # black and white, with or without soft edges
        return (mask > 127).astype(np.uint8)
    return np.where(mask == VOID, 0, mask)


def _labels_by_color(path: Path, pixels: np.ndarray) -> np.ndarray:
    opaque = np.where(pixels[..., 3:] > 127, pixels[..., :3], 0)
    unique, inverse = np.unique(opaque.reshape(-1, 3), axis=0, return_inverse=True)
    colors = [tuple(color) for color in unique.tolist()]
    if len(colors) > MAX_OBJECTS + 1:
        raise UserError(
            f"The mask {path} has {len(colors)} colors: expected black for the background and one plain color for "
            "each object. Paint with a hard brush, and save as PNG, not as JPEG."
        )
    davis = [tuple(color) for color in PALETTE[: MAX_OBJECTS + 1].tolist()]
    known = davis if set(colors) <= set(davis) else [(0, 0, 0), *(color for color in colors if any(color))]
    return np.array([known.index(color) for color in colors], dtype=np.uint8)[inverse.reshape(pixels.shape[:2])]


# -- tracking ----------------------------------------------------------------------------------------------


def track(
    backbone: Backbone, video: Video, mask: np.ndarray, settings: VideoSegmentation, context: EvalContext
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (frame name, mask uint8 [H, W]) of every frame; the first mask is the given one."""
    masks = segment(backbone, video, mask, settings, context)
    for index, name in enumerate(video.frame_names()):
        with evaluating(backbone):  # entered for each frame, so that the caller's code runs outside of it
            current = mask if index == 0 else next(masks, None)
        if current is None:
            return
        yield name, current


def too_small_objects(mask: np.ndarray, patch: int, settings: VideoSegmentation) -> list[int]:
    """Return the labels that no patch of the first frame gets: these objects cannot be tracked."""
    size = input_size(*mask.shape, size=settings.size or 480, patch=patch, multiple=settings.multiple)
    patch_labels = resize_nearest(mask, *(max(1, side // patch) for side in size))
    return np.setdiff1d(mask, patch_labels).tolist()


# -- drawing -----------------------------------------------------------------------------------------------


def overlay_mask(frame: np.ndarray, mask: np.ndarray, strength: float = 0.45) -> np.ndarray:
    """Return the frame uint8 [H, W, 3] with its objects in color and a line around each."""
    color = BRIGHT_PALETTE[mask]
    mixed = cv2.addWeighted(frame, 1 - strength, color, strength, 0)
    canvas = np.where(mask[..., None] > 0, mixed, frame)
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return np.where((edge & (mask > 0))[..., None], color, canvas)


def overlay_frames(video: Video, masks: Path) -> Iterator[np.ndarray]:
    """Yield every frame with its mask of the folder `masks`, up to the first missing mask."""
    for name, frame in zip(video.frame_names(), video, strict=False):  # names of a video file do not end
        if not (masks / f"{name}.png").exists():
            return
        yield overlay_mask(frame, read_mask(masks / f"{name}.png"))


def frame_strip(frames: Iterable[np.ndarray], count: int, *, num_tiles: int = 6, height: int = 160) -> np.ndarray:
    """Return about `num_tiles` of `count` evenly spaced frames side by side: [height, W, 3] uint8."""
    num_tiles = min(num_tiles, max(1, count))
    indices = set(np.linspace(0, max(0, count - 1), num_tiles).round().astype(int).tolist())
    tiles = []
    for index, frame in enumerate(frames):
        if index in indices:
            width = max(1, round(frame.shape[1] * height / frame.shape[0]))
            tiles += [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.full((height, 4, 3), 255)]
    return np.concatenate(tiles[:-1], axis=1).astype(np.uint8)


def write_overlay(path: Path, video: Video, masks: Path, count: int, progress: Progress) -> Path:
    """Write the video with the masks of a folder as MP4."""

    def frames() -> Iterator[np.ndarray]:
        for done, frame in enumerate(overlay_frames(video, masks), 1):
            yield frame
            progress(done, count)

    write_video(path, frames(), video.fps)
    return path
