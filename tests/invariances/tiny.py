"""A training run that takes about a second, in this process or in a child process that can be killed.

As a script: `tiny.py RUN.json [--kill-at STEP]` trains the Run in the file; the process kills itself
while it saves the checkpoint of STEP.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dino_ssl import checkpoint
from dino_ssl.config import edit, from_dict, to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals.online import OnlineEval
from dino_ssl.events import Event, Logged
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, start
from dino_ssl.training import train

CPU = Runtime(torch.device("cpu"), "float32")
SRC = Path(__file__).parents[2] / "src"

RUN = Run(
    data=Scenes(
        count=44, size=32, classes=4, clutter=0
    ),  # with k-NN, 40 are for training and 4 for validation; incomplete batches are dropped
    backbone=ViT(width=48, depth=2, heads=3, patch=8, image_size=32, drop_path=0.2),
    method=DINOConfig(
        out_dim=64,
        head_hidden=32,
        head_bottleneck=16,
        momentum=0.9,
        warmup_teacher_temp=0.04,
        teacher_temp=0.06,
        warmup_teacher_temp_epochs=2,
    ),
    views=MultiCrop(global_size=32, local_size=16, local=2),
    optim=Optim(epochs=3, batch_size=8, lr=0.03, warmup_epochs=1, clip_grad=1.0),
    online_eval=OnlineEval(every_epochs=0),
    workers=0,
    log_every=1,
    save_minutes=0,  # after every step
    precision="float32",
)
"""5 steps per epoch, 15 in total; drop-path, the frozen last layer, clipping and every schedule are active."""


def tiny(out: Path, **changes: Any) -> Run:
    return edit(edit(RUN, out=str(out)), **changes)


@cache
def dataset_of(data: Scenes) -> ImageDataset:
    """Return a dataset of which each image is drawn once."""
    dataset = data.open()
    dataset.read = cache(dataset.read)
    return dataset


def fit(run: Run, *, resume: bool = False, until: int | None = None, rt: Runtime = CPU) -> list[Event]:
    """Train; stop after the metrics of step `until` are logged and before its checkpoint is saved."""
    events = []
    dataset = dataset_of(run.data) if isinstance(run.data, Scenes) else run.data.open()
    for event in train(run, rt, dataset, resume=resume):
        events.append(event)
        if until is not None and isinstance(event, Logged) and event.clock.step == until:
            break
    return events


def last(run: Run) -> dict[str, Any]:
    return checkpoint.load(Path(run.out) / "checkpoints" / "last.pt")


def differences(one: Any, other: Any, where: str = "", same: Callable = torch.equal) -> list[str]:
    """Return the paths at which two states differ; tensors are compared by `same`, other values by ==."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if same(one, other) else [f"{where}: by {(one - other).abs().max().item():.3g}"]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}", same)]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{where}/{i}", same)
        ]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


def same_training(one: Run, other: Run) -> list[str]:
    """Return the differences between the last checkpoints of two runs: step, weights, center, optimizer, best."""
    a, b = dict(last(one)), dict(last(other))
    return differences({k: v for k, v in a.items() if k != "run"}, {k: v for k, v in b.items() if k != "run"})


def spawn(run: Run, *arguments: str) -> subprocess.Popen:
    """Start the run in a new process."""
    path = Path(f"{run.out}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_dict(run)))
    return spawn_script([__file__, str(path), *arguments])


def spawn_script(words: list[str], rank: int = 0, world: int = 1, port: int = 0) -> subprocess.Popen:
    """Start a script with arguments as rank `rank` of `world`, with the environment of torchrun."""
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if world > 1:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error::FutureWarning", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_on_ranks(words: list[str], world: int) -> list[str]:
    """Run a script on `world` gloo ranks and return their standard output; fail with the error of one that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [spawn_script(words, rank, world, port) for rank in range(world)]
    try:
        outputs = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    run = from_dict(Run, json.loads(Path(arguments[0]).read_text()))
    at = int(arguments[-1]) if "--kill-at" in arguments else None
    with start(run.precision) as rt:
        for event in train(run, rt, run.data.open()):
            if isinstance(event, Logged) and event.clock.step == at:
                os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
