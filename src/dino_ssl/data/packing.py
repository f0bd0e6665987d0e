"""Making a pack: one pass over a folder that can be stopped anywhere, and goes on where it was.

Everything is written into `photos.ds.part`; the last act is to rename it. Every few seconds what was written is
flushed to the disk and `progress.json` says how far it reaches; whatever lies beyond that is written again. So a pack
that was stopped, killed or ran out of space ends with the same bytes as one that was not.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from dino_ssl.config import from_dict, to_dict
from dino_ssl.data.dataset import BadImage, Skipped
from dino_ssl.data.decode import decode, probe
from dino_ssl.data.folder import printable
from dino_ssl.data.listing import GONE, Listed, Listing, differences
from dino_ssl.data.pack import ABOUT, About, Form, is_pack, read_about
from dino_ssl.data.pack_writer import PROGRESS, Reached, Writer, finish, flush
from dino_ssl.errors import UserError
from dino_ssl.files import PART, remove_parts, write_json
from dino_ssl.progress import Progress

AHEAD_BYTES = 2**26
"""Bytes of files that are read ahead of being written."""


class Taken(NamedTuple):
    """A picture, ready to be written."""

    name: str
    data: bytes
    size: tuple[int, int]
    sum: int


class Packing:
    """The folder `source` on its way into the pack `out`: `look`, then `write`, inside of a `with`."""

    def __init__(self, source: str, out: str, form: Form | None = None) -> None:
        self.source, self.out, self.form = Path(source).expanduser(), Path(out).expanduser(), form or Form()
        self.part = Path(f"{self.out}{PART}")
        self.lock: int | None = None
        if is_pack(self.source):
            raise UserError(f"{source} is a pack already: expected the folder that the pictures lie in.")
        if not self.source.is_dir():
            what = "is a file" if self.source.exists() else "is not there"
            raise UserError(f"{source} {what}: expected a folder of pictures. Check the path.")
        if self.out.exists() and not is_pack(self.out):
            raise UserError(f"{out} exists and is no pack: choose another place with -o, such as {self.source}.ds.")

    def __enter__(self) -> "Packing":
        if self.finished:
            return self
        try:
            self.part.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.part, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"Cannot write {self.part}: {error.strerror}. Choose another place with -o.") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__()
            raise UserError(f"Another process packs into {self.out} now: let it end, or choose another -o.") from None
        except OSError:  # a file system without locks
            pass
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @property
    def finished(self) -> bool:
        return is_pack(self.out)

    @property
    def begun(self) -> int:
        """How many files an attempt that was stopped is done with."""
        return self._reached().seen

    def look(self, progress: Progress | None = None) -> None:
        """List the folder. Raises UserError where it, or the form, is not what an earlier attempt began with."""
        made = read_about(self._there).form if is_pack(self._there) else self._reached().form
        if made != self.form:
            raise UserError(
                f"{self._there} was made with {_flags(made)}, not with {_flags(self.form)}. Give the same options, "
                f"another -o, or remove it to begin anew: rm -r {self._there}"
            )
        fresh = self.out.with_name(f".{self.out.name}.look{PART}")
        before, now = Listing(self._there), Listing(fresh)
        try:
            folders, ignored = now.take(self.source, progress)
            if is_pack(self._there) or (self.part / PROGRESS).exists():
                self._must_be_unchanged(before, now)
                return
            os.replace(now.names, before.names)
            os.replace(now.stamps, before.stamps)
            with closing(Writer(self.part, Reached(form=self.form, ignored=dict(ignored)))) as writer:
                writer.settle(folders)
        except OSError as error:
            raise UserError(f"Cannot write {self.out}: {error.strerror or error}. {_advice(error)}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    @property
    def _there(self) -> Path:
        return self.out if self.finished else self.part

    def _must_be_unchanged(self, before: Listing, now: Listing) -> None:
        changes = list(islice(differences(before, now), 6))
        if not changes:
            return
        shown = "\n".join(f"  {os.fsdecode(name)}: {what}" for name, what in changes[:5])
        more = "\n  ..." if len(changes) > 5 else ""
        raise UserError(
            f"{self.source} has changed since {self._there} was {'made' if self.finished else 'begun'} "
            f"({len(before)} files then, {len(now)} now):\n{shown}{more}\n"
            f"Pack it to another place with -o, or remove this one to begin anew: rm -r {self._there}"
        )

    def _reached(self) -> Reached:
        file = self.part / PROGRESS
        return from_dict(Reached, json.loads(file.read_text())) if file.exists() else Reached(form=self.form)

    def write(self, progress: Progress | None = None) -> About:
        """Write what is not written yet, and give the pack its name. Whatever ends this, the next call goes on."""
        if not self.finished:
            listing = Listing(self.part)
            try:
                if not is_pack(self.part):
                    self._pictures(listing, progress)
                    remove_parts(self.part)
                    about = finish(self.part, self._reached(), self.source)
                    write_json(self.part / ABOUT, to_dict(about))
                (self.part / PROGRESS).unlink(missing_ok=True)
                flush(self.part)
                os.rename(self.part, self.out)
                flush(self.out.parent)
            except OSError as error:
                raise UserError(
                    f"Cannot write {self.part}: {error.strerror or error}. {self.begun} of {len(listing)} files are "
                    f"done. {_advice(error)}"
                ) from error
        return read_about(self.out)

    def _pictures(self, listing: Listing, progress: Progress | None) -> None:
        with closing(Writer(self.part, self._reached())) as writer:
            rest, total = islice(iter(listing), writer.seen, None), len(listing)
            try:
                with (
                    ThreadPoolExecutor(min(16, 4 + (os.cpu_count() or 1))) as pool,
                    closing(_ahead(pool, self._take, rest)) as taken,
                ):
                    for one in taken:
                        writer.skip(one) if isinstance(one, Skipped) else writer.keep(*one)
                        if progress is not None:
                            progress(writer.seen, total)
            except BaseException:  # Ctrl-C too: what came so far is kept, where that can be
                with suppress(OSError, UserError):
                    writer.settle()
                raise
            writer.settle()

    def _take(self, item: Listed) -> Taken | Skipped:
        """A listed file as it is packed; Skipped where it is no picture, with the words of Folder."""
        path = os.path.join(self.source, os.fsdecode(item.name))
        name = printable(path, self.source)
        try:
            data = _read(path, item, self.source)
            size = probe(path, data)
            if self.form.side is not None and min(size) > self.form.side:
                data, size = smaller(decode(path, data), self.form)
            return Taken(name, data, size, zlib.crc32(data))
        except BadImage as bad:
            return Skipped(name, bad.reason)


def smaller(picture: np.ndarray, form: Form) -> tuple[bytes, tuple[int, int]]:
    """(JPEG, (width, height)) of a picture made so small that its short side is form.side."""
    assert form.side is not None
    height, width = picture.shape[:2]
    scale = form.side / min(height, width)
    size = max(form.side, round(width * scale)), max(form.side, round(height * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, form.quality])
    assert done
    return data.tobytes(), size


def _read(path: str, item: Listed, source: Path) -> bytes:
    """The bytes of a file that is as it was listed. What may be read another time is no BadImage: the pack stops."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise BadImage(path, "not a regular file")
        with open(path, "rb") as file:
            data, status = file.read(), os.fstat(file.fileno())
    except OSError as error:
        if item.stamp == GONE or error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR):
            raise BadImage(path, error.strerror or str(error)) from error
        raise UserError(
            f"{path} cannot be read any more: {error.strerror}. Is the disk still there, has {source} changed? The "
            "same command goes on with the pack."
        ) from error
    if (status.st_size, status.st_mtime_ns) != item.stamp:
        raise UserError(
            f"{path} changed while {source} was packed: let nothing write there, and give the command again."
        )
    return data


def _ahead(
    pool: ThreadPoolExecutor, take: Callable[[Listed], Taken | Skipped], items: Iterator[Listed]
) -> Generator[Taken | Skipped]:
    """take(item) in order, made by the pool's threads ahead of use, as much as AHEAD_BYTES."""
    waiting: deque[tuple[int, Future]] = deque()
    held = 0
    try:
        for item in items:
            waiting.append((item.stamp[0], pool.submit(take, item)))
            held += item.stamp[0]
            while waiting and (held > AHEAD_BYTES or len(waiting) > 1000):
                length, future = waiting.popleft()
                held -= length
                yield future.result()
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        for _, future in waiting:
            future.cancel()


def _flags(form: Form) -> str:
    return "the files as they are" if form.side is None else f"--side {form.side} --quality {form.quality}"


def _advice(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Choose a place that may be written with -o."
    room = "Free some space, and give" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Give"
    return f"{room} the same command again: it goes on from there."
