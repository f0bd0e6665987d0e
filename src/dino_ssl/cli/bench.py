"""`dino bench`: the roofline of a training step on this machine, and the measured speed of step and data path."""

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from dino_ssl import runtime
from dino_ssl.cli.command_line import CommandLine
from dino_ssl.cli.help_pages import page_examples
from dino_ssl.cli.options import Device, Json
from dino_ssl.config import edit, to_dict
from dino_ssl.methods import MethodName
from dino_ssl.presets import resolve
from dino_ssl.run import Run
from dino_ssl.terminal import command_output

FORMAT = 2
"""Version of the JSON."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Profile training: roofline, throughput, peak memory, time by part and operator, and the data path.

    Takes the flags of `dino train`; the trained weights are discarded. The default preset is `small` on a CPU and
    `vits16` on a GPU. Without --optim.batch-size, a step has as many images as take about two seconds.
    """

    folder: tyro.conf.Positional[str] = ""
    """Image folder for measuring the data path; `scenes` generates synthetic images."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A preset (`dino presets`), or MODULE:FUNCTION that returns a dino_ssl.Run."""
    network: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """vit_tiny/16, vit_small/8, vit_base/16, ..., timm:NAME, or MODULE:CLASS."""
    method: MethodName | None = None
    """Training method: dino (default) or a baseline of the paper."""
    device: Device = None
    json: Json = False
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)


def bench(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    line = CommandLine(list(argv), kind=BenchOptions, prog="dino bench", examples=page_examples("bench"))
    machine = runtime.machine(line.types.device)
    options, batch_size = read(argv, machine)
    with command_output(options.json) as (terminal, give):
        from dino_ssl.api.calls import versions
        from dino_ssl.profiling.profile import measure, table

        run = options.run
        with runtime.start(run.precision, machine.device), terminal.progress("profiling") as progress:
            dataset = run.data.open(progress) if run.data.is_given else None
            run, rows = measure(run, machine, dataset, progress, batch_size)
        title = f"{machine.name}, {machine.cores} cores, {machine.device}, {run.precision}"
        terminal.table(title, ("", "", ""), table(rows))
        about = {"date": datetime.date.today().isoformat(), "versions": versions(), "machine": title}
        about["command"] = shlex.join(["dino", "bench", *argv])
        give({"format": FORMAT, **about, "run": to_dict(run), "rows": [row._asdict() for row in rows]})
    return 0


def read(argv: Sequence[str], machine: runtime.Machine) -> tuple[Any, int | None]:
    """Return the options, parsed as by `dino train`, and the batch size if it is given.

    The precision is the fastest of the machine, unless the command line or a float32 preset sets another.
    """
    kind, default = BenchOptions, "small" if machine.device.type == "cpu" else "vits16"
    command_line = CommandLine(
        list(argv),
        kind=kind,
        prog="dino bench",
        examples=page_examples("bench"),
        base=lambda name: resolve(name or default),
    )
    options = command_line.options()
    if not command_line.has("--precision") and not (options.preset and options.run.precision == "float32"):
        options = edit(options, run=dict(precision=machine.precision))
    return options, options.run.optim.batch_size if command_line.has("--optim.batch-size") else None
