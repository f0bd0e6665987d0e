"""Selections: named lists of images, saved in the folder of the index and exported as lists or class folders.

Several tabs, and several servers of one index, may change them at the same time. Every change is applied to the file as
it is then, under a lock. So additions and removals of two tabs are merged; to rename or delete a selection, the page
must have seen the last version.
"""

import csv
import fcntl
import io
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from dino_ssl.errors import UserError
from dino_ssl.files import check_format, read_json, write_errors, write_json
from dino_ssl.formatting import CONTROL, csv_text

FORMAT = 1
FILE, LOCK = "selections.json", ".selections.lock"
REMOVE = "Remove"
"""Name of the selection of the duplicates that the page has marked, which is no class."""
MAX_NAME = 80
"""Most characters of a selection's name, which becomes a folder."""
Operation = Literal["add", "remove", "create", "rename", "delete"]
OPERATIONS: tuple[str, ...] = get_args(Operation)


class Conflict(UserError):  # noqa: N818
    """Raised for a change that depends on a version of the selections that is not the last one."""


class State(NamedTuple):
    """The selections and their version, which every change increments."""

    version: int
    names: dict[str, list[str]]
    """The names of the images of each selection, in the order in which they were added."""


class Selections:
    """The file of the selections of an index."""

    def __init__(self, folder: Path) -> None:
        self.path, self.lock = folder / FILE, folder / LOCK
        self._threads = threading.Lock()

    def read(self) -> State:
        """Return the last version. Raises UserError for a file that this program did not write."""
        if not self.path.exists():
            return State(0, {})
        data = read_json(self.path)
        if not isinstance(data, dict) or not isinstance(data.get("selections"), dict):
            raise UserError(f"{self.path} is damaged: repair it, or move it away to start with no selections.")
        check_format(self.path, data.get("format"), FORMAT)
        return State(int(data["version"]), data["selections"])

    def change(
        self, operation: Operation, selection: str, *, version: int, images: Iterable[str] = (), to: str = ""
    ) -> State:
        """Apply a change and return the new version.

        version: the last one that the caller has seen. images: names to add or remove. to: the new name of a selection.
        Raises Conflict, and UserError for a name that cannot be a folder or is taken.
        """
        if operation not in OPERATIONS or type(version) is not int:
            raise UserError(f"Expected a version and one of {', '.join(OPERATIONS)}, got {operation!r}.")
        with self._exclusive():
            state = self.read()
            names = dict(state.names)
            if operation in ("rename", "delete") and version != state.version:
                raise Conflict("The selections have been changed elsewhere, in another tab. Check them and try again.")
            if operation != "create" and selection not in names:
                raise Conflict(f"The selection {selection!r} no longer exists: it was renamed or deleted elsewhere.")
            if operation == "create":
                names[_unused(selection, names)] = []
            elif operation == "rename":
                kept = {name: _unused(to, set(names) - {name}) if name == selection else name for name in names}
                names = {kept[name]: images for name, images in names.items()}
            elif operation == "delete":
                del names[selection]
            elif operation == "add":
                names[selection] = list(dict.fromkeys([*names[selection], *images]))
            else:
                removed = set(images)
                names[selection] = [name for name in names[selection] if name not in removed]
            state = State(state.version + 1, names)
            write_json(self.path, {"format": FORMAT, "version": state.version, "selections": names})
            return state

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with write_errors(self.lock):
            self.lock.touch()
        with self._threads, open(self.lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _unused(name: str, taken: Iterable[str]) -> str:
    """Return a name without spaces around it. Raises UserError if it is taken or cannot be a folder."""
    name = name.strip()
    encoded = name.encode("utf-8", "replace")
    too_long = len(name) > MAX_NAME or len(encoded) > 255
    has_surrogate = encoded.decode() != name  # which a JSON answer of all selections cannot contain
    if not name or too_long or has_surrogate or name[0] == "." or set(name) & {"/", "\\"} or CONTROL.search(name):
        raise UserError(
            f"Expected a name of 1 to {MAX_NAME} visible characters, without slashes and a dot at its start."
        )
    if name.casefold() in {other.casefold() for other in taken}:  # equal folders on some file systems
        raise UserError(f"There is a selection {name!r} already: choose another name.")
    return name


def as_csv(items: Sequence[Mapping[str, Any]]) -> str:
    """Return one line per image, with a header. Names and labels are text, also for a spreadsheet."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([items[0].keys() if items else ["name"], *(map(csv_text, item.values()) for item in items)])
    return file.getvalue()


class Exported(NamedTuple):
    """The number of files that were written, that existed already and are kept, and that are no files."""

    written: int
    kept: int
    missing: int


def export_folders(
    folder: Path, selections: Mapping[str, Mapping[str, Path | None]], how: Literal["copy", "link"]
) -> Exported:
    """Copy or link the images of each selection into a class folder, which `dino train` and `dino eval` read.

    selections: for each selection the file of each name, which becomes FOLDER/SELECTION/NAME. A file that exists is
    never overwritten.
    """
    if how not in ("copy", "link"):
        raise UserError(f"Expected copy or link, got {how!r}.")
    written = kept = missing = 0
    for selection, files in selections.items():
        for name, file in files.items():
            target = folder / selection / name
            if ".." in Path(name).parts or file is None or not file.is_file():  # names of tar files may lead elsewhere
                missing += 1
                continue
            with write_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    if how == "link":
                        target.symlink_to(file.absolute())
                    else:
                        _copy(file, target)
                    written += 1
                except FileExistsError:
                    kept += 1
    return Exported(written, kept, missing)


def _copy(file: Path, target: Path) -> None:
    """Copy a file to a name that does not exist; an interrupted copy is removed."""
    with open(file, "rb") as source, open(target, "xb") as copy:
        try:
            shutil.copyfileobj(source, copy)
        except BaseException:
            target.unlink()
            raise
