"""`dino bench`: the roofline of a training step on this machine, and the measured speed of step and data path."""

import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from dino_ssl import __version__, runtime
from dino_ssl.cli.command_line import CommandLine
from dino_ssl.cli.options import Flag
from dino_ssl.config import edit
from dino_ssl.errors import check_range
from dino_ssl.methods import MethodName
from dino_ssl.presets import resolve
from dino_ssl.run import Run
from dino_ssl.terminal import command_output

FORMAT = 1
"""Version of the JSON."""
EXAMPLES = """\
  dino bench                                         the default preset of `dino train` on this machine
  dino bench photos/ --preset small                  include decoding and augmenting these images
  dino bench --preset vits16 --json                  one JSON object
  dino bench --preset vits16 --optim.batch-size 8 --optim.micro-batch 2"""


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
    """vit_tiny/16, vit_small/8, vit_base/16, ..., or timm:NAME."""
    method: MethodName | None = None
    """Training method: dino (default) or a baseline of the paper."""
    steps: int = 3
    """Timed steps after a warm-up step."""
    json: Flag = False
    """Print one JSON object to standard output, and messages to standard error."""
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)

    def __post_init__(self) -> None:
        check_range(self, "steps", least=1)


def bench(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    command_line, options = read(argv)
    with command_output(options.json) as (terminal, give):
        from dino_ssl.profiling.profile import measure, table

        machine = runtime.machine()
        run = choose_precision(options.run, command_line, machine)
        batch_size = run.optim.batch_size if command_line.has("--optim.batch-size") else None
        with runtime.start(run.precision), terminal.progress("profiling") as progress:
            dataset = run.data.open(progress) if run.data.is_given else None
            measured = measure(run, machine, dataset, progress, batch_size=batch_size, steps=options.steps)
        title = f"{machine.name}, {machine.cores} cores, {machine.device}, {run.precision}"
        terminal.table(title, ("", "", ""), table(measured))
        give({"format": FORMAT, "date": datetime.date.today().isoformat(), "versions": versions(), **measured})
    return 0


def read(argv: Sequence[str]) -> tuple[CommandLine, Any]:
    """Return the command line and its options, parsed as by `dino train`."""
    kind: Any = BenchOptions  # has the fields that CommandLine needs
    command_line = CommandLine(list(argv), kind=kind, prog="dino bench", examples=EXAMPLES, base=preset_or_default)
    return command_line, command_line.options()


def preset_or_default(name: str | None) -> Run:
    """Return a preset, or the default preset of this machine."""
    return resolve(name or ("small" if runtime.machine().device.type == "cpu" else "vits16"))


def choose_precision(run: Run, command_line: CommandLine, machine: runtime.Machine) -> Run:
    """Return the run in the machine's fastest precision, unless the command line or a float32 preset sets another."""
    if command_line.has("--precision") or (command_line.has("--preset") and run.precision == "float32"):
        return run
    return edit(run, precision=machine.precision)


def versions() -> dict[str, str]:
    """Return the versions that decide the speed."""
    import torch

    return {"dino": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
