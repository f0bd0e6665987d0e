"""dino eval NAME: evaluate a backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dino_ssl.cli.eval_spec import eval_options, positional, sources_of
from dino_ssl.cli.options import Device, Flag, Json, NumHeads, Trust, Weights, parse, plain
from dino_ssl.config import format_value
from dino_ssl.errors import UserError
from dino_ssl.evals import EVALUATIONS, FINETUNE, find_evaluation
from dino_ssl.evals.base import below_references
from dino_ssl.files import mark_output, write_json
from dino_ssl.terminal import Terminal, command_output, is_rank0

SCORED = "video-segmentation"
"""The evaluation with --score."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every evaluation."""

    references: Annotated[Flag, plain("Do not evaluate random weights and raw pixels for comparison.")] = True
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward passes. The published protocols use float32."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 0
    """Worker processes that decode images."""
    cache: Annotated[Flag, plain("Do not store the features next to the checkpoint, in evals/features/.")] = True
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""
    """Folder for the result's JSON (and masks); default: evals/ next to the checkpoint."""
    weights: Weights = "last"
    num_heads: NumHeads = None
    device: Device = None
    trust: Trust = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Score existing results with the official metric, as fractions of 1; no network and no images are needed."""

    results: tyro.conf.Positional[str]
    """Folder of the results: RESULTS/SEQUENCE/00001.png."""
    root: tyro.conf.Positional[str]
    """Folder of the benchmark, for its ground truth."""
    split: str = "val"
    """List of the benchmark: val, train, ..."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""
    """Folder for the scores as JSON, scores.json; default: none."""
    json: Json = False


def eval(argv: Sequence[str]) -> int:
    """Run `dino eval` with these arguments and return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, arguments = argv[0], argv[1:]
    if name == FINETUNE:  # a training run, with the options and files of a run
        from dino_ssl.cli.finetune import finetune

        return finetune(arguments)
    if "--score" in arguments:
        return _score(name, [argument for argument in arguments if argument != "--score"])
    evaluation = find_evaluation(name)
    options = parse(options_of(evaluation), arguments, f"dino eval {name}", evaluation.examples)
    with command_output(options.common.json) as (terminal, emit):
        emit(_evaluate(evaluation, options, terminal))
    return 0


def help_text() -> str:
    """Return the help of `dino eval`."""
    summaries = {name: find_evaluation(name).__doc__.partition(":")[0].rstrip(".") for name in EVALUATIONS}
    summaries[FINETUNE] = "Accuracy of the whole network after training with labels"
    names = "\n".join(f"  {name:<20} {summary}" for name, summary in summaries.items())
    return (
        "usage: dino eval NAME CHECKPOINT DATA...\n\n"
        f"evaluations:\n{names}\n\n"
        "NAME may also be module:Class, an evaluation outside of this package.\n"
        "CHECKPOINT is a run's folder, a file (.safetensors, .pth), a released network (dino_vits16) or timm:NAME.\n"
        "DATA is described by 'dino eval NAME --help'; the word scenes generates synthetic images for a first try.\n\n"
        f"examples:\n{find_evaluation('knn').examples}"
    )


def options_of(evaluation: Any) -> type:
    """Return the options of `dino eval` for an evaluation."""
    checkpoint = ("checkpoint", positional("Run folder, weights file, released network (dino_vits16) or timm:NAME."))
    common = ("common", Annotated[Common, tyro.conf.OmitArgPrefixes], field(default_factory=Common))
    return eval_options(evaluation, [checkpoint], [common], f"{evaluation.__doc__}\n\nThe result is written as JSON.")


def _score(name: str, arguments: Sequence[str]) -> int:
    if name != SCORED:
        raise UserError(f"{name} cannot score existing results; expected {SCORED}.")
    from dino_ssl.evals.davis_score import score_results

    prog = f"dino eval {name} --score"
    options = parse(ScoreOptions, arguments, prog, f"  {prog} results/ DAVIS/ --json")
    with command_output(options.json) as (terminal, emit):
        with terminal.progress("scoring") as progress:
            result = score_results(options.results, options.root, split=options.split, progress=progress)
        objects = result.get("per_object", {})
        rows = [[key, f"{value:.3f}"] for key, value in result.items() if isinstance(value, float)]
        rows += [[key, ", ".join(f"{k} {v:.3f}" for k, v in values.items())] for key, values in objects.items()]
        terminal.table(f"{options.results}, scored with {options.root}", ["", "score"], rows)
        if options.out:
            result["file"] = str(write_json(Path(options.out) / "scores.json", result))
            terminal.print(f"Written to {result['file']}", style="dim")
        emit(result)
    return 0


def _evaluate(evaluation: Any, options: Any, terminal: Terminal) -> dict[str, Any]:
    from dino_ssl.api.calls import evaluate, open_checkpoint, save_evaluation

    common: Common = options.common
    weights: dict[str, Any] = dict(weights=common.weights, num_heads=common.num_heads, trust=common.trust)
    checkpoint = open_checkpoint(options.checkpoint, common.device, **weights)
    if common.out and is_rank0():
        mark_output(Path(common.out))
    result = evaluate(
        checkpoint,
        options.protocol,
        *sources_of(options, evaluation),
        references=common.references,
        precision=common.precision,
        batch_size=common.batch_size,
        workers=common.workers,
        cache=common.cache,
        device=common.device,
        out=common.out or None,
        progress=terminal.progress,
        trust=common.trust,
    )
    show(result, checkpoint.name, terminal)
    folder = Path(common.out) if common.out else checkpoint.folder and checkpoint.folder / "evals"
    if folder is not None and is_rank0():
        result["file"] = str(save_evaluation(result, folder))
        terminal.print(f"Written to {result['file']}", style="dim")
    return result


def show(result: Mapping[str, Any], checkpoint: str, terminal: Terminal) -> None:
    """Print the scores and the reference scores as a table; checkpoint: title of the scores' column."""
    references = result["references"]
    columns = ["", checkpoint, *(name.replace("_", " ") for name in references)]
    rows = [
        [name, f"{value:.1f}", *(f"{scores[name]:.1f}" if name in scores else "-" for scores in references.values())]
        for name, value in result["values"].items()
    ]
    data = "; ".join(
        f"{name}: {', '.join(f'{count:,} {unit}' for unit, count in part.items() if isinstance(count, int) and count)}"
        for name, part in result["data"].items()
    )
    size = f" at {result['size']} px" if result["size"] else ""
    terminal.table(f"{result['evaluation']}{size} ({data}), in percent unless the name states a unit", columns, rows)
    details = result["details"]
    if len(details.get("sweep", ())) > 1:
        selected = ", ".join(f"{name} {format_value(value)}" for name, value in details["selected"].items())
        terminal.print(f"Selected on held-out training images: {selected}")
    if below := below_references(result["values"], references):
        terminal.print(below, style="yellow")
    if any(part.get("skipped") for part in result["data"].values()):  # not their sum: parts may share a folder
        terminal.print("Files that could not be read were skipped.", style="yellow")
