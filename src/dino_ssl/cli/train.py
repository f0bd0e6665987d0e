"""dino train: from a folder of pictures to a trained backbone."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dino_ssl import distributed
from dino_ssl.api.resolve import ExistingRun, resolve_run, resumed, show_plan
from dino_ssl.api.training import Outcome, run_session
from dino_ssl.cli.command_line import CommandLine, Options
from dino_ssl.cli.options import Flag
from dino_ssl.cli.run_dir import choose_run_dir
from dino_ssl.config import edit, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import write_json
from dino_ssl.methods import MethodName
from dino_ssl.presets.plan import Plan
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, machine, start
from dino_ssl.terminal import Terminal, command_output
from dino_ssl.training import validate_run

EXAMPLES = """\
  dino train photos/                                 a plan for these pictures and this machine, then training
  dino train photos/ --dry-run                       the plan alone
  dino train photos/ --minutes 120                   as many epochs as fit into two hours
  dino train photos/ --preset vits16 --optim.epochs 300 --optim.batch-size 512
  dino train photos/ --network timm:resnet18         any network of timm; or vit_small/8
  dino train photos/ --method byol                   a baseline; or moco, swav, supervised
  dino train scenes --minutes 5                      pictures that dino draws itself
  dino train photos/ --evals "retrieval roxford5k/ --every-epochs 10" "linear train/ val/"    asked on the way
  dino train --resume runs/photos                    go on where it stopped
  torchrun --nproc-per-node 2 -m dino_ssl train photos/  on two GPUs, or two processes"""

COLLAPSED = 3
"""Exit code of a run that --on-collapse ended."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a backbone on a folder of pictures, without labels.

    Settings that are not given are chosen from the pictures and the machine, and the plan says why; with
    --preset they are the recipe's. The defaults shown here are the paper's.
    """

    folder: tyro.conf.Positional[str] = ""
    """Folder of pictures, nested or flat; class folders give the accuracy on the way. `scenes` draws some."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A recipe to start from (`dino presets`), or MODULE:FUNCTION that returns a dino_ssl.Run."""
    network: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """vit_tiny/16, vit_small/8, vit_base/16, ..., or timm:NAME."""
    method: MethodName | None = None
    """How it learns: DINO (without this flag) or one of the paper's baselines. The flags --method.* are then this
    method's own: `dino train --method moco --help` explains them."""
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
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)

    @property
    def recipe(self) -> str | None:
        return self.preset


def train(argv: Sequence[str]) -> int:
    return carry_out(CommandLine(list(argv), kind=TrainOptions, prog="dino train", examples=EXAMPLES))


def carry_out(given: CommandLine) -> int:
    """A whole session, from a command line to the report; gives the exit code."""
    options = given.parse(given.skeleton())
    _check(options, given)
    with command_output(options.json) as (terminal, give):
        with start() as rt:
            folder, found = distributed.run_on_rank0(
                lambda: choose_run_dir(options, terminal, chosen=given.has("--out"))
            )
            if found is not None:
                run, dataset, planned = _resumed(found, given, terminal)
            else:
                dataset = _opened(options.run.data, terminal)
                planned = _planned(options, given, dataset, folder, rt, terminal)
                run = planned.run
            if options.dry_run:
                with terminal.progress("looking whether it can be trained"):
                    validate_run(run, rt, dataset)
                if found is not None:
                    terminal.print(f"{run.out} would go on at step {found.step} of {found.steps}.")
                give({"run": to_dict(run), "plan": _reasons(planned)})
                return 0
            if rt.is_main and planned is not None:
                write_json(Path(run.out) / "plan.json", _reasons(planned))
            with start(run.precision) as rt:
                outcome = run_session(run, rt, dataset, terminal, resume=found is not None)
        give(_result(outcome))
    if outcome.collapse is not None:
        return COLLAPSED
    return 0 if outcome.finished else 128 + (outcome.signal or signal.SIGINT)


def _check(options: Options, given: CommandLine) -> None:
    if options.resume is not None:
        if given.has("--out") and Path(options.run.out) != Path(options.resume):
            raise UserError(
                f"--resume goes on in its own folder, {options.resume}; got --out {options.run.out}: leave it away."
            )
        for name in ("preset", "network", "method", "minutes", "name"):
            if getattr(options, name, None) is not None:
                raise UserError(f"--{name} starts a run, --resume goes on with one: leave one of them away.")
    elif isinstance(options.run.data, Folder) and not options.run.data.path:
        raise UserError(
            "Which pictures? Expected a folder: dino train photos/\n"
            "`dino train scenes` trains on pictures that dino draws itself; `dino train --help` shows more."
        )
    check_range(options, "minutes", above=0)


# -- the plan, or the run that goes on ---------------------------------------------------------------------


def _opened(data: Folder | Scenes, terminal: Terminal) -> ImageDataset:
    """The pictures, scanned by the first rank alone."""

    def scan() -> ImageDataset:
        with terminal.progress("looking at the pictures") as done:
            return data.open(done)

    dataset = distributed.run_on_rank0(scan)
    if dataset.skipped:
        terminal.print(f"{len(dataset.skipped)} files are left out:", style="yellow")
        for item in dataset.skipped[:5]:
            terminal.print(f"  {item.name}: {item.reason}")
        if len(dataset.skipped) > 5:
            terminal.print("  ... all are listed in the run's report and skipped.jsonl")
    return dataset


def _planned(
    options: Options, given: CommandLine, dataset: ImageDataset, folder: Path, rt: Runtime, terminal: Terminal
) -> Plan:
    def change(run: Run) -> Run:
        return edit(given.change(edit(run, data=options.run.data)), out=str(folder))

    preset = None
    if options.recipe is not None:  # as it is; what the line sets in it is told as such
        preset = edit(given.recipe, data=options.run.data)
    with terminal.progress("measuring this machine"):  # every rank measures, together; the first one's plan holds
        own = resolve_run(
            dataset,
            machine(),
            preset=preset,
            change=change,
            method=type(options.run.method),
            minutes=options.minutes,
            world=rt.world_size,
        )
        planned = distributed.run_on_rank0(lambda: own)
    show_plan(terminal, planned)
    return planned


def _resumed(found: ExistingRun, given: CommandLine, terminal: Terminal) -> tuple[Run, ImageDataset, None]:
    run = resumed(found, lambda run: edit(given.change(run), out=run.out))
    return run, _opened(run.data, terminal), None


def _reasons(planned: Plan | None) -> list[dict[str, str]]:
    reasons = [] if planned is None else planned.reasons
    return [{"name": reason.name, "value": reason.value, "reason": reason.reason} for reason in reasons]


def _result(outcome: Outcome) -> dict:
    return {
        "run": str(outcome.folder),
        "finished": outcome.finished,
        "step": outcome.clock.step,
        "steps": outcome.clock.steps,
        "epochs": outcome.clock.epochs,
        "metrics": outcome.metrics,
        "quality": outcome.quality,
        "evals": outcome.evals,
        "best": outcome.best,
        "collapse": outcome.collapse,
        "reference_scores": outcome.reference_scores,
        "skipped": len(outcome.skipped),
        "backbone": str(outcome.folder / "backbone.safetensors"),
        "report": str(outcome.report),
    }
