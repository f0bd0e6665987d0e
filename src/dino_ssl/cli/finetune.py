"""dino eval finetune: supervised fine-tuning of a trained backbone, and the accuracy of the classifier."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Annotated

import tyro

from dino_ssl.api.resolve import starting_from
from dino_ssl.cli.command_line import CommandLine, SessionOptions
from dino_ssl.cli.help_pages import page_examples
from dino_ssl.cli.images import dataset_named
from dino_ssl.cli.options import Weights
from dino_ssl.cli.train import run_command
from dino_ssl.config import edit
from dino_ssl.data.sources import dataset_config
from dino_ssl.errors import UserError
from dino_ssl.loading import open_checkpoint
from dino_ssl.presets import resolve
from dino_ssl.run import Run


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(SessionOptions):
    """Fine-tune a backbone with labels (Sec. 4.2.3, Tables 6 and 11), and measure the classifier's accuracy.

    The result is a run like any other: runs/NAME with its report, metrics and checkpoints. CHECKPOINT, TRAIN and VAL
    come first, then the flags. The defaults shown here are those of the preset `finetune`.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")] = ""
    """A run folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRAIN")] = ""
    """Training set: a folder of class folders, or `scenes`."""
    val_folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAL")] = ""
    """Validation set: a folder of class folders. Default: a part of TRAIN is held out."""
    weights: Weights = "last"
    preset: Annotated[str, tyro.conf.arg(metavar="NAME")] = "finetune"
    """A preset to start from (`dino presets`), or MODULE:FUNCTION that returns a dino_ssl.Run."""
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=lambda: resolve("finetune"))


def finetune(argv: Sequence[str]) -> int:
    """Run `dino eval finetune`; return the exit code."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if not words and not {"-h", "--help", "--resume"} & {word.partition("=")[0] for word in argv}:
        raise UserError(
            "Expected dino eval finetune CHECKPOINT TRAIN [VAL], before any flags.\n"
            "`dino eval finetune --help` shows more."
        )
    if any(word.partition("=")[0] == "--network" for word in argv):
        raise UserError("--network trains a network from random weights; fine-tuning uses the checkpoint's network.")
    checkpoint, train, val = [*words, "", "", ""][:3]

    def base(preset: str | None) -> Run:
        """Return the preset with the checkpoint's network; the project's preset takes its image size too."""
        run = resolve(preset or "finetune")
        if checkpoint:
            weights = "best" if line.types.weights == "best" else "last"
            source = open_checkpoint(checkpoint, weights=weights, trust="--trust" in argv)
            run = starting_from(run, source, size=None if preset else source.backbone.transform.size)
        return edit(run, val=dataset_config(dataset_named(val), "val")) if val else run

    kind, prog = FinetuneOptions, "dino eval finetune"
    line = CommandLine(
        list(argv), kind=kind, prog=prog, examples=page_examples("eval finetune"), base=base, dataset=train
    )
    if line.types.init not in (None, "None"):
        raise UserError("Fine-tuning starts from CHECKPOINT; --init None starts from random weights instead.")
    return run_command(line)
