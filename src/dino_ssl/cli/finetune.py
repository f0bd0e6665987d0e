"""dino eval finetune: a trained backbone, trained on with labels, and the accuracy of the classifier that comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Annotated

import tyro

from dino_ssl.api.checkpoints import open_checkpoint
from dino_ssl.api.resolve import starting_from
from dino_ssl.cli.command_line import CommandLine
from dino_ssl.cli.options import Flag
from dino_ssl.cli.train import carry_out
from dino_ssl.config import edit
from dino_ssl.data.folder import Folder
from dino_ssl.data.sources import DRAWN, WORDS
from dino_ssl.errors import UserError
from dino_ssl.presets import resolve
from dino_ssl.run import Run

EXAMPLES = """\
  dino eval finetune runs/photos photos/                       a tenth of every class is held back and asked about
  dino eval finetune runs/photos photos_train/ photos_val/
  dino eval finetune dino_vits16 cifar/train cifar/test --preset finetune-cifar10
  dino eval finetune runs/photos photos/ --minutes 30 --optim.lr 5e-4 --name gentle
  dino eval finetune runs/demo scenes                          drawn pictures, for a first try
  dino eval finetune --resume runs/photos-finetune             go on where it stopped"""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Train a backbone on with labels (Sec. 4.2.3, Tables 6 and 11), and measure the classifier's accuracy.

    What comes out is a run like any other: runs/NAME with its report, its curves and its checkpoints. CHECKPOINT,
    TRAIN and VAL come first, the flags behind them. The defaults shown here are the recipe's.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")] = ""
    """A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRAIN")] = ""
    """Folder of class folders to learn from; `scenes` draws some."""
    asked: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAL")] = ""
    """Folder of class folders that is asked about; without it a part of TRAIN is."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The recipe: finetune (without this flag), finetune-cifar10, ...; `dino presets` lists them."""
    minutes: Annotated[float | None, tyro.conf.arg(metavar="MINUTES")] = None
    """Time to spend; the number of epochs follows."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The run goes to runs/NAME."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Go on with the run in this folder."""
    dry_run: Flag = False
    """Print the plan and stop."""
    yes: Annotated[Flag, tyro.conf.arg(aliases=["-y"])] = False
    """Answer a question with its first choice."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=lambda: resolve("finetune"))

    @property
    def recipe(self) -> str:
        return self.preset or "finetune"


def finetune(argv: Sequence[str]) -> int:
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if not words and not {"-h", "--help", "--resume"} & {word.partition("=")[0] for word in argv}:
        raise UserError(
            "Fine-tune what, on which pictures? Expected dino eval finetune CHECKPOINT TRAIN [VAL], before any flags\n"
            "`dino eval finetune --help` shows more."
        )
    if any(word.partition("=")[0] == "--network" for word in argv):
        raise UserError("--network chooses a network to train from scratch; here the checkpoint's is trained on.")
    checkpoint, folder, asked = [*words, "", "", ""][:3]

    def base(preset: str | None) -> Run:
        """The recipe with the checkpoint's network; the recipe of this project takes its size, the paper's have 224."""
        run = resolve(preset or "finetune")
        if checkpoint:
            found = open_checkpoint(checkpoint)
            run = starting_from(run, found, size=None if preset else found.size)
        if asked:
            drawn = replace(WORDS[asked], count=DRAWN["val"], part="val") if asked in WORDS else None
            run = edit(run, val=drawn or Folder(path=asked))
        return run

    return carry_out(
        CommandLine(
            list(argv),
            kind=FinetuneOptions,
            prog="dino eval finetune",
            examples=EXAMPLES,
            base=base,
            drawn=folder if folder in WORDS else None,
        )
    )
