"""dino explore: the web page of an index."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from dino_ssl.cli.options import Device, Flag, Trust, parse
from dino_ssl.errors import UserError, check_range
from dino_ssl.explore.server import Server
from dino_ssl.formatting import plural
from dino_ssl.search.index import Index
from dino_ssl.terminal import Terminal

EXAMPLES = """\
  dino index runs/photos photos/ -o photos.idx       build the index, once
  dino explore photos.idx                            open the address that it prints in a browser
  dino explore photos.idx --masks masks/             show the masks of `dino segment`
  dino explore photos.idx --export chosen/           selections can be copied or linked into folders"""


@dataclass(frozen=True, kw_only=True)
class ExploreOptions:
    """Look at an index in a web browser: search, attention, duplicates, clusters, a map, and selections.

    The page is served on this computer only (127.0.0.1), at an address with a token that is new at every start. It
    loads nothing from the network, and never changes or deletes images. Ctrl-C ends it.
    """

    index: tyro.conf.Positional[str]
    """The folder of an index, as `dino index` writes it."""
    port: int = 8123
    """Port; if it is taken, the next free one."""
    masks: Path | None = None
    """Output folder of `dino segment`, or a folder with an image of labels for each image: the same relative name with
    the suffix .png, and the same size."""
    export: Path | None = None
    """Folder into which the page may copy or link selections, a class folder for each. Files in it are kept."""
    read_only: Flag = False
    """Selections cannot be changed or exported to a folder."""
    images: str | None = None
    """The folder of the images, if it was moved."""
    checkpoint: str | None = None
    """The network, if it was moved. Its weights must be those of the index."""
    device: Device = None
    trust: Trust = False


def explore(argv: Sequence[str]) -> int:
    """Run `dino explore`."""
    options = parse(ExploreOptions, argv, "dino explore", EXAMPLES)
    check_range(options, "port", least=1, most=65535)
    if options.masks is not None and not options.masks.is_dir():
        raise UserError(f"There is no folder {options.masks}. Expected `masks` of `dino segment`.")
    if options.export is not None and options.export.exists() and not options.export.is_dir():
        raise UserError(f"Expected `export` to be a folder for selections; {options.export} is a file.")
    index = Index(
        options.index, images=options.images, checkpoint=options.checkpoint, device=options.device, trust=options.trust
    )
    server = Server(index, port=options.port, masks=options.masks, export=options.export, read_only=options.read_only)
    terminal = Terminal()
    if server.port != options.port:
        terminal.print(f"Port {options.port} is taken: using {server.port}.", style="yellow")
    terminal.print(f"{plural(len(index), 'image')} of {index.folder}. Open this address in a browser; Ctrl-C ends it:")
    terminal.print(server.address, style="bold")
    server.serve()
    terminal.print("Stopped.")
    if server.is_computing:
        sys.stdout.flush()
        os._exit(0)  # the thread of the computation would crash, as Python ends below it
    return 0
