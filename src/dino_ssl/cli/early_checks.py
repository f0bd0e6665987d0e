"""Errors that need no torch: a wrong path or evaluation is reported before a command is imported, which takes seconds.

Only the words before the first flag are checked, and a few flags of a training run; the command itself checks all of
them. Which flags it has depends on the types of its settings, which import torch.
"""

import argparse
import itertools
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from dino_ssl.cli.flags import expand_short_flags
from dino_ssl.errors import UserError
from dino_ssl.evals import FINETUNE, check_name
from dino_ssl.files import IS_OUTPUT, has_checkpoint, is_output
from dino_ssl.names import check_checkpoint, check_dataset, check_index

WITH_CHECKPOINT = ("attention", "classify", "embed", "eval", "index", "pca", "segment", "track", "tsne")
"""Commands whose words are a checkpoint and then paths."""
WITHOUT_CHECKPOINT = ("bench", "data", "train")
"""Commands whose words are paths."""
WITH_INDEX = ("clusters", "duplicates", "explore", "map", "search", "select")
"""Commands whose first word is an index."""
WITH_SUBCOMMAND = ("data", "eval")
NO_DATASET = (
    "No dataset given. Expected a folder of images: dino train photos/\n"
    "`dino train scenes` trains on synthetic images; `dino train --help` shows more."
)


def check_arguments(command: str, arguments: Sequence[str]) -> None:
    """Raise UserError for no dataset, an unknown evaluation, a path that does not exist, or a run as images.

    Of a training run also for misspelled short flags, a validation set that does not exist, or a run as output.
    """
    words = list(takewhile(lambda word: not word.startswith("-"), arguments))
    if command == "train" and not arguments:
        raise UserError(NO_DATASET)
    if command in WITH_INDEX and words:
        check_index(words[0])
    if command not in (*WITH_CHECKPOINT, *WITHOUT_CHECKPOINT) or "--score" in arguments:
        return
    if command == "eval" and words:
        check_name(words[0])
    for number, path in enumerate(words[command in WITH_SUBCOMMAND :]):
        if number == 0 and command in WITH_CHECKPOINT:
            check_checkpoint(path)
        elif path != "none" and (command != "eval" or ":" not in words[0]):  # an evaluation from outside reads its own
            check_dataset(path)
            if command == "train":
                _check_no_output(Path(path))
    if command == "train" or words[:1] == [FINETUNE]:
        _check_run_flags(arguments)


def _check_no_output(folder: Path) -> None:
    if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK):
        with os.scandir(folder) as entries:
            names = {os.fsencode(entry.name) + b"/" * entry.is_dir() for entry in entries}
        if is_output(names):
            raise UserError(IS_OUTPUT.format(folder))


def _check_run_flags(arguments: Sequence[str]) -> None:
    expand_short_flags(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--val", nargs="?")
    parser.add_argument("--out", nargs="?")
    parser.add_argument("-y", "--yes", "--dry-run", "--dry_run", dest="may_exist", action="store_true")
    given = parser.parse_known_args(arguments)[0]
    if given.val is not None:
        check_dataset(given.val)
    if given.out is not None and not given.may_exist and has_checkpoint(folder := Path(given.out)):
        raise UserError(
            f"{folder} has a run already.\n"
            f"To resume it, if it stopped:  --resume {folder}\nTo start another run:         --out {unused(folder)}"
        )


def unused(folder: Path) -> Path:
    """Return FOLDER-2, FOLDER-3, ...: the first that does not exist."""
    return next(path for n in itertools.count(2) if not (path := Path(f"{folder}-{n}")).exists())
