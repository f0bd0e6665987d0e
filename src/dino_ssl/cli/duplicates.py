"""dino duplicates: find near-duplicates in an index, list them, and move them to a folder."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino_ssl.cli.embed import write_csv
from dino_ssl.cli.images import check_output_file, run_command
from dino_ssl.cli.options import Device, Flag, Trust, plain
from dino_ssl.cli.search import OpenIndexOptions
from dino_ssl.errors import UserError
from dino_ssl.files import atomic_write, check_writable
from dino_ssl.formatting import format_bytes, plural
from dino_ssl.search.deduplicate import Duplicates
from dino_ssl.search.duplicates import HASH_DISTANCE, Keep
from dino_ssl.search.moves import Refused, move_files, undo_moves
from dino_ssl.terminal import Terminal

EXAMPLES = """\
  dino duplicates photos.idx                             count and list
  dino duplicates photos.idx --html duplicates.html      a page of the groups, to look at
  dino duplicates photos.idx --keep sharpest --csv duplicates.csv
  dino duplicates photos.idx --move removed/             move all but the best of each group
  dino duplicates photos.idx --undo removed/             move them back"""

MAX_GROUPS = 20
"""Groups that are printed."""
MAX_REFUSED = 20
"""Files that are printed because they stay."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesOptions(OpenIndexOptions):
    """Find near-duplicates: same bytes, same pixels, near perceptual hashes, or near features.

    Every image of a group is a duplicate of the one that is marked to be kept. No file is ever deleted or overwritten:
    the groups are listed, or all images but the one to keep are moved to another folder, and back with --undo.
    """

    threshold: Annotated[
        float | None,
        plain("Cosine from which features are those of duplicates. Default: measured on edited copies.", "T"),
    ] = None
    keep: Keep = "largest"
    """The image of a group to keep: that of most pixels (then bytes), the first by name, or the sharpest."""
    distance: Annotated[
        int, tyro.conf.arg(help="Bits of 64 in which the perceptual hashes of duplicates may differ.", metavar="BITS")
    ] = HASH_DISTANCE
    html: Annotated[str | None, plain("File of a page with the thumbnails of all groups.", "FILE")] = None
    csv: Annotated[str | None, plain("File of a table with one line per image of a group.", "FILE")] = None
    move: Annotated[
        str | None, plain("Folder to which all images but the one to keep are moved, after a confirmation.", "DIR")
    ] = None
    yes: Annotated[Flag, tyro.conf.arg(aliases=["-y"], help="Move without asking.", help_behavior_hint="")] = False
    undo: Annotated[str | None, plain("Move the images in this folder back to where they were.", "DIR")] = None
    checkpoint: Annotated[
        str | None, plain("The network of the index, if it was moved: its weights must be the same.", "CHECKPOINT")
    ] = None
    device: Device = None
    trust: Trust = False


def duplicates(argv: Sequence[str]) -> int:
    """Run `dino duplicates`."""
    return run_command(_duplicates, DuplicatesOptions, argv, "dino duplicates", EXAMPLES)


def _duplicates(options: DuplicatesOptions, terminal: Terminal) -> dict[str, Any]:
    if options.undo is not None:
        return _undo(Path(options.undo), terminal)
    if options.move and not (options.yes or sys.stdin.isatty()):
        raise UserError("--move asks before it moves files, but standard input is no terminal. Add --yes to move them.")
    for path in (options.html, options.csv):
        check_output_file(path)
    if options.move:
        check_writable(Path(options.move))
    index = options.open(checkpoint=options.checkpoint, device=options.device, trust=options.trust)
    settings: Any = {"keep": options.keep, "distance": options.distance, "progress": terminal.progress}
    result = index.duplicates(options.threshold, **settings)
    _print(result, terminal)
    if options.csv:
        atomic_write(Path(options.csv), lambda part: write_csv(part, result.columns))
        terminal.print(f"Written to {options.csv}")
    if options.html:
        with terminal.progress("page") as progress:
            terminal.print(f"Written to {result.write_html(options.html, progress)}")
    moved = _move(result, Path(options.move), options.yes, terminal) if options.move and result.groups else {}
    names = index.items.names
    groups = [
        {
            "keep": names[group.keep],
            "lowest": group.lowest,
            "copies": [{"name": names[row], "tier": tier, "similarity": cosine} for row, tier, cosine in group.copies],
        }
        for group in result.groups
    ]
    return {
        "index": options.index,
        "images": len(index),
        "threshold": result.threshold,
        "calibration": asdict(result.calibration) if result.calibration else None,
        "counts": result.counts,
        "bytes": result.nbytes,
        "groups": groups,
        "files": [path for path in (options.html, options.csv) if path],
        **moved,
    }


def _print(result: Duplicates, terminal: Terminal) -> None:
    """Print the threshold, the number of duplicates by tier, and the first groups."""
    if result.calibration is not None:
        terminal.print(result.calibration.sentence)
    if "hash" not in result.counts:
        terminal.print(
            "Perceptual hashes are missing, so that tier is skipped: "
            'pip install "dino-ssl[search]", and update the index.',
            style="yellow",
        )
    groups = result.groups
    if not groups:
        terminal.print(f"No duplicates among {plural(len(result.index), 'image')}.")
        return
    names, rows = result.index.items.names, []
    for group in groups[:MAX_GROUPS]:
        copies = ", ".join(names[copy.row] for copy in group.copies[:3])
        more = f", ... {len(group.copies)} in all" if len(group.copies) > 3 else ""
        rows.append([names[group.keep], f"{group.lowest:.4f}", copies + more])
    shown = (
        f"The first {MAX_GROUPS} of {len(groups):,} groups"
        if len(groups) > MAX_GROUPS
        else plural(len(groups), "group")
    )
    terminal.table(shown, ["keep", "lowest similarity", "duplicates"], rows)
    terminal.print(result.sentence)


def _move(result: Duplicates, folder: Path, yes: bool, terminal: Terminal) -> dict[str, Any]:
    """Ask, move the duplicates, and report those that stay."""
    moves, refused = result.plan(folder)
    size = format_bytes(sum(move.source.stat().st_size for move in moves))
    what = f"{plural(len(moves), 'image')} ({size}) to {folder}"
    if moves and not yes and input(f"Move {what}? [y/N] ").strip().lower() not in ("y", "yes"):
        terminal.print("Nothing was moved.")
        return {"moved": 0}
    try:
        with terminal.progress("moving") as progress:
            failed = move_files(moves, folder, progress) if moves else []
    except KeyboardInterrupt:
        terminal.print(f"Interrupted. The same command continues, --undo {folder} moves back what was moved.", "yellow")
        raise
    moved = len(moves) - len(failed)
    terminal.print(f"Moved {moved:,} of {what}" if moves else "There is no image to move.")
    _report(refused + failed, terminal)
    if moved:
        terminal.print(f"To move them back: dino duplicates {result.index.folder} --undo {folder}")
        terminal.print("The index still has these images; `dino index` updates it.")
    stay = [{"name": str(path), "reason": reason} for path, reason in refused + failed]
    return {"moved": moved, "folder": str(folder), "stay": stay}


def _undo(folder: Path, terminal: Terminal) -> dict[str, Any]:
    with terminal.progress("moving back") as progress:
        moved, refused = undo_moves(folder, progress)
    terminal.print(f"Moved {plural(moved, 'image')} back from {folder}")
    _report(refused, terminal)
    return {"moved": moved, "stay": [{"name": str(path), "reason": reason} for path, reason in refused]}


def _report(refused: Sequence[Refused], terminal: Terminal) -> None:
    """Print the files that stay where they are."""
    for path, reason in refused[:MAX_REFUSED]:
        terminal.print(f"  not moved: {path}: {reason}", style="yellow")
    if len(refused) > MAX_REFUSED:
        terminal.print(f"  ... {len(refused):,} not moved in total; --json lists them", style="yellow")
