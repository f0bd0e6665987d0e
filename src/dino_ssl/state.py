"""The state of a training run and its checkpoints."""

import math
import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_ssl import checkpoint, distributed, kernels
from dino_ssl.config import to_dict
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.errors import UserError
from dino_ssl.files import link_or_copy
from dino_ssl.methods.method import BuildContext, Implementations, Method
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import EXPORTS, Weights, load
from dino_ssl.models.sync_bn import convert_sync_batchnorm, has_batch_norm
from dino_ssl.models.weights import load_strict, save_backbone
from dino_ssl.run import Run
from dino_ssl.runtime import Runtime

MAX_WEIGHT = 1e8
"""Magnitude of a weight or buffer from which on training has diverged; those of trained networks are below 1e5."""


def is_good_loss(loss: float | None, prototypes: int | None) -> bool:
    """Return True for a finite loss below 1.1 ln K; a uniform prediction has ln K. prototypes: K; None: any finite."""
    return loss is not None and math.isfinite(loss) and (prototypes is None or loss < 1.1 * math.log(prototypes))


def largest_weight(weights: Mapping[str, Tensor]) -> float:
    """Return the largest magnitude of the floating point values, nan if one is nan; synchronizes once."""
    values = [value.abs().max().float() for value in weights.values() if value.is_floating_point() and value.numel()]
    return torch.stack(values).max().item() if values else 0.0


@dataclass
class State:
    """Everything that changes during training; with the Run, all that a checkpoint needs."""

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    """Optimizer steps taken."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best online evaluation: `name`, `value`, `epoch`; empty before the first."""

    @property
    def is_usable(self) -> bool:
        """True if all weights are finite and in a usable range; one step can ruin them after a finite loss."""
        return largest_weight(self.method.state_dict()) <= MAX_WEIGHT

    def save(self, path: Path, run: Run, fingerprint: str) -> None:
        """Write a checkpoint atomically. fingerprint: of the training set, compared on resume."""
        content = dict(
            format=checkpoint.FORMAT,
            run=to_dict(run),
            preprocessing=to_dict(run.preprocessing),
            step=self.step,
            method=self.method.state_dict(),
            backbone=next(f"{name}." for name, part in self.method.named_modules() if part is self.method.backbone),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            best=self.best,
            data=fingerprint,
        )
        checkpoint.save(path, content)

    def restore(self, path: Path, dataset: ImageDataset) -> None:
        """Load a checkpoint. Raises UserError if its training set is not `dataset`, or if training had diverged."""
        saved = checkpoint.load(path)
        if saved["data"] != dataset.fingerprint:
            raise UserError(
                f"{path} was trained on a different dataset: its files differ from the given {len(dataset)} images. "
                "Resume with the same data, or start a new run with a different `out`."
            )
        if not (largest := largest_weight(saved["method"])) <= MAX_WEIGHT:
            raise UserError(
                f"{path} has weights of {largest:.2g}: training had diverged.{checkpoint.other_checkpoints(path)}"
            )
        load_strict(self.method, saved["method"], str(path))
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is damaged: its optimizer state cannot be loaded ({reason}).") from error
        self.step, self.best = saved["step"], saved["best"]


@dataclass
class LastCheckpoint:
    """checkpoints/last.pt of a run, on rank 0: it is good once a good loss was computed from its weights.

    Until then, the one before is kept as previous.pt, and replaces it if training diverges.
    """

    folder: Path
    prototypes: int | None
    """K, None for a method without."""
    resumes: InitVar[bool] = False

    def __post_init__(self, resumes: bool) -> None:
        self.path, self.previous = self.folder / "last.pt", self.folder / "previous.pt"
        if not resumes and distributed.is_rank0():
            self.previous.unlink(missing_ok=True)
        self.is_good = resumes and not self.previous.is_file()

    def save(self, state: State, run: Run, fingerprint: str) -> None:
        """Write the state."""
        if self.is_good and self.path.is_file():
            link_or_copy(self.path, self.previous)
        state.save(self.path, run, fingerprint)
        self.is_good = False

    def confirm(self, loss: float) -> None:
        """Record a loss that was computed after the newest checkpoint."""
        if is_good_loss(loss, self.prototypes):
            self.is_good = True
            self.previous.unlink(missing_ok=True)

    def restore_good(self) -> bool:
        """Make the last good checkpoint last.pt; return False if there is none."""
        if not self.is_good and self.previous.is_file():
            os.replace(self.previous, self.path)
            self.is_good = True
        return self.is_good and self.path.is_file()


def build_method(
    run: Run, *, classes: int = 0, weights: Mapping[str, Tensor] | None = None, optimized: bool = True
) -> Method:
    """Return the method of a run with initial weights, on the CPU; the same for the same seed.

    classes: number of classes of the labels. weights: of the backbone that `run.init` names. optimized: use the
    optimized kernels. Raises UserError if micro-batches would change the statistics of batch norm.
    """
    implementations = Implementations(**kernels.optimized()) if optimized else Implementations()
    torch.manual_seed(run.seed)
    method = run.method.build(BuildContext(run.backbone, run.seed, classes, weights, run.init or "", implementations))
    for part in method.trainable.modules():
        if isinstance(part, Backbone):
            part.set_grad_checkpointing(run.grad_checkpointing)
    if run.optim.micro_batch and has_batch_norm(method):
        raise UserError(
            f"`optim.micro_batch` is {run.optim.micro_batch}, but the network or its head has batch norm, whose "
            "statistics would be those of a micro-batch. Set it to 0 and lower `optim.batch_size` or set "
            "`grad_checkpointing`; a ViT works with `method.head_norm` none and `backbone.stem` patch."
        )
    return method


def prepare_model(method: Method, rt: Runtime) -> nn.Module:
    """Return the module that a training step calls: the method on its device, shared by all ranks.

    The method stays the owner of parameters and state. Batch norms are converted to use the batch of all ranks.
    """
    if rt.world_size > 1:
        convert_sync_batchnorm(method, fused=rt.device.type == "cuda")
    return rt.distribute(method)


def init_state(run: Run, rt: Runtime, classes: int, *, resume: bool) -> State:
    """Return the state at step 0. A resumed run needs no initial weights: its checkpoint replaces them."""
    source, weights = run.init, None
    if source is not None and not resume:
        weights = distributed.run_on_rank0(lambda: load(source).state_dict())
    method = build_method(run, classes=classes, weights=weights, optimized=rt.optimized).to(rt.device)
    return State(method, run.optim.build(method.trainable), rt.scaler())


def export_backbone(run: Run, backbone: Backbone, weights: Weights) -> Path:
    """Write the backbone (DINO: the teacher's) as safetensors, as `dino_ssl.load` and timm read it."""
    path = Path(run.out) / EXPORTS[weights]
    return save_backbone(run.backbone, backbone.state_dict(), path, run.preprocessing)
