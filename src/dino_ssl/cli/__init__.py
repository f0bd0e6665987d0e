"""`dino COMMAND ...`: finds the command, and turns what goes wrong into one message and an exit code.

Nothing heavy is imported here, so that help and mistyped commands answer at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from dino_ssl import __version__, environment
from dino_ssl.errors import UserError, did_you_mean

COMMANDS = {
    "train": ("dino_ssl.cli.train", "train a backbone on a folder of pictures"),
    "eval": ("dino_ssl.cli.evaluate", "measure how good a backbone's features are"),
    "attention": ("dino_ssl.cli.attention", "draw what a backbone looks at"),
    "tsne": ("dino_ssl.cli.tsne", "draw pictures or classes as points, near where features are near"),
    "pca": ("dino_ssl.cli.pca", "colour the patches of pictures by their features"),
    "track": ("dino_ssl.cli.track", "follow objects through a film from one mask"),
    "embed": ("dino_ssl.cli.embed", "write the features of pictures to a file"),
    "data": ("dino_ssl.cli.data", "pack a folder of pictures into a few large files, and check such a pack"),
    "bench": ("dino_ssl.cli.bench", "measure how fast training could be here, and how fast it is"),
    "ablate": ("dino_ssl.cli.ablate", "run a table of the paper, row by row"),
    "report": ("dino_ssl.cli.show", "write the page of a run, or of a table that was run"),
    "presets": ("dino_ssl.cli.show", "list the recipes"),
    "show": ("dino_ssl.cli.show", "print a recipe's settings, or a run's"),
}
"""Each command's module, which has a function of the command's name, and what it does."""

EXAMPLES = """\
  dino train photos/                           train on a folder, with or without class folders
  dino train scenes --minutes 5                train on pictures that dino draws itself
  dino eval knn runs/photos photos/            20-NN accuracy, beside raw pixels and random weights
  dino attention runs/photos photos/cat.jpg    attention maps of every head, and the mask of 60 % of the mass
  dino embed runs/photos photos/ -o features.parquet

CHECKPOINT is a run's folder, a file (.safetensors, .pth), a released network (dino_vits16) or timm:NAME.
'dino COMMAND --help' shows a command's options and more examples."""

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    environment.prepare()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a reader who left is noticed here, not in the interpreter's last moments
        return code
    except UserError as error:
        if os.environ.get("DINO_DEBUG"):
            raise
        if os.environ.get("RANK", "0") == "0":
            from dino_ssl.cli.options import with_flags

            print(f"dino: {with_flags(str(error))}", file=sys.stderr)
        return USER_ERROR
    except SystemExit as stop:  # help and mistyped options, by tyro
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("\ndino: stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `dino presets | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains on its way out
        return BROKEN_PIPE


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"dino {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(f"There is no command {name!r}{did_you_mean(name, COMMANDS)}\nCommands: {', '.join(COMMANDS)}.")
    return getattr(importlib.import_module(COMMANDS[name][0]), name)(rest)


def help_text() -> str:
    lines = "\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())
    return (
        f"dino {__version__}: self-distillation with no labels.\n\n"
        f"usage: dino COMMAND ...\n\ncommands:\n{lines}\n\nexamples:\n{EXAMPLES}"
    )
