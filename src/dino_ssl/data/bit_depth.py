"""The bit depth of a dataset whose images have 16 bits per value: cameras and scanners fill 10, 12 or 14 of them.

One depth holds for all images, in training and in everything that uses the trained network. It never depends on the
single image, whose brightness is part of its content.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from os import PathLike

import numpy as np

from dino_ssl.data.dataset import BadImage, spaced_indices
from dino_ssl.data.decode import values_of_16_bits

DEPTHS = (8, 10, 12, 14, 16)
SHARE = 0.9999
"""Share of the values of the sample that a depth has to hold: hot pixels do not decide."""
SAMPLE = 32
"""Images of a dataset that are examined, evenly spaced."""
SUFFIXES = (".png", ".apng", ".tif", ".tiff")
"""Of files that may have 16 bits per value."""


def estimate_bit_depth(files: Iterable[tuple[str | PathLike, bytes | None]]) -> int | None:
    """Return the smallest of `DEPTHS` that holds the values of the images with 16 bits; None if there are none.

    files: path, and content if it has been read already. A TIFF may also state its largest value.
    """
    counts, stated = np.zeros(2**16, np.int64), 0
    for path, data in files:
        with suppress(BadImage):
            values, largest = values_of_16_bits(path, data)
            counts += np.bincount(values.ravel(), minlength=2**16)
            stated = max(stated, largest)
    if not counts.any():
        return None
    share = counts.cumsum() / counts.sum()
    return next(bits for bits in DEPTHS if share[2**bits - 1] >= SHARE and stated < 2**bits)


def sample_for_bit_depth(names: Sequence[str]) -> list[int]:
    """Return the indices of the images by which the bit depth of a dataset is estimated."""
    indices: list[int] = spaced_indices(len(names), SAMPLE).tolist()
    return [index for index in indices if names[index].lower().endswith(SUFFIXES)]
