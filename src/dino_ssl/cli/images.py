"""The pictures that a command draws something of: files, what folders hold, and drawn ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

DRAWN = 12
"""Pictures that the word `scenes` stands for where each is looked at."""


class Named(NamedTuple):
    """One picture: its name in messages, where its figures go below the output's folder, and how to read it."""

    name: str
    place: str
    read: Callable[[], "np.ndarray"]
    """uint8 [H, W, 3] RGB. Raises UserError for a file that was named itself, BadImage for what a folder holds."""


def named_images(names: Sequence[str], done: Callable[[int, int], None]) -> list[Named]:
    """All pictures that were named, and those of the folders that were; no two have one place."""
    from dino_ssl.api.calls import read_image
    from dino_ssl.data.sources import WORDS, open_dataset

    found: list[Named] = []
    taken: set[str] = set()

    def add(name: str, stem: str, read: Callable[[], Any]) -> None:
        place, number = stem, 2
        while place in taken:
            place, number = f"{stem}-{number}", number + 1
        taken.add(place)
        found.append(Named(name, place, read))

    for name in names:
        if name in WORDS:
            dataset = open_dataset(name, part="val").subset(range(DRAWN))
        elif Path(name).is_dir():
            dataset = open_dataset(name, done)
        else:
            read_image(name)  # now: a wrong name is told before any work
            add(name, Path(name).stem, lambda name=name: read_image(name))
            continue
        for index, own in enumerate(dataset.names):
            place = str(Path(own).with_suffix(""))
            add(f"{name.rstrip('/')}/{own}", place, lambda p=dataset, i=index: p.read(i))
    return found
