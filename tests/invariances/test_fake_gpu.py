"""A training step on a simulated GPU: fake tensors with a device and no data.

A synchronization with the device fails, since it would need data, and so does an operation on tensors of two devices.
Kernels, gradients and times are not tested: they need a GPU.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_ssl.config import edit
from dino_ssl.data.batch import Batch
from dino_ssl.methods import BYOLConfig, MoCoConfig, SupervisedConfig, SwAVConfig
from dino_ssl.models.vit import ViT
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step

GPU = torch.device("cuda", 0)
RUN = edit(
    Run(backbone=ViT(patch=8, width=16, depth=3, heads=2, image_size=32, drop_path=0.1), precision="bfloat16"),
    method=dict(out_dim=64, head_hidden=32),
    optim=dict(batch_size=4),
    views=dict(global_size=32, local_size=16, local=2),
)
METHODS = {
    "dino": RUN.method,
    "sinkhorn": edit(RUN.method, targets="sinkhorn"),
    "mse": edit(RUN.method, loss="mse"),
    "byol": BYOLConfig(head_dim=32, head_hidden=64),
    "moco": MoCoConfig(head_dim=32, head_hidden=64, queue=64),
    "swav": SwAVConfig(head_dim=32, head_hidden=64, out_dim=32),
    "supervised": SupervisedConfig(),
}


class Transfers(TorchDispatchMode):
    """Records the shapes of tensors that are copied between devices. A CPU scalar as an operand is not a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        copied = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        devices = {x.device.type for x in inputs if x.dim() or copied} | {x.device.type for x in outputs}
        if len(devices) > 1:
            self.shapes.append(tuple(inputs[0].shape))
        return result


class RealHost(TorchDispatchMode):
    """Keeps CPU tensors real, so that random draws on the CPU have values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf == GPU):
                return func(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            return func(*args, **(kwargs or {}))


class FakeStream:
    """A CUDA stream; `log` has the copies and the waits for them."""

    log: ClassVar[list[str]] = []

    def __init__(self, device: torch.device | None = None) -> None: ...

    @contextmanager
    def use(self) -> Iterator[None]:
        FakeStream.log.append("copy")
        yield

    def wait_stream(self, other: "FakeStream") -> None:
        assert other is not self
        FakeStream.log.append("wait")


COMPUTING = FakeStream()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Allow tensors on a GPU. Gradients are set by `step`, because autograd's engine needs a real GPU."""

    def to(self: nn.Module, device: torch.device, **_: Any) -> nn.Module:
        for part in self.modules():
            for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                moved = value.detach().to(device)
                if isinstance(value, nn.Parameter):
                    part._parameters[name] = nn.Parameter(moved, requires_grad=value.requires_grad)
                else:
                    part._buffers[name] = moved
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: COMPUTING)
    monkeypatch.setattr(torch.cuda, "stream", FakeStream.use)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, RealHost():
        yield mode


def on_gpu(run: Run, mode: FakeTensorMode) -> tuple[Runtime, State, nn.Module, Batch]:
    rt = Runtime(GPU, run.precision)
    method = build_method(run, classes=3)
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    model = prepare_model(method, rt)
    assert {x.device for x in method.state_dict().values()} == {GPU}
    state = State(method, run.optim.build(method.trainable), torch.amp.GradScaler("cpu", enabled=False))
    views = tuple(torch.zeros(n, 4, 3, side, side, dtype=torch.uint8) for n, side in run.views.view_shapes)
    return rt, state, model, Batch(views, torch.zeros(4, dtype=torch.int64))


def step_on_gpu(rt: Runtime, state: State, model: nn.Module, batch: Batch, run: Run, step: int) -> dict[str, Tensor]:
    for parameter in state.method.trainable.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rt.seed_step(0, step)
    return train_step(state, model, batch, Clock(step, 10, run.optim.epochs), run, rt)


@pytest.mark.parametrize("name", METHODS)
def test_step_does_not_synchronize_and_copies_only_the_batch(name: str, gpu: FakeTensorMode) -> None:
    run = edit(RUN, method=METHODS[name])
    training = on_gpu(run, gpu)
    FakeStream.log.clear()
    for step in (100, 101):
        with Transfers() as transfers:
            metrics = step_on_gpu(*training, run, step)
        assert {value.device for value in metrics.values()} == {GPU}
    assert FakeStream.log == 6 * ["copy", "wait"]  # views, local views, labels; two steps
    batch = training[-1]  # constants are copied in the first step
    copied = [tuple(x.shape) for x in (*batch.views, batch.labels) if x is not None]
    assert transfers.shapes[: len(copied)] == copied
    rows = transfers.shapes[len(copied) :]  # rows that drop-path keeps, in both branches of the second block
    assert len(rows) in (0, 2)
    assert all(len(shape) == 1 for shape in rows)


def test_micro_batches_copy_only_the_batch(gpu: FakeTensorMode) -> None:
    run = edit(RUN, optim=dict(micro_batch=2))
    training = on_gpu(run, gpu)
    step_on_gpu(*training, run, 100)
    with Transfers() as transfers:
        step_on_gpu(*training, run, 101)
    globals_, locals_ = (2, 2, 3, 32, 32), (2, 2, 3, 16, 16)
    copied = [shape for shape in transfers.shapes if len(shape) > 1 or shape == (2,)]
    assert copied == [globals_, globals_, *2 * [globals_, locals_, (2,)]]  # prepare_targets first


def test_synchronizations_and_transfers_are_detected(gpu: FakeTensorMode) -> None:
    """`item()`, and an operation on tensors of two devices."""
    loss = torch.zeros(3, device=GPU)
    with pytest.raises(DataDependentOutputException):
        loss.sum().item()
    with pytest.raises(RuntimeError, match="device"):
        _ = loss + torch.zeros(3)
    with Transfers() as transfers:
        torch.ones(3).to(GPU)
        torch.ones(()).to(GPU)
    assert transfers.shapes == [(3,), ()]
