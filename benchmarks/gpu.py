"""Everything that needs a GPU: parity in low precision, training steps, memory, compiled blocks, training from files.

    python benchmarks/gpu.py measure --minutes 8 --json docs/benchmarks/gpu.json
    python benchmarks/gpu.py train DATA --minutes 9 --json docs/benchmarks/gpu-train.json

The results are saved after each measurement, so a run that is stopped early keeps what it has. A measurement that fails
is saved with its error; one that no longer fits into the time is saved as such. `--tiny` runs everything at the
smallest sizes, on a CPU too. `gpu_prepare.sh` packs the images and wheels for a machine without a network. Versions of
a training step run one after the other, each in a process of its own, not in turns: n counts steps.

Parity compares gradients of one whole step, all parameters as one vector, with those of the reference implementation
in float32: `error` is the relative distance of the optimized step in low precision, `reference` that of the reference
implementation in the same precision, which is rounding. Optimized kernels may not be further away than twice that.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from common import SIZES, about, run_child, save, summarize, write_images
from dino_ssl import kernels
from dino_ssl.config import edit
from dino_ssl.data.batch import Batch
from dino_ssl.data.folder import Folder
from dino_ssl.methods import BYOLConfig, MoCoConfig, SupervisedConfig, SwAVConfig
from dino_ssl.methods.method import BuildContext, Implementations, Method, MethodConfig
from dino_ssl.models.vit import ViT
from dino_ssl.preprocessing import normalize
from dino_ssl.profiling.roofline import matmul_throughput
from dino_ssl.run import Run
from dino_ssl.runtime import Precision, machine, start, synchronize
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step
from time_to_accuracy import plan, portable, train_and_evaluate
from workload import Workload, with_matmul_share

SCRIPTS = Path(__file__).parent
CLOCK = Clock(10_000, 1_000, 100)
WORKLOADS = {
    network: Workload(network, "2x224+8x96", 65536, batch, drop_path=0.1)
    for network, batch in (("vit_small", 128), ("vit_base", 64), ("vit_small_8", 32), ("resnet50", 64))
}
TINY_WORKLOADS = {"narrow": Workload("narrow", "2x32+2x16", 64, 4, drop_path=0.1, hidden=32)}
CHILD_SECONDS = 150
"""The longest time of one version: one that hangs may not use the time of the others."""
LEAST_SECONDS = 20
"""With less time left, nothing further starts."""
RESERVE = 1
"""Minutes of `train` for its start and its evaluations."""


class Measurements:
    """Results by name, saved after each; `minutes` for all of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path, self.console = options.json, Console()
        self.deadline = time.monotonic() + 60 * options.minutes
        self.flops_per_s: float | None = None
        self.result: dict[str, Any] = {"benchmark": "gpu", **about(vars(options)), "measurements": {}}

    @property
    def seconds_left(self) -> float:
        """Time until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure if there is time left; save the result, or why there is none."""
        if self.seconds_left < LEAST_SECONDS:
            return self.record(name, {"failed": self.no_time})
        try:
            value = measure()
        except Exception as error:  # the other measurements continue, whatever this one met
            value = {"failed": f"{type(error).__name__}: {error}"[:500]}
        self.record(name, value)

    def record(self, name: str, value: Any) -> None:
        """Save a result, also in place of an earlier one of this name."""
        self.result["measurements"][name] = value
        self.console.print(f"[{self.seconds_left:5.1f} s left] {name}: {json.dumps(value)[:400]}", highlight=False)
        save(self.path, self.result)

    def child(self, script: str, version: str, workload: Workload, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a version measures in a process of its own, or its error. options: of the script."""
        if self.seconds_left < LEAST_SECONDS:
            return {"failed": self.no_time}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        seconds = min(CHILD_SECONDS, self.seconds_left)
        return run_child(str(SCRIPTS / script), version, [*workload.arguments(), *words], seconds)

    def compare(self, name: str, script: str, versions: Sequence[str], workload: Workload, **options: Any) -> None:
        """Measure one version after another; save the rows after each. options: of the script, with its `steps`."""
        entries: dict[str, list[dict[str, Any]]] = {}
        settings = asdict(workload) | {key: value for key, value in options.items() if key != "folder"}
        for version in versions:
            entry = self.child(script, version, workload, options)
            entries[version] = [entry | {"seconds": each} for each in entry.pop("step_seconds", [])] or [entry]
            rows = summarize(entries, workload.batch * (1 if script == "train_step.py" else options["steps"]))
            rows = with_matmul_share(rows, workload, self.flops_per_s) if self.flops_per_s else rows
            self.record(name, {"settings": settings, "rows": rows})

    @property
    def no_time(self) -> str:
        """Error of a measurement that no longer fits into the time."""
        return f"not measured: {self.seconds_left:.0f} s left"


# -- parity ----------------------------------------------------------------------------------------------------


def parity_run(method: MethodConfig | None, tiny: bool) -> Run:
    """Return a run of one method with a ViT of both resolutions, drop-path included."""
    size = dict(global_size=32, local_size=16, local=2) if tiny else dict(global_size=224, local_size=96, local=4)
    network = (
        ViT(patch=8, width=16, depth=3, heads=2, image_size=32, drop_path=0.1)
        if tiny
        else ViT(size="small", drop_path=0.1)
    )
    run = edit(Run(backbone=network), optim=dict(batch_size=8), views=size)
    if method is not None:
        return edit(run, method=method)
    return edit(run, method=dict(out_dim=64, head_hidden=32) if tiny else dict(out_dim=8192))


def methods(tiny: bool) -> dict[str, MethodConfig | None]:
    """Return every method by name; None is DINO."""
    small: dict[str, Any] = dict(head_dim=32, head_hidden=64) if tiny else {}
    return {
        "dino": None,
        "byol": BYOLConfig(**small),
        "moco": MoCoConfig(**small, queue=64),
        "swav": SwAVConfig(**small, out_dim=32 if tiny else 3000),
        "supervised": SupervisedConfig(),
    }


def random_batch(run: Run) -> Batch:
    """Return random uint8 images and labels."""
    rng, count = torch.Generator().manual_seed(0), run.optim.batch_size
    views = (
        torch.randint(0, 256, (n, count, 3, side, side), dtype=torch.uint8, generator=rng)
        for n, side in run.views.view_shapes
    )
    return Batch(tuple(views), torch.arange(count) % 3)


def gradient(run: Run, precision: Precision, names: tuple[str, ...]) -> Tensor:
    """Return the gradient of one step with the optimized implementations `names`, float64 on the CPU."""
    optimized = {name: function for name, function in kernels.optimized().items() if name in names}
    with start(precision) as rt:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the reference is float32
        torch.manual_seed(run.seed)
        context = BuildContext(run.backbone, run.seed, 3, None, "", Implementations(**optimized))
        method = run.method.build(context).to(rt.device).train()
        without_drop_path(method)
        batch = random_batch(run)
        views = tuple(normalize(view.flatten(0, 1).to(rt.device)).unflatten(0, view.shape[:2]) for view in batch.views)
        assert batch.labels is not None
        batch = Batch(views, batch.labels.to(rt.device))
        with torch.no_grad(), rt.autocast():  # fills MoCo's queue, without which its loss is 0
            method.after_step(method(batch, CLOCK, None).carry, CLOCK)
        with rt.autocast():
            loss = method(batch, CLOCK, None).loss
        scale = 1024.0 if precision == "float16" else 1.0  # a fixed one: small gradients do not underflow
        (loss.float() * scale).backward()
        parts = [p.grad.double().flatten().cpu() / scale for p in method.parameters() if p.grad is not None]
        return torch.cat(parts)


def without_drop_path(method: Method) -> None:
    """Switch stochastic depth off: packed and separate views draw different images."""
    for module in method.modules():
        if hasattr(module, "drop_path"):
            module.drop_path = 0.0


def relative(value: Tensor, reference: Tensor) -> float:
    """Return |value - reference| / |reference|."""
    return float((value - reference).norm() / reference.norm())


def parity(run: Run, precision: Precision, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the relative errors of an optimized and a reference step against the reference step in float32."""
    exact = gradient(run, "float32", ())
    error, rounding = (relative(gradient(run, precision, each), exact) for each in (names, ()))
    return {"error": error, "reference": rounding, "passed": bool(error <= 2 * rounding + 1e-5)}


def skipped_step(tiny: bool) -> dict[str, Any]:
    """Take a step whose gradients overflow: the scaler skips it, so weights stay equal and the scale is halved."""
    run = parity_run(None, tiny)
    with start("float16" if machine().device.type == "cuda" else "float32") as rt:
        method = build_method(run, classes=3)
        model = prepare_model(method, rt)
        scaler = torch.amp.GradScaler(rt.device.type, init_scale=2.0**100, enabled=True)
        state = State(method, run.optim.build(method.trainable), scaler)
        before = [p.detach().clone() for p in method.trainable.parameters()]
        method.register_forward_hook(lambda module, args, out: out._replace(loss=out.loss * torch.inf))
        train_step(state, model, random_batch(run), CLOCK, run, rt)
        synchronize(rt.device)
        equal = all(torch.equal(a, b) for a, b in zip(before, method.trainable.parameters(), strict=True))
        finite = all(
            bool(value.isfinite().all()) for value in method.state_dict().values() if value.is_floating_point()
        )
        halved = scaler.get_scale() == 2.0**99
    return {
        "weights_equal": equal,
        "state_finite": finite,
        "scale_halved": halved,
        "passed": equal and halved and finite,
    }


# -- training --------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    """Run the parity checks, then the training steps and training from files."""
    results, tiny, device = Measurements(options), options.tiny, machine().device
    precisions: tuple[Precision, ...] = ("bfloat16", "float16") if device.type == "cuda" else ("bfloat16",)

    def matmul() -> dict[str, Any]:
        results.flops_per_s, shape = matmul_throughput(device, precisions[0])
        return {"flops_per_s": results.flops_per_s, "shape": shape}

    results.add("matmul FLOP/s", matmul)
    results.add("skipped step", lambda: skipped_step(tiny))
    groups = {
        "loss": ("loss_from_bottleneck", "batch_center"),
        "attention": ("attention",),
        "packed ViT": ("forward_views",),
    }
    for precision in precisions:
        for name, names in groups.items():
            check = partial(parity, parity_run(None, tiny), precision, names)
            results.add(f"parity {precision}: {name}", check)
        for name, method in methods(tiny).items():
            check = partial(parity, parity_run(method, tiny), precision, tuple(kernels.optimized()))
            results.add(f"parity {precision}: step of {name}", check)
    plain, ours = ("plain:float32", "dino:float32") if tiny else ("plain:float16", "dino:bfloat16")
    workloads, steps = (TINY_WORKLOADS, 2) if tiny else (WORKLOADS, 5)
    first = next(iter(workloads))
    for network, workload in workloads.items():
        versions = [plain, ours] if tiny else [plain, ours, "lightly:float16"]
        results.compare(f"step of {network}", "train_step.py", versions, workload, steps=steps)
        if network == first:
            from_files(results, workload, [plain, ours], tiny)
    for network in [first] if tiny else ["vit_small", "vit_base", "vit_small_8"]:
        fixed = replace(workloads[network], drop_path=0.0)  # otherwise every block is compiled by itself
        name, versions = f"compiled blocks of {network}, without drop-path", [ours, ours.replace("dino", "compiled")]
        results.compare(name, "train_step.py", versions, fixed, steps=steps)


def from_files(results: Measurements, workload: Workload, versions: Sequence[str], tiny: bool) -> None:
    """Train from JPEG files, and load them alone: the limit of the data path."""
    workers, steps, count = (1, 2, 8) if tiny else (machine().cores, 64, 256)  # more steps than prefetched batches
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        options = dict(folder=folder, steps=steps, workers=workers)

        def load() -> dict[str, Any]:
            files = sorted(write_images(Path(scratch), count, *SIZES["500"]).glob("*.jpg"))
            for number in range(2 * steps * workload.batch):  # no epoch ends between the steps
                os.link(files[number % count], folder / f"{number}.jpg")
            entry = results.child("end_to_end.py", "loader", workload, options)
            return entry if "failed" in entry else {"images_per_s": steps * workload.batch / entry["seconds"]}

        results.add("JPEG files, data path alone", load)
        results.compare("from JPEG files", "end_to_end.py", versions, workload, **options)


def train(options: argparse.Namespace) -> None:
    """Train on DATA/train for the minutes, evaluate on DATA/val: 20-NN accuracy over time."""
    results, device_info = Measurements(options), machine()
    train_set, val_set = (Folder(path=str(options.data / name)).open() for name in ("train", "val"))
    minutes = options.minutes - RESERVE
    length: dict[str, Any] = dict(minutes=minutes, workers=max(1, device_info.cores - 1))
    run, curve = plan(options.recipe, options.data / "train", train_set, device_info, **length), []
    with tempfile.TemporaryDirectory() as folder:
        for point in train_and_evaluate(edit(run, out=folder), train_set, val_set, minutes, 1, results.console):
            curve.append(point)
            curves = [{"seed": run.seed, "run": portable(run), "curve": curve}]
            results.record(f"20-NN of {options.recipe}", {"planned_minutes": minutes, "curves": curves})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["measure", "train"])
    parser.add_argument("data", type=Path, nargs="?", help="of train: folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--recipe", default="resnet18d", help="of train; see time_to_accuracy.py")
    parser.add_argument("--minutes", type=float, default=8, help="for everything; what does not fit is left out")
    parser.add_argument("--tiny", action="store_true", help="of measure: the smallest sizes, as a trial on a CPU")
    parser.add_argument("--json", type=Path, help="output file, written after each measurement")
    options = parser.parse_args()
    if options.part == "measure":
        measure(options)
    elif options.data is None or options.minutes <= RESERVE:
        parser.error(f"train expected DATA, a folder with train/ and val/, and more than {RESERVE} minute")
    else:
        train(options)


if __name__ == "__main__":
    main()
