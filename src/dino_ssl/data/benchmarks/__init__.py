"""Readers of published benchmarks."""

from pathlib import Path

from dino_ssl.errors import UserError, did_you_mean


def read_split(folder: Path, split: str, layout: str) -> list[str]:
    """Return the names in FOLDER/SPLIT.txt. Raises UserError, with the expected layout, if they cannot be used."""
    path = folder / f"{split}.txt"
    if not path.is_file():
        lists = sorted(file.stem for file in folder.glob("*.txt"))
        raise UserError(
            f"there is no {path}{did_you_mean(split, lists)}\nLists: {', '.join(lists) or 'none'}.\n{layout}"
        )
    names = path.read_text().split()
    if not names:
        raise UserError(f"{path} is empty.\n{layout}")
    if invalid := [name for name in names if Path(name).name != name]:
        raise UserError(f"{path} contains {invalid[0]!r}, which is not the name of a file or folder.\n{layout}")
    return names
