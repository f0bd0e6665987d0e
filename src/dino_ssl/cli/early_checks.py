"""Errors that need no torch: a wrong path or evaluation is reported before a command is imported, which takes seconds.

Only the words before the first flag are checked; the command itself checks all of them.
"""

from collections.abc import Sequence
from itertools import takewhile

from dino_ssl.errors import UserError
from dino_ssl.evals import check_name
from dino_ssl.names import check_checkpoint, check_dataset

SKIPPED_WORDS = {
    "train": 0,
    "bench": 0,
    "data": 1,
    "classify": 0,
    "embed": 0,
    "classify": 0,
    "tsne": 0,
    "attention": 0,
    "pca": 0,
    "track": 0,
    "eval": 1,
}
"""Commands whose words are paths, and the number of words before these."""
WITHOUT_CHECKPOINT = ("train", "bench", "data")
NO_DATASET = (
    "No dataset given. Expected a folder of images: dino train photos/\n"
    "`dino train scenes` trains on synthetic images; `dino train --help` shows more."
)


def check_arguments(command: str, arguments: Sequence[str]) -> None:
    """Raise UserError for a missing dataset, an unknown evaluation, or a path that does not exist."""
    words = list(takewhile(lambda word: not word.startswith("-"), arguments))
    if command == "train" and not arguments:
        raise UserError(NO_DATASET)
    if command not in SKIPPED_WORDS or "--score" in arguments:
        return
    if command == "eval" and words:
        check_name(words[0])
    for number, path in enumerate(words[SKIPPED_WORDS[command] :]):
        if number == 0 and command not in WITHOUT_CHECKPOINT:
            check_checkpoint(path)
        elif path != "none" and (command != "eval" or ":" not in words[0]):  # an evaluation from outside reads its own
            check_dataset(path)
