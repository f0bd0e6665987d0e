"""DAVIS-2017 (Pont-Tuset et al., 2017) in its original layout: frames, masks as indexed PNG, lists of sequences.

The pixels of a mask are the labels of the objects; the palette is ignored, as in the official scorer.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dino_ssl.data.benchmarks import read_split
from dino_ssl.data.clips import Clip
from dino_ssl.data.decode import decode
from dino_ssl.data.masks import read_mask
from dino_ssl.errors import UserError

LAYOUT = """\
Expected the layout of DAVIS-2017-trainval-480p.zip from davischallenge.org:
  {root}/
    ImageSets/2017/{split}.txt                      names of the sequences, one per line
    JPEGImages/480p/blackswan/00000.jpg ...     frames of a sequence
    Annotations/480p/blackswan/00000.png ...    masks with the same names: 0 background, 1, 2, ... objects"""


class DavisClip(Clip):
    """A sequence; frames and masks have the same names."""

    def __init__(self, name: str, annotations: list[Path], files: Sequence[Path] = ()) -> None:
        self.name, self.annotations, self.files = name, annotations, files
        self.frame_names = [file.stem for file in annotations]

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 RGB [H, W, 3]. Raises BadImage if one cannot be read."""
        yield from map(decode, self.files)

    def masks(self) -> Iterator[np.ndarray]:
        """Yield the mask of each frame, uint8 [H, W]."""
        yield from map(read_mask, self.annotations)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the names and the first mask."""
        digest = hashlib.sha256("\0".join([self.name, *self.frame_names]).encode())
        digest.update(self.annotations[0].read_bytes())
        return digest.hexdigest()[:16]


def open_davis(root: str | Path, split: str = "val", *, frames: bool = True) -> list[DavisClip]:
    """List the sequences of a split, in the order of its list. Raises UserError if frames or masks are missing.

    frames: False opens the masks only.
    """
    root, layout, clips = Path(root), LAYOUT.format(root=root, split=split), []
    for name in read_split(root / "ImageSets/2017", split, layout):
        annotations = sorted((root / "Annotations/480p" / name).glob("*.png"))
        files = sorted((root / "JPEGImages/480p" / name).glob("*.jpg")) if frames else []
        if not annotations or (frames and not files):
            raise UserError(f"{name} has {len(files)} frames (*.jpg) and {len(annotations)} masks (*.png).\n{layout}")
        if frames and (missing := sorted({file.stem for file in files} ^ {file.stem for file in annotations})):
            raise UserError(f"{name}: a frame or a mask is missing for {', '.join(missing[:5])}.\n{layout}")
        clips.append(DavisClip(name, annotations, files))
    return clips
