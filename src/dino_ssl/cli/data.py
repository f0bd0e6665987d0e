"""dino data pack, info, check: a folder of pictures as one pack, read quickly from any disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino_ssl.cli.options import Flag, parse
from dino_ssl.config import to_dict
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.terminal import Terminal, command_output

Give = Callable[[dict[str, Any]], None]

ABOUT = {
    "pack": "write the pictures of a folder one after the other into a pack",
    "info": "say what a pack holds",
    "check": "read a pack once, and name every picture that is damaged",
}
EXAMPLES = """\
  dino data pack photos/ -o photos.ds                   every file as it is: what is learnt is the same, bit for bit
  dino data pack photos/ -o small.ds --side 320         large pictures made smaller, the short side to 320 pixels
  dino data info photos.ds
  dino data check photos.ds                             after copying it, or before a long run
  dino train photos.ds                                  a pack stands wherever a folder of pictures does"""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Write the pictures of a folder one after the other into a pack, in one pass.

    Stopped by Ctrl-C, a crash or a full disk, it goes on with the same command.
    """

    folder: tyro.conf.Positional[str]
    """Folder of pictures, nested or flat, with or without class folders."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="PACK")] = None
    """Where the pack goes, a folder of its own; the folder's name with .ds without it."""
    side: int | None = None
    """Make pictures whose short side is longer smaller, to this many pixels, and keep them as JPEG; without it, every
    file is kept as it is."""
    quality: int = 95
    """JPEG quality of the pictures that are made smaller."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what a pack holds."""

    pack: tyro.conf.Positional[str]
    """What `dino data pack` made."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Read a pack once, from the front to the end, and name every picture that is damaged: exit code 2 where one is.

    It also leaves the pack in the system's memory, as far as it fits there: training from a slow disk then starts fast.
    """

    pack: tyro.conf.Positional[str]
    """What `dino data pack` made."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""


def data(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(
            f"There is no command 'data {name}'{did_you_mean(name, COMMANDS)}\nCommands: {', '.join(COMMANDS)}."
        )
    kind, run = COMMANDS[name]
    options = parse(kind, rest, f"dino data {name}", EXAMPLES)
    with command_output(options.json) as (terminal, give):
        run(options, terminal, give)
    return 0


def help_text() -> str:
    commands = "\n".join(f"  {name:<8} {what}" for name, what in ABOUT.items())
    return (
        "usage: dino data COMMAND ...\n\n"
        f"commands:\n{commands}\n\n"
        "A pack holds the files of a folder's pictures in a few large files with an index. Training from it sees the\n"
        "same pictures in the same order, and reads each at a known place: no million small files to open.\n\n"
        f"examples:\n{EXAMPLES}"
    )


def pack(options: PackOptions, terminal: Terminal, give: Give) -> None:
    from dino_ssl.data.pack import Form
    from dino_ssl.data.packing import Packing

    out = options.out or f"{Path(options.folder).resolve().name}.ds"
    with Packing(options.folder, out, Form(side=options.side, quality=options.quality)) as packing:
        before = packing.begun
        with terminal.progress("looking at the folder") as done:
            packing.look(done)
        if packing.finished:
            terminal.print(f"{out} holds the pictures of {options.folder} already.")
        elif before:
            terminal.print(f"Going on after {before} files.")
        try:
            with terminal.progress("packing") as done:
                packing.write(done)
        except KeyboardInterrupt:
            terminal.print(f"{packing.begun} files are packed; the same command goes on with the others.")
            raise
    _tell(out, terminal, give)


def info(options: InfoOptions, terminal: Terminal, give: Give) -> None:
    _tell(options.pack, terminal, give)


def _tell(path: str, terminal: Terminal, give: Give) -> None:
    from dino_ssl.data.pack import open_pack
    from dino_ssl.formatting import format_bytes

    dataset = open_pack(Path(path))
    about, form = dataset.about, dataset.about.form
    kept = "the files as they are"
    if form.side is not None:
        kept = f"larger pictures made smaller, to a short side of {form.side}, as JPEG of quality {form.quality}"
    rows = [
        ("images", f"{len(dataset)}, median short side {dataset.short_side} pixels"),
        ("classes", str(len(dataset.classes)) if dataset.labels is not None else "no class folders"),
        ("bytes", f"{format_bytes(about.nbytes)} in {len(about.files) + 1} files"),
        ("made of", about.source),
        ("kept", kept),
        ("left out", str(len(dataset.skipped))),
        ("fingerprint", dataset.fingerprint),
    ]
    terminal.table(path, ("", ""), rows)
    for item in dataset.skipped[:5]:
        terminal.print(f"  left out: {item.name}: {item.reason}", style="yellow")
    if len(dataset.skipped) > 5:
        terminal.print(f"  ... {len(dataset.skipped)} left out in all; --json lists them", style="yellow")
    skipped = [{"name": item.name, "reason": item.reason} for item in dataset.skipped]
    files = {
        "bytes": about.nbytes,
        "short_side": dataset.short_side,
        "content": dataset.content_key,
        "skipped": skipped,
    }
    give({"pack": path, **to_dict(about), **files})


def check(options: CheckOptions, terminal: Terminal, give: Give) -> None:
    from dino_ssl.data.pack import open_pack

    dataset = open_pack(Path(options.pack))
    total, wrong = len(dataset) + len(dataset.about.digests), []
    with terminal.progress("checking") as done:
        for count, damage in enumerate(dataset.damaged(), 1):
            if damage is not None:
                wrong.append(damage)
            done(count, total)
    for damage in wrong:
        terminal.print(damage, style="yellow")
    give({"pack": options.pack, "images": len(dataset), "damaged": wrong})
    if wrong:
        raise UserError(
            f"{options.pack}: {len(wrong)} of {len(dataset)} pictures (or files of the index) are damaged: copy the "
            "pack again, or pack the folder again. Training leaves damaged pictures out and lists them."
        )
    terminal.print(f"{options.pack}: all {len(dataset)} pictures are as they were packed.")


COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    "pack": (PackOptions, pack),
    "info": (InfoOptions, info),
    "check": (CheckOptions, check),
}
