"""DAVIS-2017 (Pont-Tuset et al., 2017), as it is downloaded: frames, indexed-PNG masks, and lists of sequences.

A mask is a PNG whose pixels are the objects' numbers; its palette is for the eye alone, as it is for the official
scorer. So is what this project writes.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dino_ssl.data.clips import Clip
from dino_ssl.data.dataset import BadImage
from dino_ssl.data.decode import decode
from dino_ssl.data.masks import read_mask
from dino_ssl.errors import UserError, did_you_mean

TREE = """\
  {root}/
    ImageSets/2017/{split}.txt                      the names of the sequences, one a line
    JPEGImages/480p/blackswan/00000.jpg ...     the frames of each
    Annotations/480p/blackswan/00000.png ...    its masks under the same names: 0 the ground, 1, 2, ... objects"""

SOURCE = "It is DAVIS-2017-trainval-480p.zip from davischallenge.org; give the folder that holds these three."


class DavisClip(Clip):
    """One sequence: its frames and masks, which carry the same names."""

    def __init__(self, name: str, files: list[Path], annotations: list[Path]) -> None:
        self.name, self.files, self.annotations = name, files, annotations
        self.frame_names = [file.stem for file in files]

    def frames(self) -> Iterator[np.ndarray]:
        for file in self.files:
            try:
                yield decode(file)
            except BadImage as bad:
                raise UserError(f"A frame cannot be read: {bad}\nEvery frame is scored: copy it again.") from bad

    def masks(self) -> Iterator[np.ndarray]:
        yield from map(read_mask, self.annotations)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256("\0".join([self.name, *self.frame_names]).encode())
        digest.update(self.annotations[0].read_bytes())
        return digest.hexdigest()[:16]


def open_davis(root: str | Path, split: str = "val") -> list[DavisClip]:
    """The sequences of a split, in the order of its list. Nothing but names is read."""
    root, clips = Path(root), []
    for name, annotations in open_annotations(root, split).items():
        folder = root / "JPEGImages/480p" / name
        files = sorted(folder.glob("*.jpg")) if folder.is_dir() else []
        if not files:
            raise _wrong(root, split, f"there are no frames (*.jpg) of {name} in {folder}")
        if lacking := {file.stem for file in files} ^ {file.stem for file in annotations}:
            raise _wrong(
                root,
                split,
                f"{name} has {len(files)} frames and {len(annotations)} masks; one of the two is missing of "
                f"{', '.join(sorted(lacking)[:5])}{' ...' if len(lacking) > 5 else ''}",
            )
        clips.append(DavisClip(name, files, annotations))
    return clips


def open_annotations(root: str | Path, split: str = "val") -> dict[str, list[Path]]:
    """The files of the masks by the sequence's name, in the order of the split's list; no frame is needed."""
    root, found = Path(root), {}
    for name in sequence_names(root, split):
        folder = root / "Annotations/480p" / name
        found[name] = sorted(folder.glob("*.png")) if folder.is_dir() else []
        if not found[name]:
            raise _wrong(root, split, f"there are no masks (*.png) of {name} in {folder}")
    return found


def sequence_names(root: Path, split: str) -> list[str]:
    """What ImageSets/2017/SPLIT.txt says."""
    if not root.is_dir():
        raise _wrong(root, split, f"there is no folder {root}")
    path = root / "ImageSets/2017" / f"{split}.txt"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.txt"))
        raise _wrong(root, split, f"there is no {path}{f' ({did_you_mean(split, known)[2:]})' if known else ''}")
    names = path.read_text().split()
    if not names:
        raise _wrong(root, split, f"{path} names no sequence")
    if odd := [name for name in names if Path(name).name != name]:
        raise _wrong(root, split, f"{path} names {odd[0]!r}, which is no name of a folder")
    return names


def _wrong(root: Path, split: str, what: str) -> UserError:
    inside = [folder for folder in sorted(root.glob("*/ImageSets")) if folder.is_dir()] if root.is_dir() else []
    advice = f"Did you mean {inside[0].parent}?" if inside else SOURCE
    return UserError(f"Not DAVIS-2017: {what}.\nExpected:\n{TREE.format(root=root, split=split)}\n{advice}")
