"""Mutated images and files, and interrupted runs, at random until the time is over. Repeated runs add up in the JSON.

    python benchmarks/faults.py --minutes 20 --json docs/benchmarks/faults.json

- images: files of eight formats, mutated (cut, zeros, noise, flipped bits, inserted and repeated parts, changed
  headers), are decoded. They are refused with a reason, equal to the original (only metadata differ), or changed:
  used although pixels differ, because neither the format nor its decoder can tell.
- files: the checkpoint, the exported backbone and run.json of a small run, and index, description and shard of packed
  images, mutated in the same way, are loaded.
- interruptions: a small run is killed (SIGKILL) at a random moment, and resumed; checkpoint, backbone and metrics must
  equal those of the uninterrupted run bit by bit.

Every trial is in a process of its own kind, so that a crash, a hang of more than ten seconds, another error than the
documented ones, and output of a decoder on the terminal are counted as failures, with the seed that repeats them.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from common import about, save
from dino_ssl import checkpoint
from dino_ssl.data.decode import decode
from dino_ssl.data.image_header import probe
from dino_ssl.data.shard_writer import pack
from dino_ssl.data.shards import PackSettings, ShardDataset
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError
from dino_ssl.evals.online import OnlineEval
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.metrics import read_metrics
from dino_ssl.models.pretrained import load
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run, read_run
from dino_ssl.runtime import Runtime
from dino_ssl.training import train

FORK = multiprocessing.get_context("fork")
SECONDS = 10
"""Longest time of one trial; a longer one is a hang."""
TRIALS = {"images": 300, "files": 60, "interruptions": 4}
"""Trials of a kind in one round."""
MAX_FAILURES = 50
Trial = Callable[[np.random.Generator], str]
"""Makes one random trial and returns its outcome."""
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG"},
    "progressive JPEG": {"format": "JPEG", "progressive": True},
    "PNG": {"format": "PNG"},
    "WebP": {"format": "WEBP", "lossless": True},
    "GIF": {"format": "GIF"},
    "TIFF": {"format": "TIFF", "compression": "tiff_lzw"},
    "BMP": {"format": "BMP"},
    "AVIF": {"format": "AVIF"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, help="of the first round; default: the time")
    parser.add_argument("--json", type=Path, help="output file, to whose counts those of this run are added")
    options = parser.parse_args()
    console, end = Console(), time.monotonic() + 60 * options.minutes
    stored = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    counts = {kind: Counter(stored.get("counts", {}).get(kind, {})) for kind in TRIALS}
    failures, seed = stored.get("failures", []), options.seed or int(time.time())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trials: dict[str, Trial] = {
            "images": image_trial,
            "files": file_trial(folder),
            "interruptions": interruption_trial(folder),
        }
        while time.monotonic() < end:
            for kind, trial in trials.items():
                outcomes, failed = in_child(trial, kind, seed)
                counts[kind] += outcomes
                failures = [*failures, *failed][-MAX_FAILURES:]
            seed += 1
            result = {kind: dict(sorted(counter.items())) for kind, counter in counts.items()}
            save(options.json, {"benchmark": "faults", **about({}), "counts": result, "failures": failures})
            console.print(result)
    console.print(failures or "no failures")


def in_child(trial: Trial, kind: str, seed: int) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Make the trials of a round in another process; return their outcomes, and the failed ones with their seeds."""
    outcomes, failed, first = Counter[str](), [], 0
    while first < TRIALS[kind]:
        receiver, sender = FORK.Pipe(duplex=False)
        child = FORK.Process(target=make_trials, args=(trial, kind, seed, first, sender))
        child.start()
        sender.close()
        limit = SECONDS if kind != "interruptions" else 12 * SECONDS
        outcome = ""
        while first < TRIALS[kind]:
            try:
                outcome = receiver.recv() if receiver.poll(limit) else "hang"
            except EOFError:
                outcome = "crash"
            outcomes[outcome.split(":")[0]] += 1
            if outcome.split(":")[0] not in ("refused", "equal", "changed", "bit-equal"):
                failed.append({"kind": kind, "seed": [seed, first], "outcome": outcome})
            first += 1
            if outcome in ("hang", "crash"):
                break
        child.kill()
        child.join()
    return outcomes, failed


def make_trials(trial: Trial, kind: str, seed: int, first: int, sender: Any) -> None:
    """Send the outcome of each trial from `first` on; what is written to the terminal is an outcome of its own."""
    with tempfile.TemporaryFile() as terminal:
        os.dup2(terminal.fileno(), 1)
        os.dup2(terminal.fileno(), 2)
        written = 0
        for number in range(first, TRIALS[kind]):
            try:
                outcome = trial(np.random.default_rng([seed, number]))
            except Exception as error:
                outcome = f"error: {type(error).__name__}: {error}"[:300]
            size = os.fstat(terminal.fileno()).st_size
            if size > written and outcome != "bit-equal":
                outcome, written = f"printed: {os.pread(terminal.fileno(), 200, written)!r}", size
            sender.send(outcome)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the content of a file with one random defect."""
    start = int(rng.integers(len(data)))
    length = int(min(rng.integers(1, 1 + max(1, len(data) // 4)), len(data) - start))
    part = data[start : start + length]
    head = int(rng.integers(min(len(data), 256)))
    flipped = bytes([data[start] ^ (1 << int(rng.integers(8)))])
    return (
        data[:start],
        data[:start] + data[-2:],
        data[:start] + bytes(length) + data[start + length :],
        data[:start] + rng.bytes(length) + data[start + length :],
        data[:start] + flipped + data[start + 1 :],
        data[:start] + rng.bytes(int(rng.integers(1, 64))) + data[start:],
        data[:start] + part + data[start:],
        data[:head] + rng.bytes(int(rng.integers(1, 5))) + data[head:][4:],
        data[:start] + data,
    )[int(rng.integers(9))]


def image_trial(rng: np.random.Generator) -> str:
    """Decode a mutated image of a random format and size."""
    image = Image.fromarray(Scenes(size=int(rng.integers(24, 160))).read(int(rng.integers(1000))))
    file = io.BytesIO()
    image.save(file, **FORMATS[list(FORMATS)[int(rng.integers(len(FORMATS)))]])
    expected, data = decode("image", file.getvalue()), mutated(file.getvalue(), rng)
    try:
        probe("image", data)
        return "equal" if np.array_equal(decode("image", data), expected) else "changed"
    except UserError:
        return "refused"


def file_trial(folder: Path) -> Trial:
    """Return the trial that loads a mutated file of a run or of packed images."""
    run = small_run(folder / "run")
    for _ in train(run, Runtime(torch.device("cpu"), "float32"), run.data.open()):
        pass
    Scenes(count=12, size=32, classes=3).write(folder / "photos")
    pack(folder / "photos", folder / "shards", PackSettings())
    loaders: dict[str, Callable[[Path], Any]] = {
        "run/checkpoints/last.pt": lambda root: checkpoint.load(root / "run/checkpoints/last.pt"),
        "run/backbone.safetensors": lambda root: load(root / "run/backbone.safetensors").state_dict(),
        "run/run.json": lambda root: read_run(root / "run"),
        "shards/index.arrow": lambda root: read_shards(root / "shards"),
        "shards/info.json": lambda root: read_shards(root / "shards"),
        "shards/shard-000000.tar": lambda root: read_shards(root / "shards"),
    }
    expected = {name: loader(folder) for name, loader in loaders.items()}

    def trial(rng: np.random.Generator) -> str:
        name = list(loaders)[int(rng.integers(len(loaders)))]
        with tempfile.TemporaryDirectory() as temporary:
            top = name.split("/")[0]
            shutil.copytree(folder / top, Path(temporary) / top)
            path = Path(temporary) / name
            path.write_bytes(mutated(path.read_bytes(), rng))
            try:
                return "equal" if same(loaders[name](Path(temporary)), expected[name]) else "changed"
            except UserError:
                return "refused"

    return trial


def read_shards(path: Path) -> list[Any]:
    """Return names, labels and images of packed images."""
    dataset = ShardDataset(path)
    return [list(dataset.names), dataset.labels, [dataset.read(i) for i in range(len(dataset))]]


def same(one: Any, other: Any) -> bool:
    """Return True for equal nested values with arrays and tensors."""
    if isinstance(one, torch.Tensor | np.ndarray):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def small_run(out: Path) -> Run:
    """Return a run of about a second: 15 steps with evaluations, a checkpoint after each."""
    return Run(
        data=Scenes(count=44, size=32, classes=4, clutter=0),
        backbone=ViT(width=24, depth=1, heads=2, patch=8, image_size=32, drop_path=0.2),
        method=DINOConfig(out_dim=64, head_hidden=32, head_bottleneck=16, momentum=0.9),
        views=MultiCrop(global_size=32, local_size=16, local=2),
        optim=Optim(epochs=3, batch_size=8, lr=0.03, warmup_epochs=1, clip_grad=1.0),
        online_eval=OnlineEval(every_epochs=1),
        workers=0,
        log_every=1,
        save_minutes=0,
        precision="float32",
        out=str(out),
    )


def interruption_trial(folder: Path) -> Trial:
    """Return the trial that kills a run at a random moment, up to three times, and resumes it."""
    fit(small_run(folder / "whole"), resume=False)
    expected, metrics = results(folder / "whole")

    def trial(rng: np.random.Generator) -> str:
        with tempfile.TemporaryDirectory() as temporary:
            run = small_run(Path(temporary) / "run")
            for _ in range(int(rng.integers(1, 4))):
                kill_after(float(rng.uniform(0, 2.5)), lambda: fit(run, resume=can_resume(run)))
            fit(run, resume=can_resume(run))
            state, lines = results(Path(run.out))
            if not same(state, expected):
                return "weights differ"
            return "bit-equal" if lines == metrics else "metrics differ"

    return trial


def can_resume(run: Run) -> bool:
    return (Path(run.out) / "checkpoints/last.pt").is_file()


def fit(run: Run, *, resume: bool) -> None:
    for _ in train(run, Runtime(torch.device("cpu"), "float32"), run.data.open(), resume=resume):
        pass


def kill_after(seconds: float, work: Callable[[], None]) -> None:
    """Call `work` in another process, and kill it after this time if it has not ended."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end and os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (the last checkpoint and the exported weights, the metrics without times)."""
    saved = {key: value for key, value in checkpoint.load(folder / "checkpoints/last.pt").items() if key != "run"}
    times = {"time", "images_per_s", "wait"}
    metrics = [{k: v for k, v in line.items() if k not in times} for line in read_metrics(folder)]
    return saved | {"exported": list((folder / "backbone.safetensors").read_bytes())}, metrics


if __name__ == "__main__":
    main()
