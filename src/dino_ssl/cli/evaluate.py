"""dino eval NAME: how good a backbone's features are, by any evaluation of the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino_ssl.cli.eval_spec import positional, source_fields, sources_of
from dino_ssl.cli.options import Flag, parse
from dino_ssl.errors import UserError
from dino_ssl.evals import EVALUATIONS, FINETUNE, find_evaluation, scorer
from dino_ssl.terminal import Terminal, command_output, is_rank0

FLOORS = {"raw_pixels": "raw pixels", "random_weights": "random weights"}


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every evaluation can be told."""

    references: Flag = True
    """Ask the same of random weights, and of raw pixels where that has a meaning."""
    batch_size: int = 64
    """Pictures per forward pass."""
    workers: int = 0
    """Processes that decode."""
    cache: Flag = True
    """Keep the features beside the checkpoint, in evals/features/, for the next time."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""
    """Folder for the result's JSON (and masks), instead of evals/ beside the checkpoint."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Scores results that exist already, by the official measure: no network and no pictures are needed.

    Figures are the official ones, fractions of 1.
    """

    results: tyro.conf.Positional[str]
    """Folder of the results: RESULTS/SEQUENCE/00001.png."""
    root: tyro.conf.Positional[str]
    """Folder of the benchmark, for its truth."""
    split: str = "val"
    """Which list of the benchmark: val, train, ..."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def eval(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, rest = argv[0], argv[1:]
    if name == FINETUNE:  # a training run, with a run's options and files
        from dino_ssl.cli.finetune import finetune

        return finetune(rest)
    if "--score" in rest:
        return _score(name, [word for word in rest if word != "--score"])
    evaluation = find_evaluation(name)
    options = parse(_options(evaluation), rest, f"dino eval {name}", evaluation.examples)
    with command_output(options.common.json) as (terminal, give):
        give(_evaluate(evaluation, options, terminal))
    return 0


def _score(name: str, words: Sequence[str]) -> int:
    score = scorer(name)
    prog = f"dino eval {name} --score"
    options = parse(ScoreOptions, words, prog, f"  {prog} results/ DAVIS/ --json")
    with command_output(options.json) as (terminal, give):
        with terminal.progress("scoring") as done:
            result = score(options.results, options.root, split=options.split, progress=done)
        objects = result.get("per_object", {})
        rows = [[key, f"{value:.3f}"] for key, value in result.items() if isinstance(value, float)]
        rows += [[key, ", ".join(f"{k} {v:.3f}" for k, v in values.items())] for key, values in objects.items()]
        terminal.table(f"{options.results} against {options.root}", ["", "score"], rows)
        give(result)
    return 0


def help_text() -> str:
    about = {name: entry.what for name, entry in EVALUATIONS.items()}
    about[FINETUNE] = "accuracy of the whole network, trained on with labels"
    names = "\n".join(f"  {name:<20} {what}" for name, what in about.items())
    return (
        "usage: dino eval NAME CHECKPOINT DATA...\n\n"
        f"evaluations:\n{names}\n\n"
        "CHECKPOINT is a run's folder, a file (.safetensors, .pth), a released network (dino_vits16) or timm:NAME.\n"
        "DATA is what 'dino eval NAME --help' lists; the word scenes draws pictures, for a first try.\n\n"
        f"examples:\n{find_evaluation('knn').examples}"
    )


def _options(evaluation: Any) -> type:
    """The options of one evaluation: its sources in order, its fields as flags, and what all share."""
    checkpoint = "A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."
    fields: list[Any] = [("checkpoint", positional(checkpoint)), *source_fields(evaluation)]
    flat = tyro.conf.OmitArgPrefixes
    fields.append(("protocol", Annotated[evaluation, flat], field(default_factory=evaluation)))
    fields.append(("common", Annotated[Common, flat], field(default_factory=Common)))
    options = make_dataclass("Options", fields, frozen=True)
    options.__doc__ = f"{evaluation.__doc__}\n\nThe paper: {evaluation.paper}. The result is also written as JSON."
    return options


def _evaluate(evaluation: Any, options: Any, terminal: Terminal) -> dict[str, Any]:
    from dino_ssl.api.calls import evaluate, open_checkpoint, save_evaluation

    common: Common = options.common
    found = open_checkpoint(options.checkpoint)
    result = evaluate(
        found,
        options.protocol,
        *sources_of(options, evaluation),
        references=common.references,
        batch_size=common.batch_size,
        workers=common.workers,
        cache=common.cache,
        out=common.out or None,
        progress=terminal.progress,
    )
    show(result, found.name, terminal)
    folder = Path(common.out) if common.out else found.folder and found.folder / "evals"
    if folder is not None and is_rank0():
        try:
            result["file"] = str(save_evaluation(result, folder))
            terminal.print(f"Written to {result['file']}", style="dim")
        except UserError as error:
            if common.out:
                raise
            terminal.print(f"{error} The figures are above; -o FOLDER writes them elsewhere.", style="yellow")
    return result


def show(result: Mapping[str, Any], checkpoint: str, terminal: Terminal) -> None:
    """The figures as a table, the floors beside them. checkpoint: what the column of the figures is called."""
    references = result["floors"]
    columns = ["", checkpoint, *(FLOORS[name] for name in references)]
    rows = [
        [name, f"{value:.1f}", *(f"{floor[name]:.1f}" if name in floor else "-" for floor in references.values())]
        for name, value in result["values"].items()
    ]
    seen = "; ".join(f"{name}: {_counted(part)}" for name, part in result["data"].items())
    terminal.table(f"{result['evaluation']} ({seen}), in percent", columns, rows)
    if skipped := sum(int(part.get("skipped", 0)) for part in result["data"].values()):
        terminal.print(f"{skipped} files could not be read and are left out.", style="yellow")


def _counted(part: Mapping[str, Any]) -> str:
    """`1500 dataset, 10 classes`: the numbers that a source says of itself."""
    return ", ".join(f"{value:,} {name}" for name, value in part.items() if isinstance(value, int) and value)
