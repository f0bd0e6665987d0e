"""Gradient accumulation and activation checkpointing do not change weights, teacher, center or metrics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU, RUN, differences

from dino_ssl.config import edit
from dino_ssl.data.batch import Batch
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.errors import UserError
from dino_ssl.methods import BYOLConfig, MoCoConfig, SupervisedConfig, SwAVConfig
from dino_ssl.models.timm import Timm
from dino_ssl.presets import benchmark_step
from dino_ssl.presets.plan import plan
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime, machine
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train, train_step

HERE = Path(__file__).parent
STILL = edit(RUN, backbone=dict(drop_path=0.0), optim=dict(algorithm="sgd", lr=1.0, warmup_epochs=0))
"""Without drop-path, which is random per micro-batch; SGD, because AdamW turns rounding errors into full steps."""

METHODS: dict[str, Any] = {
    "centering": {},
    "sinkhorn": dict(targets="sinkhorn"),
    "batch softmax": dict(targets="batch-softmax"),
    "mse": dict(loss="mse"),
    "moco": MoCoConfig(head_hidden=16, head_dim=8, queue=37, head_norm="none"),
    "byol": BYOLConfig(head_hidden=16, head_dim=8, head_norm="none"),
}


def batch(count: int = 7) -> Batch:
    seeded = torch.Generator().manual_seed(0)
    views = [torch.randint(0, 256, (2, count, 3, side, side), dtype=torch.uint8, generator=seeded) for side in (32, 16)]
    return Batch(tuple(views), torch.arange(count))


def train_three_steps(run: Run, rt: Runtime = CPU) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """(the method's state after three steps, the metrics of each step)"""
    method = build_method(run, classes=7)
    prepare_model(method, rt)
    state = State(method, run.optim.build(method.trainable), rt.scaler())
    measured = [train_step(state, method, batch(), Clock(step, 2, 3), run, rt) for step in range(3)]
    return method.state_dict(), measured


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "optimized"), [*((name, True) for name in METHODS), ("centering", False)])
def test_micro_batches_equal_the_whole_batch(name: str, optimized: bool) -> None:
    rt = Runtime(CPU.device, "float32", optimized=optimized)
    run = edit(STILL, method=METHODS[name])
    whole, expected = train_three_steps(run, rt)
    begun = build_method(run).state_dict()
    state, measured = train_three_steps(edit(run, optim=dict(micro_batch=3)), rt)  # 7 images: 3 + 2 + 2
    assert not differences(state, whole, same=close)
    assert not differences(measured, expected, same=close)
    assert len(differences(whole, begun, same=close)) > 10, "nothing was trained"


def test_forward_passes_have_at_most_micro_batch_images() -> None:
    run = edit(STILL, optim=dict(micro_batch=3))
    method, batch_sizes = build_method(run, optimized=False), []
    for network in (method.student, method.teacher):
        network.backbone.register_forward_hook(lambda _, inputs, out: batch_sizes.append(len(out)))
    state = State(method, run.optim.build(method.trainable), CPU.scaler())
    train_step(state, method, batch(), Clock(0, 2, 3), run, CPU)
    assert max(batch_sizes) == 2 * 3
    assert sum(batch_sizes) == 7 * (2 + 2 + 2), "each view of each image once"


@pytest.mark.parametrize(
    "changes",
    [
        dict(method=SwAVConfig()),
        dict(method=SupervisedConfig(mixup=0.8), views=Augment(size=32)),
        dict(method=BYOLConfig(head_hidden=16, head_dim=8)),
        dict(backbone=Timm(name="resnet18", args=(("channels", "(8, 8, 8, 16)"), ("layers", "(1, 1, 1, 1)")))),
        dict(method=dict(head_norm="batch")),
    ],
    ids=["swav", "mixup", "byol-batch-norm", "convnet", "head-batch-norm"],
)
def test_micro_batches_raise_if_images_of_a_batch_interact(changes: dict[str, Any], tmp_path: Path) -> None:
    def start() -> None:
        run = edit(edit(RUN, out=str(tmp_path), optim=dict(micro_batch=4)), **changes)
        next(train(run, CPU, run.data.open()))

    with pytest.raises(UserError, match="micro_batch"):
        start()


def test_negative_micro_batch_raises() -> None:
    with pytest.raises(UserError, match=r"`optim.micro_batch` must be at least 0; got -1"):
        edit(RUN, optim=dict(micro_batch=-1))


def test_auto_micro_batch_is_resolved_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch is the largest that fits by the counted bytes, or the whole batch."""
    monkeypatch.setattr(benchmark_step, "step_memory", lambda run, here, count, classes: 100e6 + count * 50e6)
    here = machine()
    run = edit(STILL, optim=dict(micro_batch="auto", batch_size=20))
    dataset = run.data.open()
    for gigabytes, size in ((100, 0), (0.8, 7), (0.2, 1)):
        # 0.7 * 800 MB - 100 MB fit 9 images of 50 MB: 20 images need three micro-batches of at most 7
        small = here.__class__(**{**vars(here), "memory": int(gigabytes * 1e9)})
        planned = plan(dataset, small, preset=run)
        assert planned.run.optim.micro_batch == size
        row = next(reason for reason in planned.reasons if reason.name == "micro-batch")
        assert "48 MiB" in row.reason
    together = plan(dataset, here, preset=edit(run, method=dict(head_norm="batch")))
    assert together.run.optim.micro_batch == 0


def test_step_memory_grows_with_images_and_less_with_checkpointing() -> None:
    two, four, eight = (benchmark_step.step_memory(STILL, machine(), count, 1) for count in (2, 4, 8))
    assert (eight - four) == pytest.approx(2 * (four - two), rel=0.05)
    again = edit(STILL, grad_checkpointing=True)
    assert benchmark_step.step_memory(again, machine(), 8, 1) - benchmark_step.step_memory(
        again, machine(), 4, 1
    ) < 0.5 * (eight - four)


@pytest.mark.parametrize("timm", [False, True])
def test_grad_checkpointing_does_not_change_results(timm: bool) -> None:
    """Including the random draws of drop-path."""
    args = tuple(dict(img_size="32", patch_size="8", embed_dim="48", depth="2", num_heads="3").items())
    run = (
        edit(STILL, backbone=Timm(name="vit_tiny_patch16_224", args=(*args, ("dynamic_img_size", "True"))))
        if timm
        else STILL
    )
    run = edit(run, backbone=dict(drop_path=0.3))
    calls = []

    def state(run: Run) -> Any:
        method = build_method(run, optimized=False)
        network = method.student.backbone
        blocks = network.net.blocks if timm else network.blocks
        calls.append(0)
        blocks[0].register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        optimizer = State(method, run.optim.build(method.trainable), CPU.scaler())
        torch.manual_seed(3)
        train_step(optimizer, method, batch(), Clock(0, 2, 3), run, CPU)
        return method.state_dict()

    assert not differences(state(edit(run, grad_checkpointing=True)), state(run), same=close)
    assert calls == [4, 2], "each resolution's blocks are recomputed once"
