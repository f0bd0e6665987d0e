"""dino data pack, info, check: a folder of images as tar shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino_ssl.cli.images import report_skipped
from dino_ssl.cli.options import Json, parse
from dino_ssl.config import to_dict
from dino_ssl.data.shard_writer import pack
from dino_ssl.data.shards import PackSettings, open_shards
from dino_ssl.errors import UserError, did_you_mean
from dino_ssl.formatting import format_bytes
from dino_ssl.terminal import Terminal, command_output

Give = Callable[[dict[str, Any]], None]

EXAMPLES = """\
  dino data pack photos/ -o photos-shards               every file unchanged: training is bit-identical
  dino data pack photos/ -o small --side 320            downscale large images to a short side of 320 pixels
  dino data info photos-shards
  dino data check photos-shards                         after copying, or before a long run
  dino train photos-shards                              shards are used like a folder of images"""


@dataclass(frozen=True, kw_only=True)
class PackOptions(PackSettings):
    """Write the images of a folder into tar shards with an index.

    The shards have WebDataset's layout. If the command is stopped, run it again: it resumes.
    """

    folder: tyro.conf.Positional[str]
    """Folder of images, nested or flat, with or without class folders."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """Directory to write; by default the folder's name with -shards appended."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Print the content of a directory of shards."""

    shards: tyro.conf.Positional[str]
    """Directory of tar shards."""
    json: Json = False


class CheckOptions(InfoOptions):
    """Read all shards once, in order, and list damaged images. The exit code is 2 if there are any.

    Afterwards the shards are in the page cache, as far as they fit, so that training from a slow disk starts fast.
    """


def data(argv: Sequence[str]) -> int:
    """Run `dino data COMMAND ...`, and return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<8} {text}" for name, (text, *_) in COMMANDS.items())
        print(f"usage: dino data COMMAND ...\n\ncommands:\n{commands}\n\nexamples:\n{EXAMPLES}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f"Unknown command 'data {name}'{did_you_mean(name, COMMANDS)}: use {', '.join(COMMANDS)}.")
    _, kind, run = COMMANDS[name]
    options = parse(kind, argv[1:], f"dino data {name}", EXAMPLES)
    with command_output(options.json) as (terminal, give):
        run(options, terminal, give)
    return 0


def _pack(options: PackOptions, terminal: Terminal, give: Give) -> None:
    out = options.out or f"{Path(options.folder).resolve().name}-shards"
    settings = PackSettings(side=options.side, quality=options.quality, shard_size=options.shard_size)
    with terminal.progress("packing") as progress:
        pack(options.folder, out, settings, progress)
    _info(InfoOptions(shards=out), terminal, give)


def _info(options: InfoOptions, terminal: Terminal, give: Give) -> None:
    dataset = open_shards(Path(options.shards))
    info, settings = dataset.info, dataset.info.settings
    stored = "files of another program" if settings is None else "the folder's files, unchanged"
    if settings is not None and settings.side is not None:
        stored = f"downscaled to a short side of at most {settings.side}, as JPEG of quality {settings.quality}"
    rows = [
        ("images", f"{len(dataset)}, median short side {dataset.short_side} pixels"),
        ("classes", str(len(dataset.classes)) if dataset.classes else "none"),
        ("size", f"{format_bytes(sum(info.shards.values()))} in {len(info.shards)} shards"),
        ("source", info.source),
        ("stored", stored),
        ("skipped", str(len(dataset.skipped))),
        ("fingerprint", dataset.fingerprint),
    ]
    terminal.table(options.shards, ("", ""), rows)
    skipped = report_skipped(dataset.skipped, terminal)
    give({"path": options.shards, **to_dict(info), "short_side": dataset.short_side, "skipped": skipped})


def _check(options: CheckOptions, terminal: Terminal, give: Give) -> None:
    dataset, damaged = open_shards(Path(options.shards)), []
    with terminal.progress("checking") as progress:
        for done, damage in enumerate(dataset.damaged()):
            damaged += [damage] if damage else []
            progress(done, len(dataset))
    for damage in damaged:
        terminal.print(damage, style="yellow")
    give({"path": options.shards, "images": len(dataset), "damaged": damaged})
    if damaged:
        raise UserError(
            f"{options.shards}: {len(damaged)} of {len(dataset)} images (or the index) are damaged. Copy the shards "
            "again, or pack the folder again. Training skips damaged images and lists them."
        )
    terminal.print(f"{options.shards}: all {len(dataset)} images are intact.")


COMMANDS: dict[str, tuple[str, type, Callable[..., None]]] = {
    "pack": ("write the images of a folder into tar shards", PackOptions, _pack),
    "info": ("print the content of a directory of shards", InfoOptions, _info),
    "check": ("read all shards, and list damaged images", CheckOptions, _check),
}
