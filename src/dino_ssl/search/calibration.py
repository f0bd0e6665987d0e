"""The similarity from which two images are near-duplicates, measured on edited copies of an index's own images."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from dino_ssl.data.dataset import BadImage, spaced_indices
from dino_ssl.data.transforms.distortions import Image, Rng, blur, crop, jpeg
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress
from dino_ssl.search.duplicates import Read, unit_rows
from dino_ssl.search.nearest import top_k

NUM_COPIES = 500
"""Edited copies: as many images are edited once, or fewer images several times."""
PRECISION = 0.99
MAX_SIDE = 512
"""Shorter side of the images that are edited; larger ones are reduced first, since networks reduce them anyway."""
MAX_KNOWN = 16
"""Nearest images among which one is sought that is no duplicate."""

SAME_CORRELATION = 0.87
"""`correlation` of an image and its copy: of edited imagenette images, 65 % of those with text and all others reach it;
of different images that look most alike, 0.5 %."""

Embed = Callable[[np.ndarray], torch.Tensor]
"""Returns the feature [D] of an image."""


def recolor(image: Image, rng: Rng) -> Image:
    """Change brightness, contrast and each channel by up to 20 percent."""
    gain, shift = rng.uniform(0.8, 1.2, 3) * rng.uniform(0.8, 1.2), rng.uniform(-25, 25)
    return np.clip(image * gain + shift, 0, 255).astype(np.uint8)


def halve(image: Image) -> Image:
    """Resize to half the width and height."""
    height, width = (max(1, side // 2) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def write_text(image: Image, rng: Rng) -> Image:
    """Write a white line of text with a black outline over the image."""
    height, width = image.shape[:2]
    scale = 0.8 * width / cv2.getTextSize("2026-11-29 12:00", cv2.FONT_HERSHEY_DUPLEX, 1.0, 1)[0][0]
    place, out = (round(0.1 * width), round(height * rng.uniform(0.2, 0.95))), image.copy()
    for color, thickness in ((0, 4), (255, 1)):
        stroke = max(1, round(thickness * scale))
        cv2.putText(out, "2026-11-29 12:00", place, cv2.FONT_HERSHEY_DUPLEX, scale, (color,) * 3, stroke, cv2.LINE_AA)
    return out


EDITS: dict[str, Callable[[Image, Rng], Image]] = {
    "JPEG quality 30": lambda image, rng: jpeg(image, 30),
    "80 % crop": lambda image, rng: crop(image, 0.2, rng),
    "half size": lambda image, rng: halve(image),
    "blur": lambda image, rng: blur(image, 0.01),
    "color": recolor,
    "text": write_text,
    "mirror": lambda image, rng: np.ascontiguousarray(image[:, ::-1]),
}
"""Edits after which an image is still a copy."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold of the cosine of features, with what it finds among edited copies."""

    threshold: float
    precision: float
    """Of the pairs from the threshold on, the fraction of copies with their original."""
    recall: float
    """Fraction of the copies whose cosine to their original is at least the threshold."""
    copies: int
    """Number of edited copies."""
    recalls: dict[str, float] = field(default_factory=dict)
    """Recall of each edit."""

    @property
    def sentence(self) -> str:
        """The threshold and what it finds, as a sentence."""
        return (
            f"The features of duplicates have a cosine of at least {self.threshold:.4f}, which finds "
            f"{100 * self.recall:.1f} % of {self.copies} edited copies at a precision of {100 * self.precision:.1f} %."
        )


def calibrate(
    features: np.ndarray, known: np.ndarray, read: Read, embed: Embed, progress: Progress | None = None
) -> Calibration:
    """Return the threshold of the best recall at a precision of 0.99, for edited copies of images of the index.

    Each copy gives two pairs: with its original, and with the nearest image that is not a known duplicate of it.

    Args:
        features: [N, D] of the index, unit length.
        known: [N] a number that known duplicates share.
        read: Returns the pixels of a row.
        embed: Returns the feature of an image.
        progress: Called with the number of copies done and their total.
    """
    jobs = edits_of(len(features))
    rows, edits, copies, reason = [], [], [], ""
    for done, (row, edit) in enumerate(jobs, 1):
        try:
            image = reduced(read(row))
        except BadImage as bad:  # removed or changed since it was indexed
            reason = str(bad)
        else:
            copies.append(embed(EDITS[edit](image, np.random.default_rng([row, list(EDITS).index(edit)]))))
            rows.append(row)
            edits.append(edit)
        if progress is not None:
            progress(done, len(jobs))
    if not copies:
        raise UserError(
            f"None of the images of the index can be read: {reason}. Update the index, or set `images` or `threshold`."
        )
    queries = F.normalize(torch.stack(copies).float(), dim=1)
    positives = (queries * unit_rows(features, np.array(rows))).sum(1).numpy()
    negatives = nearest_others(queries, features, known, rows, read, float(np.quantile(positives, 0.1)))
    threshold, precision, recall = best_threshold(positives, negatives)
    found = {edit: (positives >= threshold)[np.array(edits) == edit] for edit in EDITS if edit in edits}
    recalls = {edit: float(each.mean()) for edit, each in found.items()}
    return Calibration(threshold=threshold, precision=precision, recall=recall, copies=len(copies), recalls=recalls)


def edits_of(count: int) -> list[tuple[int, str]]:
    """Return (row, edit) of every copy: images evenly spaced over `count` rows, with the edits in turn."""
    rows, names = spaced_indices(count, NUM_COPIES).tolist(), list(EDITS)
    times = min(len(names), -(-NUM_COPIES // max(1, len(rows))))
    return [(row, names[(number + turn) % len(names)]) for number, row in enumerate(rows) for turn in range(times)]


def reduced(image: np.ndarray) -> np.ndarray:
    """Return an image, reduced to a shorter side of MAX_SIDE if it is larger."""
    scale = MAX_SIDE / min(image.shape[:2])
    size = tuple(round(side * scale) for side in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image


def nearest_others(
    queries: torch.Tensor, features: np.ndarray, known: np.ndarray, rows: Sequence[int], read: Read, above: float
) -> np.ndarray:
    """Return the cosine of each query to the nearest image that is no duplicate of its row, if there is one.

    The index may have duplicates that are not known yet: of those above a cosine, the pixels are compared.
    """

    @lru_cache(1024)
    def is_copy(row: int, other: int) -> bool:
        with suppress(BadImage):
            return correlation(gray_thumbnail(read(row)), gray_thumbnail(read(other))) >= SAME_CORRELATION
        return False

    def is_other(row: int, cosine: float, other: int) -> bool:
        return known[row] != known[other] and not (cosine >= above and is_copy(row, other))

    lines = zip(rows, *(part.tolist() for part in top_k(queries, features, MAX_KNOWN)), strict=True)
    nearest = (
        next((c for c, other in zip(*line, strict=True) if is_other(row, c, other)), None) for row, *line in lines
    )
    return np.array([cosine for cosine in nearest if cosine is not None])


def gray_thumbnail(image: np.ndarray) -> np.ndarray:
    """Return uint8 RGB [H, W, 3] as gray [48, 48], without its aspect ratio."""
    return cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (48, 48), interpolation=cv2.INTER_AREA)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the highest normalized correlation of the middle of one thumbnail [48, 48] with a part of the other.

    The middle, of 28 x 28 pixels, may be mirrored, and reduced by up to 0.7: one image may be a crop of the other.
    """
    best = -1.0
    for one, other in ((first, second), (second, first)):
        for middle in (one[10:38, 10:38], one[10:38, 37:9:-1]):
            for scale in (1.0, 0.9, 0.8, 0.7):
                part = cv2.resize(middle, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                best = max(best, float(cv2.matchTemplate(other, part, cv2.TM_CCOEFF_NORMED).max()))
    return best


def best_threshold(
    positives: np.ndarray, negatives: np.ndarray, precision: float = PRECISION
) -> tuple[float, float, float]:
    """Return the threshold of the best recall at this precision or more, with its precision and recall.

    It is the cosine of a positive pair; if none reaches the precision, it is above all negative ones.
    """
    thresholds = np.sort(positives)
    matches = len(positives) - np.searchsorted(thresholds, thresholds)
    false = len(negatives) - np.searchsorted(np.sort(negatives), thresholds)
    reached = np.flatnonzero(matches / (matches + false) >= precision)
    if not len(reached):
        return float(np.nextafter(negatives.max(), 2)), 1.0, 0.0
    first = reached[0]
    return (
        float(thresholds[first]),
        float(matches[first] / (matches + false)[first]),
        float(matches[first] / len(positives)),
    )
