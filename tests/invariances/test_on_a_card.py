"""A step as a card would take it, watched where there is none: tensors without numbers, which know their device.

What asks the device for a number fails here, since there is none, and so does what mixes devices. Kernels, gradients
and times are not seen: those take a card.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from dino_ssl.fast.views import WIDTH
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
from dino_ssl.data.loader import BatchSpec
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.kernels import held
from dino_ssl.methods import BYOLConfig, MoCoConfig, SupervisedConfig, SwAVConfig
from dino_ssl.models.vit import ViT
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step

CARD = torch.device("cuda", 0)
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


class Crossings(TorchDispatchMode):
    """The shapes of what goes from one device to another. A kernel takes a number of the host as it is; to copy it
    there is a crossing."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        came = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        copied = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if len({one.device.type for one in given if one.dim() or copied} | {one.device.type for one in came}) > 1:
            self.shapes.append(tuple(given[0].shape))
        return made


class RealHost(TorchDispatchMode):
    """What is on the host has numbers: chance is drawn there, and what it says is known."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf == CARD):
                return func(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            return func(*args, **(kwargs or {}))


class FakeStream:
    """Work on a card, in order; `log` has the copies and who waits for them."""

    log: ClassVar[list[str]] = []

    def __init__(self, device: torch.device | None = None) -> None: ...

    @contextmanager
    def at_work(self) -> Iterator[None]:
        FakeStream.log.append("copy")
        yield

    def wait_stream(self, other: "FakeStream") -> None:
        assert other is not self
        FakeStream.log.append("wait")


COMPUTING = FakeStream()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Tensors may be on a card inside. Gradients are filled in: autograd's engine wants a real card."""

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
    monkeypatch.setattr(torch.cuda, "stream", FakeStream.at_work)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, RealHost():
        yield mode


def on_the_card(run: Run, mode: FakeTensorMode) -> tuple[Runtime, State, nn.Module, Batch]:
    rt = Runtime(CARD, run.precision)
    method = build_method(run, classes=3)
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    model = prepare_model(method, rt)
    assert {one.device for one in method.state_dict().values()} == {CARD}
    state = State(method, run.optim.build(method.trainable), torch.amp.GradScaler("cpu", enabled=False))
    views = tuple(torch.zeros(n, 4, 3, side, side, dtype=torch.uint8) for n, side in run.views.view_shapes)
    return rt, state, model, Batch(views, torch.zeros(4, dtype=torch.int64))


def take(rt: Runtime, state: State, model: nn.Module, batch: Batch, run: Run, step: int) -> dict[str, Tensor]:
    for one in state.method.trainable.parameters():
        one.grad = torch.zeros_like(one)
    rt.seed_step(0, step)
    return train_step(state, model, batch, Clock(step, 10, run.optim.epochs), run, rt)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing_and_sends_the_batch_alone(name: str, card: FakeTensorMode) -> None:
    run = edit(RUN, method=METHODS[name])
    there = on_the_card(run, card)
    FakeStream.log.clear()
    for step in (100, 101):
        with Crossings() as crossings:
            metrics = take(*there, run, step)
        assert {value.device for value in metrics.values()} == {CARD}
    assert FakeStream.log == 6 * ["copy", "wait"]  # views, local views, labels; two steps
    batch = there[-1]  # in the first step what is kept on the card goes there, too
    sent = [tuple(one.shape) for one in (*batch.views, batch.labels) if one is not None]
    assert crossings.shapes[: len(sent)] == sent
    rows = crossings.shapes[len(sent) :]  # which tokens drop-path keeps, in both branches of the second block
    assert len(rows) in (0, 2)
    assert all(len(shape) == 1 for shape in rows)


def test_parts_of_a_batch_go_alone_too(card: FakeTensorMode) -> None:
    run = edit(RUN, optim=dict(micro_batch=2))
    there = on_the_card(run, card)
    take(*there, run, 100)
    with Crossings() as crossings:
        take(*there, run, 101)
    globals_, locals_ = (2, 2, 3, 32, 32), (2, 2, 3, 16, 16)
    sent = [shape for shape in crossings.shapes if len(shape) > 1 or shape == (2,)]
    assert sent == [globals_, globals_, *2 * [globals_, locals_, (2,)]]  # the teacher looks ahead


def test_views_of_pictures_that_stay_there(card: FakeTensorMode) -> None:
    """The card is sent which pictures, what chance decided of each view, and which views a step is for."""
    views = MultiCrop(global_size=32, local_size=16, local=2)
    draws = held.Draws(np.full((8, 2), 40), {}, {}, views, 0)
    drawn = draws(BatchSpec(0, 0, np.arange(8), np.zeros(8, np.int64)))
    pixels = torch.zeros(8, 3, 40, 40, dtype=torch.uint8, device=CARD)
    with Crossings() as crossings:
        made = held.make_views(pixels, drawn.used, drawn.draws, views)
    assert [(one.device, tuple(one.shape)) for one in made] == [(CARD, (n, 8, 3, s, s)) for n, s in views.view_shapes]
    assert crossings.shapes.count((16, WIDTH)) == 2
    assert all(len(shape) == 1 for shape in crossings.shapes if shape != (16, WIDTH))


def test_it_would_be_seen(card: FakeTensorMode) -> None:
    """A number that is asked for, and a tensor that is made elsewhere."""
    loss = torch.zeros(3, device=CARD)
    with pytest.raises(DataDependentOutputException):
        loss.sum().item()
    with pytest.raises(RuntimeError, match="device"):
        _ = loss + torch.zeros(3)
    with Crossings() as crossings:
        torch.ones(3).to(CARD)
        torch.ones(()).to(CARD)
    assert crossings.shapes == [(3,), ()]
