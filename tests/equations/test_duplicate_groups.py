"""Duplicates: which images are linked, how chains are cut, and which image of a group is kept."""

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_ssl.data.dataset import BadImage
from dino_ssl.errors import UserError
from dino_ssl.search.duplicates import (
    MIRRORED,
    Components,
    DuplicateGroup,
    find_duplicates,
    hash_pairs,
    laplacian_variance,
    lowest_cosine,
)
from dino_ssl.search.reading import perceptual_hash

HASH = np.uint64(0x0F0F0F0F0F0F0F0F)
"""A perceptual hash with half of its bits set, as that of an image with structure."""


def items_of(count: int, **columns: Any) -> SimpleNamespace:
    """Columns of an index of different images."""
    default = dict(
        names=[f"{row:04d}.jpg" for row in range(count)],
        content_hashes=np.array([f"{row:032x}" for row in range(count)]),
        perceptual_hashes=None,
        widths=np.full(count, 64, np.int32),
        heights=np.full(count, 48, np.int32),
        sizes_bytes=np.full(count, 1000),
    )
    return SimpleNamespace(**default | columns)


def no_pixels(row: int) -> np.ndarray:
    raise AssertionError(f"row {row} is read")


def circle(*degrees: float) -> np.ndarray:
    """Unit vectors: the cosine of two is that of the angle between them."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def partition(groups: list[DuplicateGroup]) -> list[list[int]]:
    return [group.rows for group in groups]


def test_a_chain_is_cut_so_that_every_copy_is_a_duplicate_of_the_image_that_is_kept() -> None:
    """At 10 degrees each, three links lead from the first to the last, which shows something else."""
    groups = find_duplicates(circle(0, 10, 20, 30), items_of(4), np.cos(np.radians(12)), read=no_pixels)
    assert partition(groups) == [[0, 1], [2, 3]]
    # a copy that is linked only to copies stays: 2 is linked to 1, and is kept with 1's group gone
    groups = find_duplicates(circle(0, 10, 20), items_of(3), np.cos(np.radians(12)), read=no_pixels)
    assert partition(groups) == [[0, 1]]


def test_the_lowest_similarity_is_that_of_the_two_least_similar_images_of_a_group() -> None:
    (group,) = find_duplicates(circle(0, 10, -10), items_of(3), np.cos(np.radians(12)), read=no_pixels)
    assert group.rows == [0, 1, 2]
    assert group.lowest == pytest.approx(np.cos(np.radians(20)), abs=1e-6)
    assert [copy.similarity for copy in group.copies] == pytest.approx([np.cos(np.radians(10))] * 2, abs=1e-6)
    rows = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    unit = F.normalize(torch.from_numpy(rows), dim=1)
    assert lowest_cosine(rows, np.arange(9)) == pytest.approx(float((unit @ unit.T).min()), abs=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.5, 0.99), st.sampled_from(["largest", "first"]))
def test_removing_the_copies_leaves_no_duplicates_and_loses_no_image(
    seed: int, count: int, threshold: float, keep: Any
) -> None:
    """Kept images are not linked to each other, and each copy is linked to the image that is kept of its group."""
    rng = np.random.default_rng(seed)
    contents = rng.integers(0, 12, count)  # the same bytes have the same features and hash
    features = F.normalize(torch.from_numpy(rng.standard_normal((12, 3))).float(), dim=1).numpy()[contents]
    cosines = features @ features.T
    items = items_of(
        count,
        perceptual_hashes=HASH ^ rng.integers(0, 2**6, 12).astype(np.uint64)[contents],
        content_hashes=np.array([f"{value:032x}" for value in contents]),
        widths=rng.integers(1, 9, count),
    )

    def is_linked(a: int, b: int) -> bool:
        differing = items.perceptual_hashes[a] ^ items.perceptual_hashes[b]
        return bool(
            items.content_hashes[a] == items.content_hashes[b]
            or np.bitwise_count(differing) <= 2
            or np.bitwise_count(differing ^ MIRRORED) <= 2
            or cosines[a, b] >= threshold
        )

    groups = find_duplicates(features, items, threshold, read=no_pixels, keep=keep, distance=2)
    rows = [row for group in groups for row in group.rows]
    copies = {copy.row for group in groups for copy in group.copies}
    assert len(rows) == len(set(rows))
    for group in groups:
        assert all(is_linked(group.keep, copy.row) for copy in group.copies)
    if count <= 6:  # all others are among the five nearest
        left = sorted(set(range(count)) - copies)
        assert not [pair for pair in combinations(left, 2) if is_linked(*pair)]


@pytest.mark.parametrize("distance", [0, 1, 4, 9])
def test_all_pairs_of_near_hashes_are_found(distance: int) -> None:
    """Against every pair; many hashes differ by a few bits."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, 40, dtype=np.uint64)
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (300, 5)).astype(np.uint64), axis=1)
    hashes = np.concatenate([base, base[rng.integers(0, 40, 300)] ^ flips, base[:5]])
    found, expected = Components(len(hashes)), Components(len(hashes))
    pairs = {
        (int(a), int(b)) for first, second in hash_pairs(hashes, distance) for a, b in zip(first, second, strict=True)
    }
    assert all(np.bitwise_count(hashes[a] ^ hashes[b]) <= distance for a, b in pairs)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance
    expected.join(*np.nonzero(near))
    found.join(*np.array(sorted(pairs)).T)
    assert (found.roots == expected.roots).all()
    distinct = {(min(a, b), max(a, b)) for a, b in pairs if hashes[a] != hashes[b]}
    first_of = {int(value): row for row, value in reversed(list(enumerate(hashes)))}
    rows = sorted(first_of.values())
    assert distinct == {(a, b) for a, b in combinations(rows, 2) if near[a, b]}


def test_components_are_those_of_a_walk_over_the_links() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 200, (2, 130))
    components = Components(200)
    components.join(first[:60], second[:60])
    components.join(first[60:], second[60:])
    labels = np.arange(200)
    for _ in range(200):
        for a, b in zip(first, second, strict=True):
            labels[a] = labels[b] = min(labels[a], labels[b])
    assert (components.roots == labels).all()
    assert sum(map(len, components.of_several())) == sum(n for n in np.unique(labels, return_counts=True)[1] if n > 1)


def test_tiers_are_named_by_the_strictest_link() -> None:
    """Of six images: the first, the same bytes, the same pixels, a near hash, near features, and another one."""
    features = circle(0, 0, 0, 5, 20, 90)
    items = items_of(
        6,
        content_hashes=np.array(["a", "a", "b", "c", "d", "e"]),
        perceptual_hashes=np.array([HASH, HASH, HASH, HASH ^ 3, ~HASH, 2**60 - 1], np.uint64),
    )
    reads: list[int] = []

    def read(row: int) -> np.ndarray:
        reads.append(row)
        return np.zeros((48, 64, 3), np.uint8)

    (group,) = find_duplicates(features, items, 0.9, read=read)
    assert [(copy.row, copy.tier) for copy in group.copies] == [
        (1, "bytes"),
        (2, "pixels"),
        (3, "hash"),
        (4, "features"),
    ]
    assert reads == [0, 2]  # images of the same bytes are read once, and other sizes and features not at all
    items.perceptual_hashes = None
    (group,) = find_duplicates(features, items, 0.9999, read=read)
    assert [(copy.row, copy.tier) for copy in group.copies] == [(1, "bytes"), (2, "pixels")]


def test_the_hash_of_a_mirrored_image_has_the_bits_of_odd_frequencies_inverted() -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), (96, 80), interpolation=cv2.INTER_CUBIC)
    images = [image, np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(image[::-1])]
    hashes = np.array([perceptual_hash(each) for each in images], np.uint64)
    assert np.bitwise_count(hashes[0] ^ hashes[1] ^ MIRRORED) <= 2
    (group,) = find_duplicates(circle(0, 45, 90), items_of(3, perceptual_hashes=hashes), 0.9, read=no_pixels)
    assert [(group.keep, copy.row, copy.tier) for copy in group.copies] == [(0, 1, "hash")]


def test_blank_images_are_not_duplicates_by_their_hash() -> None:
    """The hashes of a black and a white image are equal: no coefficient is above the median but the mean."""
    for blank in (0, 1, 2**63):
        items = items_of(2, perceptual_hashes=np.full(2, blank, np.uint64))
        assert find_duplicates(circle(0, 90), items, 0.9, read=no_pixels) == []


def test_images_of_another_size_or_other_pixels_are_not_the_same_pixels() -> None:
    features, items = circle(0, 0, 0), items_of(3, widths=np.array([64, 64, 32]))
    pixels = [np.zeros((48, 64, 3), np.uint8), np.ones((48, 64, 3), np.uint8)]
    assert find_duplicates(features, items, 2.0, read=pixels.__getitem__) == []


def test_images_that_are_gone_are_not_the_same_pixels() -> None:
    def read(row: int) -> np.ndarray:
        raise BadImage(str(row), "no such file")

    assert find_duplicates(circle(0, 0), items_of(2), 2.0, read=read) == []
    (group,) = find_duplicates(circle(0, 0), items_of(2), 0.9, read=read, keep="sharpest")
    assert group.copies[0].tier == "features"


def test_the_image_to_keep() -> None:
    rng = np.random.default_rng(0)
    sharp = cv2.resize(rng.integers(0, 256, (60, 80, 3), np.uint8), (160, 120), interpolation=cv2.INTER_NEAREST)
    images = [cv2.GaussianBlur(sharp, (0, 0), 3), sharp, cv2.resize(sharp, (320, 240), interpolation=cv2.INTER_CUBIC)]
    items = items_of(
        3, names=["b.jpg", "c.jpg", "a.jpg"], widths=np.array([160, 160, 320]), heights=np.array([120, 120, 240])
    )

    def kept(keep: Any) -> int:
        (group,) = find_duplicates(circle(0, 1, 2), items, 0.9, read=images.__getitem__, keep=keep)
        return group.keep

    assert kept("largest") == 2
    items.widths, items.heights = np.full(3, 160), np.full(3, 120)
    items.sizes_bytes = np.array([1, 3, 2])
    assert kept("largest") == 1  # of equal pixels, that of most bytes
    assert kept("first") == 2  # by name
    assert kept("sharpest") == 1
    assert laplacian_variance(images[2]) < laplacian_variance(images[1])  # an enlarged copy has no more detail


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images(count: int) -> None:
    assert find_duplicates(circle(*range(0, 90 * count, 90)).reshape(-1, 2), items_of(count), 0.9, read=no_pixels) == []


def test_a_wrong_rule_is_named() -> None:
    with pytest.raises(UserError, match="`keep` must be one of largest, first, sharpest; got 'larges'; did you mean"):
        find_duplicates(circle(0), items_of(1), 0.9, read=no_pixels, keep="larges")  # type: ignore[arg-type]
