"""dino bench: how fast a run's step could be on this machine at most, how fast it is, and where the time goes."""

import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dino_ssl import __version__
from dino_ssl.cli.command_line import CommandLine
from dino_ssl.cli.options import Flag
from dino_ssl.config import edit
from dino_ssl.data.folder import Folder
from dino_ssl.errors import check_range
from dino_ssl.files import write_json
from dino_ssl.methods import MethodName
from dino_ssl.presets import resolve
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, machine, start
from dino_ssl.terminal import Terminal, command_output

if TYPE_CHECKING:
    from dino_ssl.profiling.profile import Bench

EXAMPLES = """\
  dino bench                                         what `dino train` begins with on this machine
  dino bench photos/ --preset small                  with the speed of reading these pictures
  dino bench --preset vits16 --batch 4 --json        one JSON object
  dino bench --preset vits16 --optim.micro-batch 2 --batch 8 -o step.json"""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure how fast training could be here, and how fast it is: the floor, the step, and where its time goes.

    Takes the flags of `dino train`, and trains nothing that is kept. Without a preset it measures what `dino train`
    begins with: `small` on a CPU, `vits16` on a GPU.
    """

    folder: tyro.conf.Positional[str] = ""
    """Folder of pictures whose reading is measured too; `scenes` draws some."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A recipe (`dino presets`), or MODULE:FUNCTION that returns a dino_ssl.Run."""
    network: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """vit_tiny/16, vit_small/8, vit_base/16, ..., or timm:NAME."""
    method: MethodName | None = None
    """How it learns: DINO (without this flag) or one of the paper's baselines."""
    batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Pictures in a step; without it as many as take some seconds, at most the recipe's."""
    steps: int = 3
    """Steps that are measured, after one to warm up."""
    file: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Write the JSON into this file."""
    json: Flag = False
    """One JSON object on standard output, messages on standard error."""
    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)

    def __post_init__(self) -> None:
        check_range(self, "batch", "steps", least=1)


def bench(argv: Sequence[str]) -> int:
    given, options = read(argv)
    with command_output(options.json) as (terminal, give):
        here = machine()
        run = _for_machine(options.run, given, here)
        with start(run.precision):
            found = _measure(run, options, given, here, terminal)
        show(found, terminal)
        result = {"date": datetime.date.today().isoformat(), "versions": _versions(), **found.told()}
        if options.file is not None:
            write_json(Path(options.file), result)
            terminal.print(f"Written to {options.file}", style="dim")
        give(result)
    return 0


def read(argv: Sequence[str]) -> tuple[CommandLine, Any]:
    """The command line, and the options in it: as `dino train` reads them."""
    kind: Any = BenchOptions  # has what this needs of a session's options
    given = CommandLine(list(argv), kind=kind, prog="dino bench", examples=EXAMPLES, base=preset_or_first)
    return given, given.parse(given.change(given.skeleton()))


def _versions() -> dict[str, str]:
    import torch

    return {"dino": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def preset_or_first(name: str | None) -> Run:
    """A preset, or what `dino train` begins with on this machine."""
    return resolve(name or ("small" if machine().device.type == "cpu" else "vits16"))


def _for_machine(run: Run, given: CommandLine, here: Machine) -> Run:
    """As the plan does it: a recipe in float32 stays so, any other takes what is fastest here; the line decides."""
    if given.has("--precision") or (given.has("--preset") and run.precision == "float32"):
        return run
    return edit(run, precision=here.precision)


def _measure(run: Run, options: Any, given: CommandLine, here: Machine, terminal: Terminal) -> "Bench":
    import torch

    from dino_ssl.presets.memory import micro_batch
    from dino_ssl.presets.plan import reading
    from dino_ssl.profiling.profile import Bench, fitting, in_batches
    from dino_ssl.profiling.step_time import CLASSES, step_speed
    from dino_ssl.profiling.throughput import matrix_rate, memory_rate
    from dino_ssl.runtime import Runtime

    with terminal.progress("matrix products") as done:
        products = matrix_rate(here, run.precision, done)
    chosen = run.optim.batch_size if given.has("--optim.batch-size") else fitting(run, here, products.per_second)
    run = in_batches(run, options.batch or chosen)
    if run.optim.micro_batch == "auto":
        run = edit(run, optim=dict(micro_batch=micro_batch(run, here, CLASSES, 1)[0]))
    with terminal.progress("training steps") as done:
        step = step_speed(run, Runtime(here.device, run.precision), run.optim.batch_size, options.steps, done)
    with terminal.progress("memory") as done:  # last: its buffers would count in the step's peak
        memory = memory_rate(here, done)
    seconds = None
    if not isinstance(run.data, Folder) or run.data.path:
        with terminal.progress("reading pictures") as done:
            seconds = reading(run, run.data.open(done))
    return Bench(run, here, torch.get_num_threads(), products, memory, step, seconds)


def show(found: "Bench", terminal: Terminal) -> None:
    """Tables for people: operations, bytes, the floor, what was reached, where the time goes, what to turn."""
    from dino_ssl.profiling.profile import benched

    here, batch, floor = found.here, found.step.batch, found.floor
    terminal.print(f"{here.name}, {here.cores} cores, {found.threads} threads; device {here.device}", style="bold")
    terminal.print(f"{benched(found.run)}, {batch} pictures a step\n")
    passes = ("teacher", "student", "backward", "total")
    rows = [
        [part.name, *(f"{getattr(part, one) / 1e9:.3f}" for one in passes), f"{part.total / floor.flops:.1%}"]
        for part in found.parts
    ]
    sums = [sum(getattr(part, one) for part in found.parts) / 1e9 for one in passes]
    rows.append(["all", *(f"{value:.3f}" for value in sums), "100.0%"])
    terminal.table("Billion operations of one picture, at least", ("", *passes, "share"), rows)
    terminal.print(f"As plain code does them: {found.as_written / 1e9:.3f}\n")
    rows = [[name, f"{count / 1e6:.1f}", f"{count / batch / 1e6:.2f}"] for name, count in found.bytes.items()]
    rows.append(["all", f"{batch * floor.bytes / 1e6:.1f}", f"{floor.bytes / 1e6:.2f}"])
    terminal.table("Million bytes through memory, at least", ("", "of a step", "of one picture"), rows)
    terminal.print()
    _show_speed(found, terminal)
    whole = sum(found.step.spent.values())
    rows = [[name, f"{1000 * each:.1f}", f"{each / whole:.1%}"] for name, each in found.step.spent.items()]
    terminal.table("Where a step's time goes", ("", "ms", "share"), rows)
    terminal.print()
    for line in found.advice():
        terminal.print(line)


def _show_speed(found: "Bench", terminal: Terminal) -> None:
    floor, products, memory = found.floor, found.products, found.memory
    rows = [
        ["matrix products alone", f"{floor.by_products(products.per_second):.2f}"],
        ["memory alone", f"{floor.by_memory(memory.per_second):.2f}"],
        ["the floor: no code passes", f"{found.most:.2f}"],
        ["reached by the step", f"{found.step.images_per_s:.2f}  ({found.share:.1%} of the floor)"],
    ]
    if found.reading is not None:
        rows.append(["reading and cropping, one worker", f"{1 / found.reading:.2f}"])
        rows.append(["both together, expected", f"{found.together:.2f}"])
    measured = f"{products.per_second / 1e9:.1f} GFLOP/s ({products.what}), {memory.per_second / 1e9:.1f} GB/s"
    terminal.table(f"Images/s; measured here: {measured} ({memory.what})", ("", "images/s"), rows)
    terminal.print(f"Peak memory {found.step.peak / 2**30:.2f} GiB\n")
