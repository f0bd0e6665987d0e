"""dino train: from a folder of images to a trained backbone."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino_ssl import distributed
from dino_ssl.api.resolve import ExistingRun, check_init, find_run
from dino_ssl.api.session import Outcome
from dino_ssl.api.training import prepare
from dino_ssl.cli.command_line import CommandLine, SessionOptions
from dino_ssl.cli.early_checks import NO_DATASET, unused
from dino_ssl.cli.flags import with_flags
from dino_ssl.cli.help_pages import page_examples
from dino_ssl.cli.images import report_skipped
from dino_ssl.config import edit, to_dict
from dino_ssl.data.dataset import DatasetConfig, ImageDataset
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import check_writable
from dino_ssl.run import Run
from dino_ssl.runtime import start
from dino_ssl.terminal import Terminal, command_output
from dino_ssl.training import validate_run

COLLAPSED = 3
"""Exit code of a run that --on-collapse ended."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(SessionOptions):
    """Train a backbone on a folder of images, without labels.

    Settings that are not given are chosen for the dataset and the machine, with the reasons printed; with
    --preset they come from the preset. The defaults shown here are those of the paper.
    """

    folder: tyro.conf.Positional[str] = ""
    """Folder of images, nested or flat; with class folders the accuracy is measured during training. `scenes`:
    synthetic images. MODULE:CLASS: a custom dataset. Write these two before all flags."""
    network: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """vit_tiny/16, vit_small/8, vit_base/16, ..., timm:NAME, or MODULE:CLASS."""
    method: Annotated[str | None, tyro.conf.arg(metavar="{dino,byol,moco,swav,supervised}|MODULE:CLASS")] = None
    """The training method (default: dino). The flags --method.* are those of this method: `dino train --method moco
    --help` explains them."""


def train(argv: Sequence[str]) -> int:
    """Run `dino train`; return the exit code."""
    return run_command(CommandLine(list(argv), kind=TrainOptions, prog="dino train", examples=page_examples("train")))


def run_command(line: CommandLine) -> int:
    """Plan or resume, train and report; return the exit code."""
    options = line.options()
    _check(options, line)
    with command_output(options.json, with_flags) as (terminal, print_result), start(device=options.device) as rt:
        folder, existing = distributed.run_on_rank0(lambda: choose_run_dir(options, terminal, line))

        def change(run: Run) -> Run:
            run = run if existing is not None else edit(run, data=options.run.data)
            return edit(line.change(run), out=str(folder))

        prepared = prepare(
            lambda: _open(options.run.data, terminal),
            terminal,
            rt,
            change=change,
            existing=existing,
            preset=None if options.preset is None else edit(line.preset, data=options.run.data),
            method=type(options.run.method),
            minutes=options.minutes,
        )
        if options.dry_run:
            with terminal.progress("checking the run"):
                validate_run(prepared.run, rt, prepared.dataset)
            if existing is not None:
                terminal.print(f"{folder} would resume at step {existing.step} of {existing.steps}.")
            print_result({"run": to_dict(prepared.run), "plan": prepared.plan})
            return 0
        outcome = prepared.train(terminal)
        print_result(_result(outcome))
    if outcome.collapse is not None:
        return COLLAPSED
    return 0 if outcome.finished else 128 + (outcome.signal or signal.SIGINT)


def _check(options: Any, line: CommandLine) -> None:
    if options.resume is not None:
        for flag in ("--preset", "--network", "--method", "--minutes", "--out"):
            if line.has(flag):
                raise UserError(f"{flag} is for a new run, --resume for an existing one. Omit one of them.")
    elif not options.run.data.is_given:
        raise UserError(NO_DATASET)
    check_range(options, "minutes", above=0)
    if options.resume is None:
        check_init(options.run)


def choose_run_dir(options: Any, terminal: Terminal, line: CommandLine) -> tuple[Path, ExistingRun | None]:
    """Return the output folder, and the run to resume in it. Never returns the folder of another run."""
    if line.existing is not None:
        return Path(options.resume), line.existing
    preset = (options.preset or "").rpartition(":")[2]
    name = "-".join(part for part in (options.run.data.short_name or "images", preset) if part)
    folder = Path(line.types.out or f"runs/{name}")
    existing = find_run(folder, trust=options.trust)
    check_writable(folder)
    if existing is None or options.dry_run:
        return folder, None
    free = unused(folder)
    if existing.finished:
        if line.types.out:
            raise UserError(f"{folder} has a finished run. Choose another folder: --out {free}")
        terminal.print(f"{folder} has a finished run; this one is written to {free}.")
        return free, None
    state = f"{folder} has a run that stopped at step {existing.step} of {existing.steps}."
    if not options.yes:
        raise UserError(f"{state}\nTo resume it:          --resume {folder}\nTo start another run:  --out {free}")
    terminal.print(f"{state} Resuming it.")
    return folder, existing


def _open(data: DatasetConfig, terminal: Terminal) -> ImageDataset:
    """Open the dataset on rank 0, and list skipped files."""

    def scan() -> ImageDataset:
        with terminal.progress("reading image headers") as progress:
            return data.open(progress)

    dataset = distributed.run_on_rank0(scan)
    report_skipped(dataset.skipped, terminal)
    return dataset


def _result(outcome: Outcome) -> dict[str, Any]:
    names = ("finished", "metrics", "quality", "evals", "best", "collapse", "reference_scores")
    return {
        "run": str(outcome.folder),
        "verdict": outcome.verdict._asdict(),
        **{name: getattr(outcome, name) for name in names},
        "step": outcome.clock.step,
        "steps": outcome.clock.steps,
        "epochs": outcome.clock.epochs,
        "skipped": len(outcome.skipped),
        "backbone": str(outcome.folder / "backbone.safetensors"),
        "report": str(outcome.report),
    }
