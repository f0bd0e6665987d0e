"""A training run that takes about a second, in this process or in child processes."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dino_ssl import checkpoint
from dino_ssl.config import edit
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.evals.online import OnlineEval
from dino_ssl.events import Event, Logged
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.training import train

CPU = Runtime(torch.device("cpu"), "float32")
FORK = multiprocessing.get_context("fork")
"""A fork has imported torch already, which takes a new process seconds."""

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


def killed_at(run: Run, step: int) -> int | None:
    """Train in a process that is killed while it saves the checkpoint of `step`; return its exit code."""

    def train_until() -> None:
        for event in train(run, CPU, dataset_of(run.data)):  # pyright: ignore[reportArgumentType]
            if isinstance(event, Logged) and event.clock.step == step:
                os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=train_until)
    process.start()
    process.join(timeout=120)
    return process.exitcode


def run_on_ranks(work: Callable[[], None], folder: Path, ranks: int = 2) -> list[str]:
    """Call `work` in gloo ranks with the environment of torchrun, and return the output of each.

    The outputs are files in `folder`. Raises AssertionError with the output of a rank that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"output-{rank}.txt" for rank in range(ranks)]

    def start(rank: int) -> None:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "GLOO_SOCKET_IFNAME": "lo"}
        with outputs[rank].open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        work()

    processes = [FORK.Process(target=start, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=600)
    finally:
        for process in processes:
            process.kill()
    texts = [output.read_text() for output in outputs]
    for process, text in zip(processes, texts, strict=True):
        assert process.exitcode == 0, text
    return texts
