"""Objects followed through a film from one mask of its first frame, as masks and as pictures of them (Sec. 4.2.2).

The way is the evaluation's (`evals.video_segmentation`): labels handed on between places that look alike to a frozen
network. Frames are read one at a time, whatever the film's length.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from dino_ssl.data.masks import PALETTE, VOID, read_mask
from dino_ssl.errors import UserError
from dino_ssl.evals.base import EvalContext, evaluating
from dino_ssl.evals.label_propagation import input_size, nearest
from dino_ssl.evals.video_segmentation import VideoSegmentation, segment
from dino_ssl.files import atomic_write
from dino_ssl.models.backbone import Backbone
from dino_ssl.progress import Progress
from dino_ssl.viz.video import Video, frame_files, write_video

MAX_OBJECTS = 20
"""A mask with more numbers or colours than this is taken for a photo, or has soft edges."""
BRIGHT = (PALETTE / np.maximum(PALETTE.max(axis=1, keepdims=True), 1) * 255).astype(np.uint8)
"""[256, 3]: the masks' colours, at full strength."""
GIF_SIDE, GIF_FRAMES = 480, 150


def first_mask(path: str | Path, height: int, width: int) -> np.ndarray:
    """A person's mask of the first frame as uint8 [height, width], 0 the ground, 1, 2, ... the objects.

    Indexed PNG: the numbers as they are. Black and white: what is white is object 1. In a few plain colours: black, or
    transparent, is the ground, each other colour an object; DAVIS' own colours keep their numbers. Its size must be
    the frame's, or in proportion.
    """
    mask = _read(Path(path))
    if abs(mask.shape[0] * width - mask.shape[1] * height) > max(height, width, *mask.shape):
        raise UserError(
            f"The mask {path} is {mask.shape[1]} x {mask.shape[0]} pixels, and the first frame {width} x {height}: "
            "expected one size, or the same proportions."
        )
    if not (mask > 0).any():
        raise UserError(f"The mask {path} shows no object: every pixel is ground (0, black or transparent).")
    return nearest(mask, height, width)


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            colours = np.array(image.convert("RGBA")) if image.mode in ("RGB", "RGBA", "LA") else None
            indexed = image.mode == "P"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return read_mask(path)  # says what is wrong
    if colours is not None:
        return _by_colour(path, colours)
    mask = read_mask(path)
    numbers = np.setdiff1d(mask, [0, VOID])
    if not indexed and (len(numbers) == 0 or len(numbers) > MAX_OBJECTS):  # black and white, with or without soft edges
        return (mask > 127).astype(np.uint8)
    return np.where(mask == VOID, 0, mask)


def _by_colour(path: Path, pixels: np.ndarray) -> np.ndarray:
    pixels = np.where(pixels[..., 3:] > 127, pixels[..., :3], 0)
    found, labels = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    colours = [tuple(colour) for colour in found.tolist()]
    if len(colours) > MAX_OBJECTS + 1:
        raise UserError(
            f"The mask {path} has {len(colours)} colours; expected black for the ground and one plain colour for each "
            "object, without soft edges. Save it as PNG, not as JPEG, and paint with a hard brush."
        )
    davis = [tuple(colour) for colour in PALETTE[: MAX_OBJECTS + 1].tolist()]
    if set(colours) <= set(davis):
        numbers = [davis.index(colour) for colour in colours]
    else:
        others = [colour for colour in colours if any(colour)]
        numbers = [others.index(colour) + 1 if any(colour) else 0 for colour in colours]
    return np.array(numbers, dtype=np.uint8)[labels.reshape(pixels.shape[:2])]


def frame_names(film: Video) -> Iterator[str]:
    """What the masks are called: as the pictures of a folder, or 00000, 00001, ..."""
    if not film.path.is_dir():
        return (f"{index:05d}" for index in range(10**9))
    names = [file.stem for file in frame_files(film.path)]
    if len(set(names)) < len(names):
        raise UserError(f"Two frames in {film.path} have one name, but for its ending, and so would their masks.")
    return iter(names)


def track(
    backbone: Backbone, film: Video, mask: np.ndarray, settings: VideoSegmentation, context: EvalContext
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, mask uint8 [H, W]) of every frame, the first one's as it was given."""
    masks = segment(backbone, film, mask, settings, context)
    for place, name in enumerate(frame_names(film)):
        with evaluating(backbone):  # not across frames: whoever asks for the next one works outside of it
            found = mask if place == 0 else next(masks, None)
        if found is None:
            return
        yield name, found


def too_small(mask: np.ndarray, patch: int, settings: VideoSegmentation) -> list[int]:
    """The objects that no place of the network's map falls on: they are lost at once."""
    size = input_size(*mask.shape, size=settings.size or 480, patch=patch, multiple=settings.multiple)
    seen = nearest(mask, *(max(1, side // patch) for side in size))
    return np.setdiff1d(mask, seen).tolist()


def tint(frame: np.ndarray, mask: np.ndarray, strength: float = 0.45) -> np.ndarray:
    """The frame with its objects in colour and a line around each; uint8 [H, W, 3]."""
    colour = BRIGHT[mask]
    mixed = cv2.addWeighted(frame, 1 - strength, colour, strength, 0)
    drawn = np.where(mask[..., None] > 0, mixed, frame)
    kernel = np.ones((3, 3), np.uint8)
    edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, kernel) > 0
    return np.where((edge & (mask > 0))[..., None], colour, drawn)


def overlays(film: Video, masks: Path) -> Iterator[np.ndarray]:
    """Every frame, tinted with its mask in the folder `masks`."""
    for name, frame in zip(frame_names(film), film, strict=False):  # a video file has names without end
        if not (masks / f"{name}.png").exists():
            return
        yield tint(frame, read_mask(masks / f"{name}.png"))


def side_by_side(frames: Iterable[np.ndarray], count: int, *, shown: int = 6, height: int = 160) -> np.ndarray:
    """About `shown` of `count` frames side by side, from the first to the last: [height, W, 3]."""
    wanted = set(np.linspace(0, max(0, count - 1), min(shown, max(1, count))).round().astype(int).tolist())
    tiles = []
    for place, frame in enumerate(frames):
        if place in wanted:
            width = max(1, round(frame.shape[1] * height / frame.shape[0]))
            tiles += [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.full((height, 4, 3), 255)]
    return np.concatenate(tiles[:-1], axis=1).astype(np.uint8)


def write_overlay(out: Path, film: Video, count: int, kind: Literal["mp4", "gif"], done: Progress) -> Path:
    """OUT/overlay.mp4, or overlay.gif where that is asked for or OpenCV writes no MP4: from the masks in OUT/masks."""

    def frames() -> Iterator[np.ndarray]:
        for place, frame in enumerate(overlays(film, out / "masks"), 1):
            yield frame
            done(place, count)

    if kind == "mp4":
        try:
            write_video(out / "overlay.mp4", frames(), film.fps)
            return out / "overlay.mp4"
        except UserError:
            pass  # frames and masks have been read and written before: it is the codec that is missing
    return write_gif(out / "overlay.gif", frames(), count, film.fps)


def write_gif(path: Path, frames: Iterable[np.ndarray], count: int, fps: float) -> Path:
    """A small animation for where no MP4 can be written: at most 480 pixels wide and 150 of `count` frames."""
    step = max(1, -(-count // GIF_FRAMES))
    small = []
    for place, frame in enumerate(frames):
        if place % step == 0:
            image = Image.fromarray(frame)
            image.thumbnail((GIF_SIDE, GIF_SIDE))
            small.append(image.quantize(128))
    options = dict(save_all=True, append_images=small[1:], duration=round(1000 * step / fps), loop=0)
    return atomic_write(path, lambda aside: small[0].save(aside, format="GIF", **options))
