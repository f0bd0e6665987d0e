"""Train the same short CPU runs with two checkouts and compare the results bit for bit.

    python tests/reference/compare_commits.py BASE HEAD [--only NAME ...] [--keep DIR] [--jobs N]

BASE and HEAD are folders of two checkouts. Both are run by this interpreter, on the same images, which are drawn here
and do not depend on either checkout. Compared are every number in metrics.jsonl (apart from times), the tensors and
numbers of checkpoints/last.pt, by position, and the tensors of backbone.safetensors.

Results of BASE are kept in DIR (default: compare_commits in the temporary folder) and used again until BASE, the
run's arguments, the images or the version of torch change. Exit code: 0 equal, 1 different, 2 a run failed.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

RENAMED: dict[str, str] = {
    "--cache no": "--no-cache",
    "--cache memory": "--cache",
    "--no-recompute": "--no-grad-checkpointing",
    "--recompute": "--grad-checkpointing",
    "--knn.every-epochs": "--online-eval.every-epochs",
    "--knn.k": "--online-eval.k",
    "--knn.held-back": "--online-eval.val-fraction",
    "--optim.clip": "--optim.clip-grad",
    "--backbone.patch 8": "--backbone.patch 8 --backbone.stem patch",
}
"""Spelling in BASE -> spelling in HEAD, for the table below. A key is whole words: a flag ("--method.out-dim"), a flag
with its value ("--cache no"), or a value. The longest key wins; an empty string removes the words."""

WALL_CLOCK = {"time", "images_per_s", "wait"}
"""Metrics that differ between any two runs."""

# -- the runs ----------------------------------------------------------------------------------------------------------

COMMON = """
    --seed 5 --precision float32 --workers 0 --cache no --no-recompute
    --log-every 1 --save-minutes 1000 --keep-every 0 --knn.every-epochs 0 --on-collapse warn
    --optim.epochs 3 --optim.warmup-epochs 1 --optim.batch-size 8 --optim.micro-batch 0 --optim.lr 0.05
"""
VIEWS = """
    --views.global-size 32 --views.local-size 16 --views.local 2 --views.global-scale 0.4 1 --views.local-scale 0.1 0.4
"""
VIT = f"""
    --preset narrow-vit {VIEWS} --backbone.patch 8 --backbone.image-size 32
    --backbone.width 48 --backbone.depth 2 --backbone.heads 3
"""
HEAD_SIZE = "--method.out-dim 64 --method.head-hidden 32 --method.head-bottleneck 16"
DINO = f"{VIT} {HEAD_SIZE} --method.head-norm none"
RESNET = f"--preset narrow-vit {VIEWS} --network timm:resnet10t {HEAD_SIZE} --method.head-norm batch"


class Training(NamedTuple):
    """One run. `arguments` follow `train IMAGES/train`, in BASE's spelling; a later flag overrides an earlier one."""

    name: str
    arguments: str
    ranks: int = 1
    stop_at: int = 0
    """Step after which the run gets SIGINT; it is then resumed. 0: never."""
    without: str = ""
    """Module that cannot be imported in this run."""
    counted: bool = True
    """Whether a difference counts for the exit code."""


TRAININGS = [
    Training("dino", DINO),
    Training("byol", f"{VIT} --method byol --method.head-dim 16 --method.head-hidden 32"),
    Training("moco", f"{VIT} --method moco --method.head-dim 16 --method.head-hidden 32 --method.queue 24"),
    Training(
        "swav",
        f"{VIT} --method swav --method.out-dim 16 --method.head-dim 16 --method.head-hidden 32 --method.queue 16 "
        "--method.queue-from 1 --method.freeze-prototypes 0.5",
    ),
    Training("sinkhorn", f"{DINO} --method.targets sinkhorn"),
    Training("batch-softmax", f"{DINO} --method.targets batch-softmax"),
    Training("mse", f"{DINO} --method.loss mse --method.targets none"),
    Training("teacher-student", f"{DINO} --method.teacher student"),
    Training("teacher-previous-step", f"{DINO} --method.teacher previous-step"),
    Training("teacher-previous-epoch", f"{DINO} --method.teacher previous-epoch"),
    Training("no-sharpening", f"{DINO} --method.no-sharpening"),
    Training("predictor", f"{DINO} --method.predictor --method.head-norm batch"),
    Training("no-bottleneck", f"{DINO} --method.head-bottleneck 0 --method.head-layers 2 --method.head-act relu"),
    Training("lars", f"{RESNET} --optim.algorithm lars --method.no-norm-last"),
    Training("sgd", f"{RESNET} --optim.algorithm sgd --optim.clip 0"),
    Training("drop-path", f"{DINO} --backbone.drop-path 0.3 --backbone.registers 2"),
    Training(
        "schedules",
        f"{DINO} --optim.weight-decay 0.04 --optim.weight-decay-end 0.4 --method.momentum 0.9 --method.momentum-end 1 "
        "--optim.warmup-epochs 1.5 --optim.warmup-lr 1e-4 --optim.min-lr 1e-5 --optim.clip 0.3 "
        "--optim.layer-decay 0.8 --method.warmup-teacher-temp 0.02 --method.teacher-temp 0.07 "
        "--method.warmup-teacher-temp-epochs 2 --method.center-momentum 0.8",
    ),
    Training("freeze-last-layer", f"{DINO} --method.freeze-last-layer 1.5"),
    Training("no-local-views", f"{DINO} --views.local 0"),
    Training("small", "--preset small --optim.epochs 1"),
    # Without a preset, min_lr and momentum_end would depend on the speed that the plan measures.
    Training("planned", "--optim.epochs 1 --optim.min-lr 1e-4 --method.momentum-end 0.98"),
    Training("two-ranks", f"{DINO} --workers 1 --knn.every-epochs 1", ranks=2),
    Training("two-ranks-batch-norm", f"{RESNET} --optim.epochs 2", ranks=2),
    Training("two-ranks-moco", f"{VIT} --method moco --method.head-dim 16 --method.head-hidden 32 --method.queue 24",
             ranks=2),
    Training("micro-batch", f"{DINO} --optim.micro-batch 3"),
    Training("resumed", f"{DINO} --knn.every-epochs 1 --backbone.drop-path 0.3", stop_at=8),
    Training("resumed-moco", f"{VIT} --method moco --method.head-dim 16 --method.head-hidden 32 --method.queue 24",
             stop_at=7),
    Training("cache-memory", f"{DINO} --cache memory"),
    Training("recompute", f"{DINO} --recompute --backbone.drop-path 0.3"),
    Training("workers", f"{DINO} --workers 2"),
    Training("plain-views", DINO, without="numba"),
    Training("bfloat16", f"{DINO} --precision bfloat16"),
    Training("log-every", f"{DINO} --log-every 4"),
    Training("knn", f"{DINO} --knn.every-epochs 1 --knn.k 5 --knn.held-back 0.2"),
    Training("evals", f"{DINO} --evals 'knn IMAGES/train IMAGES/val --k 3 --every-epochs 1'"),
    Training("supervised", f"{VIT} --method supervised --knn.every-epochs 1", counted=False),
    Training(
        "supervised-augment",
        "--preset finetune --views.size 32 --backbone.patch 8 --backbone.image-size 32 --backbone.width 48 "
        "--backbone.depth 2 --backbone.heads 3",
        counted=False,
    ),
]  # fmt: skip

# -- the images --------------------------------------------------------------------------------------------------------


def draw_images(folder: Path) -> None:
    """Write folder/train (51 files) and folder/val (27), each with three class folders: JPEG of several sizes, small
    PNG, grey, transparent, palette. In train, one is turned by EXIF, and two are broken: one is found when the folder
    is read, the other when it is decoded."""
    rng = np.random.default_rng(0)

    def picture(width: int, height: int, channels: int = 3) -> np.ndarray:
        coarse = rng.integers(0, 256, (6, 8, channels), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
        for _ in range(4):
            x, y = rng.integers(width * 3 // 4), rng.integers(height * 3 // 4)
            image[y : y + height // 4, x : x + width // 4] = rng.integers(0, 256, channels)
        noise = rng.integers(-12, 13, image.shape)
        return np.clip(image + noise, 0, 255).astype(np.uint8)

    for split, photos, icons in (("train", 7, 5), ("val", 3, 2)):
        for name in ("a", "b", "c"):
            there = folder / split / name
            there.mkdir(parents=True)
            for n in range(photos):
                Image.fromarray(picture(600 - 20 * n, 400 + 15 * n)).save(there / f"photo{n}.jpg", quality=90)
            for n in range(icons):
                Image.fromarray(picture(96 + 3 * n, 80 - n)).save(there / f"icon{n}.png")
            Image.fromarray(picture(1800, 1300)).save(there / "large.jpg", quality=90)
            Image.fromarray(picture(300, 200, 1)[..., 0]).save(there / "grey.jpg")
            Image.fromarray(picture(90, 90, 4)).save(there / "transparent.png")
            Image.fromarray(picture(100, 70)).quantize(32).save(there / "palette.png")
    train = folder / "train"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(320, 240)).save(train / "a" / "turned.jpg", exif=exif)
    whole = (train / "a" / "photo0.jpg").read_bytes()
    (train / "b" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray((train / "b" / "icon0.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (train / "c" / "damaged.png").write_bytes(damaged)


# -- running -----------------------------------------------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")
LIMIT = 600
"""Seconds after which a run has failed."""
PRELOADED = ["torch", "torch._dynamo", "torch._inductor", "torch.utils.data", "timm", "numba", "cv2", "PIL.Image",
             "matplotlib.figure", "matplotlib.pyplot", "tyro", "rich", "tensorboardX"]  # fmt: skip
"""Modules that are imported once; every run is then forked. Imports take longer than these runs."""


class RunError(Exception):
    """A run did not end as it should, or took too long."""


def prepare_environment(keep: Path) -> None:
    """Set what all runs inherit: one thread, no GPU, and no compiled files in the checkouts."""
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    caches = {"NUMBA_CACHE_DIR": str(keep / "numba"), "PYTHONPYCACHEPREFIX": str(keep / "pycache")}
    os.environ.update(threads | caches | {"CUDA_VISIBLE_DEVICES": ""})
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def renamed(arguments: str) -> str:
    """Spell a run's arguments as HEAD does."""
    if not RENAMED:
        return arguments
    keys = "|".join(re.escape(key) for key in sorted(RENAMED, key=len, reverse=True))
    return re.sub(rf"(?<![^\s'])({keys})(?![^\s'])", lambda match: RENAMED[match[0]], " ".join(arguments.split()))


def package_of(checkout: Path) -> str:
    return "dino" if (checkout / "src/dino").is_dir() else "dino_ssl"


def run_package(checkout: Path, words: list[str], log: Path, without: str, stop_at: int) -> None:
    """Do in this process what `python -m PACKAGE words` does; its output goes to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(log.parent)
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]
    sys.path.insert(0, str(checkout / "src"))
    sys.argv = [package_of(checkout), *words]
    if without:
        sys.modules[without] = None  # pyright: ignore[reportArgumentType]
    if stop_at:
        steps = itertools.count(1)

        def stop(*_: Any) -> None:
            handled = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            if handled and next(steps) == stop_at:  # trial steps, before training handles signals, do not count
                signal.raise_signal(signal.SIGINT)

        register_optimizer_step_post_hook(stop)
    runpy.run_module(package_of(checkout), run_name="__main__", alter_sys=True)


def execute(training: Training, checkout: Path, words: list[str], log: Path, stop_at: int = 0) -> None:
    """Run a command line of a checkout's package. Raise RunError where its exit code is not the expected one."""
    if training.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(training.ranks)]
        command = [sys.executable, *launcher, "-m", package_of(checkout), *words]
        environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
        with log.open("w") as file:
            code = subprocess.run(
                command, cwd=log.parent, env=environment, stdout=file, stderr=file, timeout=LIMIT
            ).returncode
    else:
        process = FORKS.Process(target=run_package, args=(checkout, words, log, training.without, stop_at))
        process.start()
        process.join(LIMIT)
        process.kill()
        process.join()
        code = process.exitcode
    if code != (130 if stop_at else 0):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RunError(f"exit code {code} of: {shlex.join(words)}\n{tail}")


def train(training: Training, checkout: Path, images: Path, folder: Path, spell: Callable[[str], str]) -> None:
    """Train a run into `folder`, which appears only where it succeeded."""
    aside, log = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("part", "log"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    line = spell(f"train IMAGES/train {COMMON} {training.arguments} --yes --out OUT")
    words = [word.replace("IMAGES", str(images)) if word != "OUT" else str(aside) for word in shlex.split(line)]
    execute(training, checkout, words, log, training.stop_at)
    if training.stop_at:
        step = torch.load(aside / "checkpoints/last.pt", weights_only=True)["step"]
        if step != training.stop_at:
            raise RunError(f"it stopped at step {step}, not {training.stop_at}")
        execute(training, checkout, [*spell("train --resume").split(), str(aside)], log)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def state_of(checkout: Path) -> str:
    """Commit of a checkout, and what is not committed in its sources."""
    asked = (["rev-parse", "HEAD"], ["diff", "HEAD", "--", "src"])
    return "".join(subprocess.check_output(["git", "-C", str(checkout), *words], text=True) for words in asked)


def key_of(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


# -- comparing ---------------------------------------------------------------------------------------------------------


Metrics = dict[tuple[int, str], float]


def metrics_of(folder: Path) -> Metrics:
    """(line, name) -> number, for all metrics but times; nan where none was written."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        (number, name): float("nan") if value is None else value
        for number, line in enumerate(lines, 1)
        for name, value in line.items()
        if name not in WALL_CLOCK and not isinstance(value, str)
    }


def values_of(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor or number) of every leaf of nested dicts and lists, in their order; text is left out."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from values_of(part, f"{name}/{key}")
    elif isinstance(value, torch.Tensor | int | float):
        yield name, value


def saved_in(folder: Path) -> dict[str, list[tuple[str, Any]]]:
    """Part of the saved state -> its leaves."""
    saved = torch.load(folder / "checkpoints/last.pt", map_location="cpu", weights_only=True)
    parts = {key: list(values_of(saved[key], key)) for key in ("step", "method", "optimizer", "best")}
    weights = load_file(folder / "backbone.safetensors")
    return parts | {"backbone.safetensors": sorted(weights.items())}


def bits(value: Any) -> tuple[Any, ...]:
    """Return the bits to compare of a tensor or a number; nan equals nan, and 0.0 differs from -0.0."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return type(value), np.asarray(value).tobytes()


def difference(base: Path, head: Path) -> tuple[str, str]:
    """(the first difference, empty where there is none; the metrics that only one side has)."""
    one, other = metrics_of(base), metrics_of(head)
    ours, theirs = ({name for _, name in metrics} for metrics in (one, other))
    alone = [f"{name} only in BASE" for name in sorted(ours - theirs)]
    alone += [f"{name} only in HEAD" for name in sorted(theirs - ours)]
    return _difference(one, other, ours & theirs) or _difference_of_saved(base, head), ", ".join(alone)


def _difference(one: Metrics, other: Metrics, common: set[str]) -> str:
    if "loss" not in common:
        return "metrics.jsonl: no loss"
    for line, name in sorted(one.keys() | other.keys()):
        a, b = one.get((line, name)), other.get((line, name))
        if name in common and bits(a) != bits(b):
            return f"metrics.jsonl, line {line}: {name} is {a!r} in BASE, {b!r} in HEAD"
    return ""


def _difference_of_saved(base: Path, head: Path) -> str:
    ours, theirs = saved_in(base), saved_in(head)
    for part, leaves in ours.items():
        if len(leaves) != len(theirs[part]):
            return f"{part}: {len(leaves)} values in BASE, {len(theirs[part])} in HEAD"
        for one, other in zip(leaves, theirs[part], strict=True):
            if bits(one[1]) != bits(other[1]):
                return f"{described(*one)} in BASE, {described(*other)} in HEAD{distance(one[1], other[1])}"
    return ""


def described(name: str, value: Any) -> str:
    many = isinstance(value, torch.Tensor) and value.numel() > 1
    return f"{name} {list(value.shape)}" if many else f"{name} = {value!r}"


def distance(one: Any, other: Any) -> str:
    if not all(isinstance(value, torch.Tensor) for value in (one, other)) or one.shape != other.shape:
        return ""
    return f"; they differ by up to {(one.double() - other.double()).abs().max().item():.3g}"


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> int:
    names = [training.name for training in TRAININGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("head", type=Path, metavar="HEAD")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir(), "compare_commits"), metavar="DIR")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time")
    given = parser.parse_args()
    base, head, keep = given.base.resolve(), given.head.resolve(), given.keep.resolve()

    prepare_environment(keep)
    FORKS.set_forkserver_preload(PRELOADED)
    images = keep / f"images-{key_of(inspect.getsource(draw_images))}"
    if not images.is_dir():
        draw_images(images)
    known = (state_of(base), COMMON.split(), images.name, torch.__version__)

    def compare(training: Training) -> tuple[str, int]:
        """(the line of the report, the exit code)."""
        there = keep / "base" / f"{training.name}-{key_of(known, training.arguments.split(), training[2:])}"
        here = keep / "head" / training.name
        try:
            if not there.is_dir():
                train(training, base, images, there, spell=str)
            train(training, head, images, here, spell=renamed)
        except (RunError, subprocess.TimeoutExpired) as error:
            return f"FAILED: {error}", 2
        try:
            found, alone = difference(there, here)
        except (KeyError, OSError) as error:  # a file or a part of the checkpoint is missing
            found, alone = f"{type(error).__name__}: {error}", ""
        line = f"different: {found}" if found else "equal"
        line += f" [{alone}]" if alone else ""
        return line if training.counted else f"{line} (not counted)", int(bool(found) and training.counted)

    codes = [0]
    chosen = [training for training in TRAININGS if training.name in given.only]
    alone = [training for training in chosen if training.ranks > 1]  # has several processes of its own
    together = [training for training in chosen if training.ranks == 1]
    for jobs, some in ((given.jobs, together), (1, alone)):
        with ThreadPoolExecutor(jobs) as pool:
            for training, (line, code) in zip(some, pool.map(compare, some), strict=True):
                print(f"{training.name:24}{line}", flush=True)
                codes.append(code)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
