"""dino train: from a folder of pictures to a trained backbone."""

import itertools
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import tyro

from dino import dist
from dino.cli.asks import ASKS
from dino.cli.options import Switch, parse
from dino.config import edit, to_dict
from dino.data.folder import Folder
from dino.data.pictures import Pictures
from dino.data.scenes import Scenes
from dino.data.sources import WORDS
from dino.errors import UserError, nearest
from dino.files import write_json
from dino.methods import METHODS, MethodName
from dino.models.timm import Timm
from dino.models.vit import ViT
from dino.presets import resolve
from dino.presets.plan import Plan
from dino.run import Run
from dino.runtime import Runtime, machine, start
from dino.session.begin import Found, find, resumed, settle, show_plan
from dino.session.training import Outcome, run_session
from dino.terminal import Terminal, speaking

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
  torchrun --nproc-per-node 2 -m dino train photos/  on two GPUs, or two processes"""

COLLAPSED = 3
"""Exit code of a run that --on-collapse ended."""
UNKNOWN = "?"
"""In place of the word for drawn pictures: the line has to be looked through for it."""
SWITCHES = ("--dry-run", "--yes", "-y", "--json")


class Options(Protocol):
    """What a session needs of a command's options, besides the run's own flags."""

    @property
    def folder(self) -> str: ...
    @property
    def preset(self) -> str | None: ...
    @property
    def minutes(self) -> float | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def resume(self) -> str | None: ...
    @property
    def dry_run(self) -> bool: ...
    @property
    def yes(self) -> bool: ...
    @property
    def json(self) -> bool: ...
    @property
    def run(self) -> Run: ...
    @property
    def recipe(self) -> str | None:
        """The preset that the run is, with what the line sets in it; None where the plan chooses."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a backbone on a folder of pictures, without labels.

    Settings that are not given are chosen from the pictures and the machine, and the plan says why; with
    --preset they are the recipe's. The defaults shown here are the paper's.
    """

    folder: tyro.conf.Positional[str] = ""
    """Folder of pictures, nested or flat; class folders give the accuracy on the way. `scenes` draws some."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A recipe to start from (`dino presets`), or MODULE:FUNCTION that returns a dino.Run."""
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
    dry_run: Switch = False
    """Print the plan and stop."""
    yes: Annotated[Switch, tyro.conf.arg(aliases=["-y"])] = False
    """Answer a question with its first choice."""
    json: Switch = False
    """One JSON object on standard output, messages on standard error."""
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)

    @property
    def recipe(self) -> str | None:
        return self.preset


def train(argv: Sequence[str]) -> int:
    return carry_out(Given(list(argv)))


def carry_out(given: "Given") -> int:
    """A whole session, from a command line to the report; gives the exit code."""
    options = given.parse(given.skeleton())
    _check(options)
    with speaking(options.json) as (terminal, give):
        with start() as rt:
            folder, found = dist.on_main(lambda: _where(options, given, terminal))
            if found is not None:
                run, pictures, planned = _resumed(found, given, terminal)
            else:
                pictures = _opened(options.run.data, terminal)
                planned = _planned(options, given, pictures, folder, rt, terminal)
                run = planned.run
            if options.dry_run:
                give({"run": to_dict(run), "plan": _reasons(planned)})
                return 0
            if rt.is_main and planned is not None:
                write_json(Path(run.out) / "plan.json", _reasons(planned))
            with start(run.precision) as rt:
                outcome = run_session(run, rt, pictures, terminal, resume=found is not None)
        give(_result(outcome))
    if outcome.collapse is not None:
        return COLLAPSED
    return 0 if outcome.finished else 128 + (outcome.signal or signal.SIGINT)


# -- reading the command line ------------------------------------------------------------------------------


def preset_or_plan(name: str | None) -> Run:
    """What the flags of `dino train` are laid over: a preset, or a Run for the plan to choose."""
    return resolve(name) if name else Run()


class Given:
    """The command line, laid over a Run: first over a skeleton of the right types, then over the plan."""

    def __init__(
        self,
        argv: list[str],
        *,
        kind: Callable[..., Options] = TrainOptions,
        prog: str = "dino train",
        examples: str = EXAMPLES,
        base: Callable[[str | None], Run] = preset_or_plan,
        drawn: str | None = UNKNOWN,
    ) -> None:
        """base: the Run for the preset's name, or for none. drawn: the word for drawn pictures that stands in the
        folder's place, where that is known; None for none."""
        self.argv, self.kind, self.prog, self.examples, self.base, self.known = argv, kind, prog, examples, base, drawn

    def value(self, flag: str) -> str | None:
        """A flag's value before anything is parsed: what the types of the other flags depend on."""
        for place, word in enumerate(self.argv):
            if word == flag and place + 1 < len(self.argv):
                return self.argv[place + 1]
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
        return None

    def has(self, flag: str) -> bool:
        return any(word == flag or word.startswith(f"{flag}=") for word in self.argv)

    def skeleton(self) -> Run:
        """A Run whose data and network are of the types that the line asks for."""
        if (folder := self.value("--resume")) is not None:
            found = find(Path(folder))
            if found is None:
                raise UserError(
                    f"There is nothing to resume in {folder}: expected a run's folder, with run.json and "
                    f"checkpoints/last.pt.{_runs_nearby(Path(folder))}"
                )
            return found.run
        preset = self.value("--preset")
        run = self.base(preset)
        if isinstance(run.data, Folder) and ":" not in (preset or ""):  # a recipe is for anybody's pictures
            run = edit(run, data=Folder(path=""))
        if (word := self.drawn()) is not None:
            run = edit(run, data=run.data if isinstance(run.data, Scenes) else WORDS[word])
        if (name := self.value("--network")) is not None:
            run = edit(run, backbone=network(name))
        return self.learning(run)

    def drawn(self) -> str | None:
        """The word for drawn pictures that stands in the folder's place (`scenes`, `herds`): not a flag's value."""
        if self.known != UNKNOWN:
            return self.known
        for before, word in itertools.pairwise(["", *self.argv]):
            if word in WORDS and (not before.startswith("-") or before in SWITCHES or "=" in before):
                return word
        return None

    def parse(self, over: Run) -> Options:
        kind, default = cast(type[Any], self.kind), self.kind(run=over)
        options = parse(kind, self.argv, self.prog, self.examples, default, ASKS)
        data = options.run.data
        if options.folder and self.drawn() is None:
            data = edit(data, path=options.folder) if isinstance(data, Folder) else Folder(path=options.folder)
            options = edit(options, run=edit(options.run, data=data))
        return options

    def change(self, run: Run) -> Run:
        """The run with what the line sets."""
        if (name := self.value("--network")) is not None:
            backbone = network(name)
            if isinstance(backbone, ViT):
                backbone = edit(backbone, image_size=run.views.size)
            run = edit(run, backbone=backbone)
        return self.parse(self.learning(run)).run

    def learning(self, run: Run) -> Run:
        """The run with the method that the line names, at its own defaults where the run has another one."""
        name = self.value("--method")
        if name not in METHODS or type(run.method) is METHODS[name]:
            return run  # a name that is none is refused with the other flags
        return edit(run, method=METHODS[name]())


def network(name: str) -> ViT | Timm:
    """`vit_tiny/16` or `timm:resnet18` as settings."""
    if name.startswith("timm:"):
        return Timm(name=name.removeprefix("timm:"))
    match = re.fullmatch(r"(?:vit[_-])?(tiny|small|base)[/_-]?(\d+)", name.lower())
    if match is None:
        known = ("vit_tiny/16", "vit_small/16", "vit_small/8", "vit_base/16", "vit_base/8")
        raise UserError(f"There is no network {name!r}{nearest(name, known)}\nExpected vit_SIZE/PATCH or timm:NAME.")
    return ViT(size=match[1], patch=int(match[2]))  # pyright: ignore[reportArgumentType]


def _check(options: Options) -> None:
    if options.resume is not None:
        for name in ("preset", "network", "method", "minutes", "name"):
            if getattr(options, name, None) is not None:
                raise UserError(f"--{name} starts a run, --resume goes on with one: leave one of them away.")
    elif isinstance(options.run.data, Folder) and not options.run.data.path:
        raise UserError(
            "Which pictures? Expected a folder: dino train photos/\n"
            "`dino train scenes` trains on pictures that dino draws itself; `dino train --help` shows more."
        )
    if options.minutes is not None and not options.minutes > 0:
        raise UserError(f"--minutes must be above 0; got {options.minutes:g}.")


# -- where the run goes ------------------------------------------------------------------------------------


def _where(options: Options, given: Given, terminal: Terminal) -> tuple[Path, Found | None]:
    """The run's folder, and the run that is there and goes on. Takes no folder of another run."""
    if options.resume is not None:
        return Path(options.resume), find(Path(options.resume))
    folder = Path(options.run.out if given.has("--out") else f"runs/{options.name or _named(options)}")
    found = find(folder)
    _must_be_writable(folder)
    if found is None or options.dry_run:
        return folder, None
    free = next(Path(f"{folder}-{n}") for n in itertools.count(2) if not Path(f"{folder}-{n}").exists())
    if found.finished:
        if given.has("--out") or options.name:
            raise UserError(f"{folder} holds a finished run. Choose another folder: --out {free}")
        terminal.say(f"{folder} holds a finished run; this one goes to {free}.")
        return free, None
    there = f"{folder} holds a run that stopped at step {found.step} of {found.steps}."
    if options.yes:
        terminal.say(f"{there} It goes on.")
        return folder, found
    if not terminal.asks:
        raise UserError(f"{there}\nGo on with it:      --resume {folder}\nOr start another:   --out {free}")
    answers = {"r": "to resume it", "n": f"for a new run in {free}", "q": "to quit"}
    match terminal.ask(there, answers):
        case "r":
            return folder, found
        case "n":
            return free, None
    raise KeyboardInterrupt


def _named(options: Options) -> str:
    data = options.run.data
    source = Path(data.path).resolve().name if isinstance(data, Folder) else "scenes"
    preset = (options.recipe or "").rpartition(":")[2]
    return "-".join(part for part in (source or "pictures", preset) if part)


def _must_be_writable(folder: Path) -> None:
    """Found out now, not after an hour: the nearest folder that exists can be written."""
    nearest_there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest_there.is_dir():
        raise UserError(f"The run's folder {folder} cannot be made: {nearest_there} is a file. Choose another --out.")
    if not os.access(nearest_there, os.W_OK):
        raise UserError(f"The run's folder {folder} cannot be written. Choose another one with --out.")


def _runs_nearby(folder: Path) -> str:
    runs = sorted(str(path.parent) for path in folder.parent.glob("*/run.json"))
    return f"\nRuns there: {', '.join(runs)}." if runs else ""


# -- the plan, or the run that goes on ---------------------------------------------------------------------


def _opened(data: Folder | Scenes, terminal: Terminal) -> Pictures:
    """The pictures, scanned by the first rank alone."""

    def scan() -> Pictures:
        with terminal.progress("looking at the pictures") as done:
            return data.open(done)

    pictures = dist.on_main(scan)
    if pictures.skipped:
        terminal.say(f"{len(pictures.skipped)} files are left out:", style="yellow")
        for item in pictures.skipped[:5]:
            terminal.say(f"  {item.name}: {item.reason}")
        if len(pictures.skipped) > 5:
            terminal.say("  ... all are listed in the run's report and skipped.jsonl")
    return pictures


def _planned(options: Options, given: Given, pictures: Pictures, folder: Path, rt: Runtime, terminal: Terminal) -> Plan:
    def change(run: Run) -> Run:
        return edit(given.change(edit(run, data=options.run.data)), out=str(folder))

    preset = options.run if options.recipe is not None else None
    with terminal.progress("measuring this machine"):  # every rank measures, together; the first one's plan holds
        own = settle(
            pictures,
            machine(),
            preset=preset,
            change=change,
            method=type(options.run.method),
            minutes=options.minutes,
            world=rt.world,
        )
        planned = dist.on_main(lambda: own)
    show_plan(terminal, planned)
    return planned


def _resumed(found: Found, given: Given, terminal: Terminal) -> tuple[Run, Pictures, None]:
    run = resumed(found, lambda run: edit(given.change(run), out=run.out))
    return run, _opened(run.data, terminal), None


def _reasons(planned: Plan | None) -> list[dict[str, str]]:
    reasons = [] if planned is None else planned.reasons
    return [{"name": reason.name, "value": reason.value, "why": reason.why} for reason in reasons]


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
        "baselines": outcome.baselines,
        "skipped": len(outcome.skipped),
        "backbone": str(outcome.folder / "backbone.safetensors"),
        "report": str(outcome.report),
    }
