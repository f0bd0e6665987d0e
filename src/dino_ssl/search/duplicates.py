"""Near-duplicates of an index in four tiers: same bytes, same pixels, perceptual hash, features.

Two images are duplicates if any tier links them. Links are not transitive: the ends of a chain of small differences may
show different things. So a connected component of links is split into groups around one image each, the one that is
kept: every other image of a group is a duplicate of that image itself. Images that are kept are not linked.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from dino_ssl.data.dataset import BadImage
from dino_ssl.errors import UserError, check_value, did_you_mean
from dino_ssl.progress import Progress, StartProgress, no_progress
from dino_ssl.search.nearest import neighbors

Keep = Literal["largest", "first", "sharpest"]
Tier = Literal["bytes", "pixels", "hash", "features"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""From the strictest."""
HASH_DISTANCE = 6
"""Bits of 64 in which the perceptual hashes of duplicates may differ."""
MIRRORED = np.uint64(0x5555555555555555)
"""Bits that a mirrored image inverts: coefficients of odd horizontal frequency change their sign."""
HASH_BITS = 24
"""Bits that are set in the hash of an image with structure: of 64 coefficients, half are above the median, unless many
are equal. White and black pages have equal hashes, so those with fewer bits are not compared."""
NEIGHBORS = 5
"""Nearest images of each image that may be linked to it by features."""
PROBES = 16
"""Lists of approximate search that are compared with each image: of pairs with a cosine of 0.95, 99.7 % are found
from either side, at a quarter of the time that 99 % of the nearest images of any cosine take."""
PIXEL_SIMILARITY = 0.999
"""Cosine from which images of the same size are decoded to compare their pixels; float16 features differ by 0.0005."""
SHARPNESS_SIDE = 512
"""Shorter side at which sharpness is compared: a variance per pixel depends on the size."""
BLOCK_ROWS = 4096

Read = Callable[[int], np.ndarray]
"""Returns the pixels of a row; raises BadImage."""


class Copy(NamedTuple):
    """An image of a group that is not kept."""

    row: int
    tier: Tier
    """The strictest tier that links it to the image that is kept."""
    similarity: float
    """Cosine of its features to those of the image that is kept."""


class DuplicateGroup(NamedTuple):
    """An image and its duplicates."""

    keep: int
    """Row of the image to keep."""
    copies: list[Copy]
    lowest: float
    """Lowest cosine of two images of the group."""

    @property
    def rows(self) -> list[int]:
        """All rows, that of the image to keep first."""
        return [self.keep, *(copy.row for copy in self.copies)]


@dataclass(frozen=True)
class Links:
    """The values by which two rows are duplicates."""

    features: Any
    """[N, D], unit length."""
    contents: np.ndarray
    """[N] a number that images of the same bytes share."""
    pixels: np.ndarray
    """[N] a number that images of the same pixels share."""
    hashes: np.ndarray
    """[N] uint64."""
    hashed: np.ndarray
    """[N] bool: images whose hashes are compared."""
    threshold: float
    """Cosine of duplicates."""
    distance: int
    """Bits in which the hashes of duplicates may differ."""

    def compare(self, row: int, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each other row [n] the number of the strictest tier that links it, or 4, and the cosine."""
        cosines = (unit_rows(self.features, others) @ unit_rows(self.features, np.array([row]))[0]).numpy()
        differing = self.hashes[others] ^ self.hashes[row]
        near = np.minimum(np.bitwise_count(differing), np.bitwise_count(differing ^ MIRRORED)) <= self.distance
        linked = [
            self.contents[others] == self.contents[row],
            self.pixels[others] == self.pixels[row],
            near & self.hashed[others] & self.hashed[row],
            cosines >= self.threshold,
            np.ones(len(others), bool),
        ]
        return np.argmax(linked, axis=0), np.minimum(cosines, 1)


class Components:
    """Connected components of N rows, as a forest: each row points to a smaller one or itself."""

    def __init__(self, count: int) -> None:
        self.roots = np.arange(count)

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Join the components of rows `first` and `second`, pair by pair."""
        while len(first):
            a, b = self.roots[first], self.roots[second]
            np.minimum.at(self.roots, np.maximum(a, b), np.minimum(a, b))
            while ((up := self.roots[self.roots]) != self.roots).any():
                self.roots = up
            apart = self.roots[first] != self.roots[second]
            first, second = first[apart], second[apart]

    def of_several(self) -> list[np.ndarray]:
        """Return the rows, ascending, of each component of at least two."""
        order = np.argsort(self.roots, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(self.roots[order])) + 1)
        return [part for part in parts if len(part) > 1]


def find_duplicates(
    features: Any,
    items: Any,
    threshold: float,
    *,
    read: Read,
    keep: Keep = "largest",
    distance: int = HASH_DISTANCE,
    start_progress: StartProgress = no_progress,
) -> list[DuplicateGroup]:
    """Return the groups of duplicates among N images, in the order of the images that are kept.

    Args:
        features: [N, D], an array or memory-mapped shards.
        items: Columns of the N images: see `items.Items`. Without perceptual hashes, that tier finds nothing.
        threshold: Cosine above which two images are duplicates, -1 to 1 (or higher: none are).
        read: Returns the pixels of a row. Only images of which another has nearly the same features are read.
        keep: The image of a group to keep: the one of most pixels (then bytes), the first by name, or the sharpest.
        distance: Bits of 64 in which the perceptual hashes of duplicates may differ, 0 to 64.
        start_progress: See `progress.StartProgress`.
    """
    check_value("distance", distance, least=0, most=64)
    if keep not in get_args(Keep):
        raise UserError(
            f"`keep` must be one of {', '.join(get_args(Keep))}; got {keep!r}{did_you_mean(keep, get_args(Keep))}."
        )
    components, contents = known_components(items, distance), representatives(items.content_hashes)
    distinct = np.unique(contents)
    with start_progress("nearest neighbors") as progress:
        first, second, cosines = _neighbor_pairs(features, distinct, progress)
    with start_progress("same pixels") as progress:
        pixels = _same_pixels(first, second, cosines, contents, items, read, progress)
    components.join(np.arange(len(contents)), pixels)
    near = cosines >= threshold - 1e-3  # neighbors may be approximate by rounding; `compare` decides
    components.join(first[near], second[near])
    hashes, hashed = _hashes(items)
    links = Links(features, contents, pixels, hashes, hashed, threshold, distance)
    groups: list[DuplicateGroup] = []
    with start_progress("groups") as progress:
        several = components.of_several()
        for done, rows in enumerate(several, 1):
            groups += split(_by_preference(rows, keep, items, read), links)
            progress(done, len(several))
    return sorted(groups, key=lambda group: group.keep)


def known_components(items: Any, distance: int = HASH_DISTANCE) -> Components:
    """Return the components of images of the same bytes or near perceptual hashes, for which no image is read.

    A hash is near if it is that of the mirrored image.
    """
    contents, (hashes, hashed) = representatives(items.content_hashes), _hashes(items)
    components = Components(len(contents))
    components.join(np.arange(len(contents)), contents)
    rows = np.flatnonzero(hashed & (contents == np.arange(len(contents))))
    both = np.concatenate([hashes[rows], hashes[rows] ^ MIRRORED])
    for first, second in hash_pairs(both, distance):
        components.join(rows[first % len(rows)], rows[second % len(rows)])
    return components


def _hashes(items: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return perceptual hashes, uint64 [N], and which of them are compared, bool [N]: none if they are missing."""
    hashes = items.perceptual_hashes
    hashes = np.zeros(len(items.content_hashes), np.uint64) if hashes is None else hashes
    return hashes, np.bitwise_count(hashes) >= HASH_BITS


def split(rows: np.ndarray, links: Links) -> Iterator[DuplicateGroup]:
    """Split a connected component, given in the order of preference, into groups.

    The first row is kept, and the rows that are linked to it are its copies; likewise among the remaining rows. A row
    that is linked only to copies stays out.
    """
    while len(rows) > 1:
        tiers, cosines = links.compare(rows[0], rows[1:])
        linked = tiers < len(TIERS)
        copies = rows[1:][linked]
        if len(copies):
            found = zip(copies.tolist(), tiers[linked].tolist(), cosines[linked].tolist(), strict=True)
            lowest = lowest_cosine(links.features, np.array([rows[0], *copies]))
            yield DuplicateGroup(int(rows[0]), [Copy(row, TIERS[tier], cosine) for row, tier, cosine in found], lowest)
        rows = rows[1:][~linked]


def unit_rows(features: Any, rows: np.ndarray) -> torch.Tensor:
    """Return rows of the features as float32 of unit length, [n, D]."""
    return F.normalize(torch.as_tensor(np.asarray(features[rows])).float(), dim=1)


def lowest_cosine(features: Any, rows: np.ndarray) -> float:
    """Return the lowest cosine of two of these rows."""
    blocks = [rows[at : at + BLOCK_ROWS] for at in range(0, len(rows), BLOCK_ROWS)]
    pairs = ((a, b) for number, a in enumerate(blocks) for b in blocks[number:])
    return min(1.0, *(float((unit_rows(features, a) @ unit_rows(features, b).T).min()) for a, b in pairs))


def representatives(values: np.ndarray) -> np.ndarray:
    """Return for each value the index of the first one that equals it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def hash_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of hashes, uint64 [N], that differ in at most `distance` bits; all such pairs but repeated ones.

    Equal hashes are paired with the first of them only. Of distance + 1 bands of bits, such hashes share one: only
    hashes that share a band are compared (multi-index hashing, Norouzi et al. 2012).
    """
    first = representatives(hashes)
    yield np.arange(len(hashes)), first
    rows = np.unique(first)
    edges = np.linspace(0, 64, distance + 2).astype(int).tolist()
    for low, high in pairwise(edges):
        if low == high:
            continue
        bands = (hashes[rows] >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(bands, kind="stable")
        bands, values, left = bands[order], hashes[rows][order], np.arange(len(rows))
        for step in range(1, len(rows)):
            left = left[left + step < len(rows)]
            left = left[bands[left] == bands[left + step]]
            if not len(left):
                break
            near = left[np.bitwise_count(values[left] ^ values[left + step]) <= distance]
            if len(near):
                yield rows[order[near]], rows[order[near + step]]


def _neighbor_pairs(features: Any, rows: np.ndarray, progress: Progress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pairs of rows and their cosines: each of `rows` with its nearest ones among them."""
    if len(rows) < 2:
        return np.empty(0, int), np.empty(0, int), np.empty(0, np.float32)
    subset = features if len(rows) == len(features) else features[rows]
    cosines, nearest = (part.numpy() for part in neighbors(subset, NEIGHBORS, progress, probes=PROBES))
    return np.repeat(rows, nearest.shape[1]), rows[nearest.ravel()], cosines.ravel()  # of missing ones: below -1


def _same_pixels(
    first: np.ndarray,
    second: np.ndarray,
    cosines: np.ndarray,
    contents: np.ndarray,
    items: Any,
    read: Read,
    progress: Progress,
) -> np.ndarray:
    """Return for each image the first one of the same pixels; images without nearly equal features are not read."""
    sizes = items.widths.astype(np.int64) << 32 | items.heights
    close = (cosines >= PIXEL_SIMILARITY) & (sizes[first] == sizes[second])
    rows = np.unique([first[close], second[close]])
    digests: dict[bytes, int] = {}
    same = np.arange(len(contents))
    for done, row in enumerate(rows.tolist(), 1):
        try:
            pixels = read(row)
        except BadImage:  # removed or changed since it was indexed
            continue
        same[row] = digests.setdefault(hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes()).digest(), row)
        progress(done, len(rows))
    return same[contents]


def _by_preference(rows: np.ndarray, keep: Keep, items: Any, read: Read) -> np.ndarray:
    """Return the rows, those to keep first; equal ones by name."""

    def sharpness(row: int) -> float:
        try:
            return laplacian_variance(read(row))
        except BadImage:
            return -1.0

    values: dict[int, Any] = {}
    for row in rows.tolist():
        best: tuple[float, ...] = ()
        if keep == "largest":
            best = (-int(items.widths[row]) * int(items.heights[row]), -int(items.sizes_bytes[row]))
        elif keep == "sharpest":
            best = (-sharpness(row),)
        values[row] = (*best, items.names[row])
    return np.array(sorted(values, key=values.__getitem__))


def laplacian_variance(image: np.ndarray) -> float:
    """Return the sharpness of uint8 RGB [H, W, 3]: the variance of the Laplacian of its gray values at one size.

    Pech-Pacheco et al. 2000. All images are resized to the same shorter side, so that an enlarged copy is less sharp.
    """
    scale = SHARPNESS_SIDE / min(image.shape[:2])
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    size = tuple(max(1, min(round(side * scale), 16 * SHARPNESS_SIDE)) for side in gray.shape[::-1])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return float(cv2.Laplacian(cv2.resize(gray, size, interpolation=method), cv2.CV_32F).var())
