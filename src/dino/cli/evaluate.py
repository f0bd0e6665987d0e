"""dino eval: how good a backbone's features are."""

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from dino import __version__
from dino.cli.options import Switch, parse
from dino.errors import UserError, nearest
from dino.terminal import Terminal, speaking

EXAMPLES = """\
  dino eval knn runs/photos photos/                    one folder: a part of every class is held back
  dino eval knn runs/photos photos_train/ photos_val/
  dino eval knn dino_vits16 photos/ --json             a released network; figures for a script
  dino eval knn timm:resnet18 photos/ --k 5 20"""

EVALUATIONS = ("knn",)
NAMES = {"raw_pixels": "raw pixels", "random_weights": "random weights"}


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Weighted k-NN accuracy of frozen features, beside its floors: raw pixels, and random weights.

    The result is also written next to the checkpoint, in evals/.
    """

    checkpoint: tyro.conf.Positional[str]
    """A run's folder, a weights file, a released network (dino_vits16) or timm:NAME."""
    train: tyro.conf.Positional[str]
    """Folder of class folders whose pictures vote; `scenes` draws pictures."""
    val: tyro.conf.Positional[str] = ""
    """Folder of class folders that is asked about; without it a part of TRAIN is held back."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote."""
    temperature: float = 0.07
    """Of the votes (Appendix F.1)."""
    size: int | None = None
    """Side in pixels of what the network sees; what it was trained on without it."""
    held_back: float = 0.2
    """Share of every class that is asked about, where there is no VAL."""
    floors: Switch = True
    """Measure raw pixels and random weights too."""
    batch_size: int = 64
    """Pictures per forward pass."""
    workers: int = 0
    """Processes that decode."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""
    """Folder for the result's JSON, instead of evals/ next to the checkpoint."""
    json: Switch = False
    """One JSON object on standard output, messages on standard error."""


def eval(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: dino eval NAME CHECKPOINT ...\n\nevaluations:\n  knn   weighted k-NN accuracy\n\n"
            f"examples:\n{EXAMPLES}"
        )
        return 0
    if argv[0] not in EVALUATIONS:
        raise UserError(
            f"There is no evaluation {argv[0]!r}{nearest(argv[0], EVALUATIONS)}\n"
            f"Expected one of {', '.join(EVALUATIONS)}, as in: dino eval knn CHECKPOINT TRAIN VAL"
        )
    options = parse(KnnOptions, argv[1:], "dino eval knn", EXAMPLES)
    _check(options)
    with speaking(options.json) as (terminal, give):
        _knn(options, terminal, give)
    return 0


def _check(options: KnnOptions) -> None:
    if not options.k or min(options.k) < 1:
        raise UserError(f"--k needs numbers of at least 1; got {' '.join(map(str, options.k)) or 'none'}.")
    if not 0 < options.held_back < 1:
        raise UserError(f"--held-back must lie between 0 and 1; got {options.held_back:g}.")


def _knn(options: KnnOptions, terminal: Terminal, give) -> None:
    from pathlib import Path

    from dino.api import evaluate, open_checkpoint, save_evaluation

    found = open_checkpoint(options.checkpoint)
    result = evaluate(
        found,
        options.train,
        options.val or None,
        k=options.k,
        temperature=options.temperature,
        size=options.size,
        held_back=options.held_back,
        floors=options.floors,
        batch_size=options.batch_size,
        workers=options.workers,
        progress=terminal.progress,
    )
    result["versions"] = _versions()
    floors = result["floors"]
    columns = ["", options.checkpoint, *(NAMES[name] for name in floors)]
    rows = [
        [name, f"{value:.1f} %", *(f"{floor[name]:.1f} %" for floor in floors.values())]
        for name, value in sorted(result["knn"].items(), key=lambda item: "top-5" in item[0])
    ]
    train, val = result["data"]["train"], result["data"]["val"]
    title = (
        f"k-NN accuracy: {val['pictures']} pictures of {train['classes']} classes asked about, "
        f"{train['pictures']} vote, at {result['protocol']['size']} pixels"
    )
    terminal.table(title, columns, rows)
    skipped = train["skipped"] + (val["skipped"] if options.val else 0)
    if skipped:
        terminal.say(f"{skipped} files could not be read and are left out.", style="yellow")
    folder = Path(options.out) if options.out else found.folder and found.folder / "evals"
    if folder is not None:
        result["file"] = str(save_evaluation(result, "knn", folder))
        terminal.say(f"Written to {result['file']}", style="dim")
    give(result)


def _versions() -> dict[str, str]:
    known = {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")}
    return {"dino": __version__, **known, "python": platform.python_version()}
