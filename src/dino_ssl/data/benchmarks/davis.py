"""DAVIS-2017 (Pont-Tuset et al., 2017) in its original layout: frames, masks as indexed PNG, lists of sequences.

The pixels of a mask are the labels of the objects; the palette is ignored, as in the official scorer.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dino_ssl.data.clips import Clip
from dino_ssl.data.decode import decode
from dino_ssl.data.masks import read_mask
from dino_ssl.errors import UserError, did_you_mean

LAYOUT = """\
  {root}/
    ImageSets/2017/{split}.txt                      names of the sequences, one per line
    JPEGImages/480p/blackswan/00000.jpg ...     frames of a sequence
    Annotations/480p/blackswan/00000.png ...    masks with the same names: 0 background, 1, 2, ... objects"""
SOURCE = "Download DAVIS-2017-trainval-480p.zip from davischallenge.org and pass the folder of these three."


class DavisClip(Clip):
    """A sequence; frames and masks have the same names."""

    def __init__(self, name: str, files: list[Path], annotations: list[Path]) -> None:
        self.name, self.files, self.annotations = name, files, annotations
        self.frame_names = [file.stem for file in files]

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


def open_davis(root: str | Path, split: str = "val") -> list[DavisClip]:
    """List the sequences of a split, in the order of its list. Raises UserError if frames or masks are missing."""
    root, clips = Path(root), []
    for name, annotations in open_annotations(root, split).items():
        folder = root / "JPEGImages/480p" / name
        files = sorted(folder.glob("*.jpg")) if folder.is_dir() else []
        if not files:
            raise _wrong_layout(root, split, f"there are no frames (*.jpg) of {name} in {folder}")
        if missing := sorted({file.stem for file in files} ^ {file.stem for file in annotations}):
            reason = f"{name} has {len(files)} frames and {len(annotations)} masks; one of the two is missing for "
            raise _wrong_layout(root, split, reason + ", ".join(missing[:5]))
        clips.append(DavisClip(name, files, annotations))
    return clips


def open_annotations(root: str | Path, split: str = "val") -> dict[str, list[Path]]:
    """List the mask files of each sequence, in the order of the split; frames are not needed."""
    root, files = Path(root), {}
    for name in sequence_names(root, split):
        folder = root / "Annotations/480p" / name
        files[name] = sorted(folder.glob("*.png")) if folder.is_dir() else []
        if not files[name]:
            raise _wrong_layout(root, split, f"there are no masks (*.png) of {name} in {folder}")
    return files


def sequence_names(root: Path, split: str) -> list[str]:
    """Return the names in ImageSets/2017/SPLIT.txt."""
    if not root.is_dir():
        raise _wrong_layout(root, split, f"there is no folder {root}")
    path = root / "ImageSets/2017" / f"{split}.txt"
    if not path.is_file():
        hint = did_you_mean(split, sorted(file.stem for file in path.parent.glob("*.txt")))
        raise _wrong_layout(root, split, f"there is no {path}{hint}")
    names = path.read_text().split()
    if not names:
        raise _wrong_layout(root, split, f"{path} is empty")
    if invalid := [name for name in names if Path(name).name != name]:
        raise _wrong_layout(root, split, f"{path} contains {invalid[0]!r}, which is not the name of a folder")
    return names


def _wrong_layout(root: Path, split: str, reason: str) -> UserError:
    below = [folder.parent for folder in sorted(root.glob("*/ImageSets")) if folder.is_dir()]
    advice = f"Did you mean {below[0]}?" if below else SOURCE
    return UserError(f"Not DAVIS-2017: {reason}.\nExpected:\n{LAYOUT.format(root=root, split=split)}\n{advice}")
