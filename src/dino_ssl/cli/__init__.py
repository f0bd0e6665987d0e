"""`dino COMMAND ...`: dispatch to the command, and convert errors to a message and an exit code.

This module avoids slow imports, so that help and errors about unknown commands appear immediately.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from dino_ssl import __version__, environment
from dino_ssl.cli.early_checks import check_arguments
from dino_ssl.cli.flags import known_fields, with_flags
from dino_ssl.cli.help_pages import help_page
from dino_ssl.cli.output import safe_output
from dino_ssl.errors import UserError, did_you_mean, memory_error, system_error
from dino_ssl.formatting import for_terminal

COMMANDS = {
    "train": ("dino_ssl.cli.train", "train a backbone on a folder of images"),
    "eval": ("dino_ssl.cli.evaluate", "evaluate a backbone's features"),
    "attention": ("dino_ssl.cli.attention", "draw attention maps"),
    "tsne": ("dino_ssl.cli.tsne", "draw a t-SNE map of classes (Fig. 11)"),
    "pca": ("dino_ssl.cli.pca", "color the patches of images by principal components of their features"),
    "segment": ("dino_ssl.cli.segment", "write masks of objects, without labels"),
    "track": ("dino_ssl.cli.track", "track objects through a video from one mask"),
    "embed": ("dino_ssl.cli.embed", "write the features of images to a file"),
    "classify": ("dino_ssl.cli.classify", "predict the class of images from a few labeled ones"),
    "index": ("dino_ssl.cli.index", "index a folder of images for search, or update its index"),
    "search": ("dino_ssl.cli.search", "find the images of an index that are similar to others"),
    "duplicates": ("dino_ssl.cli.duplicates", "find near-duplicates in an index, and move them to a folder"),
    "clusters": ("dino_ssl.cli.clusters", "group the images of an index"),
    "map": ("dino_ssl.cli.map", "write a page with a map of the images of an index"),
    "select": ("dino_ssl.cli.select", "choose the images of an index to label first"),
    "explore": ("dino_ssl.cli.explore", "look at an index in a web browser"),
    "data": ("dino_ssl.cli.data", "pack a folder of images into tar shards, and check them"),
    "bench": ("dino_ssl.cli.bench", "profile training on this machine: roofline, step time, data loading"),
    "ablate": ("dino_ssl.cli.ablate", "run a table of the paper"),
    "report": ("dino_ssl.cli.show", "write the report of a run or of a table"),
    "presets": ("dino_ssl.cli.show", "list the presets"),
    "show": ("dino_ssl.cli.show", "print the settings of a preset or a run"),
}
"""The module of each command, which has a function of the command's name, and a summary."""

EXAMPLES = """\
  dino train photos/                           train on a folder, with or without class folders
  dino train scenes --minutes 5                train on synthetic images
  dino eval knn runs/photos photos/            20-NN accuracy, with raw pixels and random weights as references
  dino attention runs/photos photos/cat.jpg    attention maps of every head, and masks that hold 60 % of the attention
  dino embed runs/photos photos/ -o features.parquet
  dino classify runs/photos photos/ --labels labeled/  the class of every image, from a few labeled ones
  dino index runs/photos photos/ -o photos.idx && dino search photos.idx query.jpg

CHECKPOINT is a run folder, a file (.safetensors, .pth), a released network (dino_vits16) or timm:NAME.
'dino COMMAND --help' shows a command's options and more examples."""

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit code."""
    environment.prepare()
    known_fields.clear()
    arguments = list(sys.argv[1:] if argv is None else argv)
    with safe_output() as out:
        code = _exit_code(arguments)
        out.flush()
        if out.error is None or arguments[:1] == ["train"]:  # a run is in its folder
            return code
        if isinstance(out.error, BrokenPipeError):  # `dino presets | head`
            return BROKEN_PIPE
        print(f"dino: standard output cannot be written: {out.error.strerror}.", file=sys.stderr)
        return USER_ERROR


def _exit_code(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except (UserError, MemoryError, RuntimeError, ImportError, OSError) as error:
        message = error if isinstance(error, UserError) else memory_error(error) or system_error(error)
        if message is None or os.environ.get("DINO_DEBUG"):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"dino: {for_terminal(with_flags(str(message)))}", file=sys.stderr)
        return USER_ERROR
    except SystemExit as stop:  # help and invalid options, by tyro
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("\ndino: stopped.", file=sys.stderr)
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"dino {__version__}")
        return 0
    name, arguments = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(f"Unknown command {name!r}{did_you_mean(name, COMMANDS)}\nCommands: {', '.join(COMMANDS)}.")
    page = help_page(name) or help_page(f"{name} {''.join(arguments[:1])}")
    if page is not None and {"-h", "--help"} & set(arguments):
        print(page, end="")
        return 0
    check_arguments(name, arguments)
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    return getattr(importlib.import_module(COMMANDS[name][0]), name)(arguments)


def help_text() -> str:
    """Return the help of `dino`."""
    lines = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"dino {__version__}: self-distillation with no labels.\n\n"
        f"usage: dino COMMAND ...\n\ncommands:\n{lines}\n\nexamples:\n{EXAMPLES}"
    )
