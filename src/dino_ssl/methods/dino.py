"""DINO: self-distillation with no labels (Caron et al., 2021, Sec. 3.1, Fig. 2, Algorithm 1)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from dino_ssl import distributed
from dino_ssl.data.batch import Batch
from dino_ssl.errors import UserError, check_range
from dino_ssl.methods.method import BuildContext, Implementations, Outputs
from dino_ssl.methods.teacher_student import TeacherStudent, TeacherStudentConfig
from dino_ssl.models.heads import DINOHead, Network
from dino_ssl.objectives import h, update_center
from dino_ssl.schedules import Clock, EpochRamp, Schedule


@dataclass(frozen=True, kw_only=True)
class DINOConfig(TeacherStudentConfig):
    """DINO, its head, and the options that its ablations vary (results in docs/switches.md).

    The defaults are those of the published code; docstrings give the values of Sec. 3.2 where they differ.
    """

    global_views: ClassVar[int] = 2

    out_dim: int = 65536
    """K, the number of prototypes: 65536 for ImageNet (App. C), 1024 to 4096 for thousands of images."""
    head_layers: int = 3
    """Linear layers of the head's MLP, without the prototypes. With a bottleneck, App. C counts one more."""
    head_hidden: int = 2048
    """Width of the hidden layers of head and predictor."""
    head_bottleneck: int = 256
    """Width of the l2-normalized bottleneck; 0 removes it and its normalization (App. C: 3 or 4 layers then fail)."""
    head_norm: Literal["none", "batch"] = "none"
    """Normalization layers in the head. None for the paper's ViTs, batch norm for ResNet-50."""
    head_act: Literal["gelu", "relu"] = "gelu"
    """Activation in the head (App. C: GELU 69.7, ReLU 68.9)."""
    norm_last: bool = True
    """Keep the prototypes l2-normalized, which is more stable; False was slightly better for ViT-S in long runs."""
    predictor: bool = False
    """Add BYOL's predictor to the student, before the l2 normalization (Table 7: 71.8 with, 72.8 without)."""
    teacher: Literal["momentum", "student", "previous-step", "previous-epoch"] = "momentum"
    """The EMA of the student, or a copy of it: the current one, of the last step, or of the last epoch (Fig. 6)."""
    targets: Literal["centering", "sinkhorn", "batch-softmax", "none"] = "centering"
    """Method against collapse to one prototype (Table 15). With none, the entropy goes to 0 (Fig. 7)."""
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    """mse compares l2-normalized outputs without temperatures (Tables 7 and 14)."""
    student_temp: float = 0.1
    """Temperature of the student, tau_s (Sec. 3.2)."""
    warmup_teacher_temp: float = 0.04
    """Temperature of the teacher, tau_t, in the first epoch."""
    teacher_temp: float = 0.04
    """tau_t after its warm-up. Lower is sharper, 0 is argmax; above 0.07 the outputs become uniform (App. D)."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of the warm-up of the teacher temperature (Sec. 3.2: 30, from 0.04 to 0.07)."""
    center_momentum: float = 0.9
    """Momentum m of the center (Eq. 4). 0 to 0.99 work, 0.999 does not (App. D)."""
    sharpening: bool = True
    """False gives the teacher the student's temperature; its outputs become uniform, entropy ln K (Fig. 7)."""
    freeze_last_layer: float = 1
    """Number of epochs at the start in which the prototypes are frozen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "out_dim", prefix="method.", least=2)
        check_range(self, "head_layers", "head_hidden", prefix="method.", least=1)
        check_range(self, "head_bottleneck", "warmup_teacher_temp", "teacher_temp", prefix="method.", least=0)
        check_range(self, "student_temp", prefix="method.", above=0)
        check_range(self, "center_momentum", prefix="method.", least=0, most=1)
        if self.targets in ("sinkhorn", "batch-softmax"):
            if self.loss == "mse":
                raise UserError(f"`method.loss` mse needs `method.targets` centering or none; got {self.targets}.")
            first = self.warmup_teacher_temp if self.warmup_teacher_temp_epochs else self.teacher_temp
            if self.sharpening and min(first, self.teacher_temp) == 0:
                raise UserError(f"`method.targets` {self.targets} needs a teacher temperature above 0; got 0 (argmax).")

    def teacher_temp_schedule(self) -> Schedule:
        """Sec. 3.2: a ramp per epoch, then constant. Without sharpening, the student's temperature (Fig. 7)."""
        if not self.sharpening:
            return EpochRamp(self.student_temp, self.student_temp, 0)
        return EpochRamp(self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs)

    def schedules(self) -> dict[str, Schedule]:
        """Return the schedules of momentum and teacher temperature, if they have an effect."""
        momentum = super().schedules() if self.teacher == "momentum" else {}
        return momentum | ({"teacher_temp": self.teacher_temp_schedule()} if self.loss == "cross-entropy" else {})

    @property
    def num_prototypes(self) -> int | None:
        """K, unless the loss is `mse`."""
        return self.out_dim if self.loss == "cross-entropy" else None

    def build(self, context: BuildContext) -> "DINO":
        """Return student and teacher; the teacher has neither drop-path nor predictor."""
        student, teacher = context.build_backbones()
        mlp = partial(DINOHead, student.embed_dim, self.out_dim, layers=self.head_layers, hidden=self.head_hidden)
        head = partial(mlp, bottleneck=self.head_bottleneck, norm=self.head_norm, act=self.head_act)
        heads = [head(norm_last=self.norm_last, predictor=predictor) for predictor in (self.predictor, False)]
        return DINO(Network(student, heads[0]), Network(teacher, heads[1]), self, context.implementations)


class Carry(NamedTuple):
    """The part of a batch that the center needs: the sum of the teacher's logits [K], and their number."""

    logits: Tensor
    count: Tensor


class TeacherTargets(NamedTuple):
    """The inputs of the teacher's last layer, [G, B, d], and the center of the whole batch, [K] or [G, 1, K]."""

    bottleneck: Tensor
    center: Tensor


class DINO(TeacherStudent):
    """A student that learns to predict, from each view, the teacher's output for the global views."""

    center: Tensor

    def __init__(
        self,
        student: Network,
        teacher: Network,
        config: DINOConfig,
        implementations: Implementations = Implementations(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__(student, teacher, config)
        self.config, self.implementations = config, implementations
        self.register_buffer("center", torch.zeros(config.out_dim))
        self._teacher_temp = config.teacher_temp_schedule()

    def forward(self, batch: Batch, clock: Clock, targets: TeacherTargets | None = None) -> Outputs:
        """Algorithm 1, the loss: the teacher encodes the two global views, the student all views."""
        targets = targets or self.prepare_targets([batch], clock)[0]
        terms = self.implementations.loss_from_bottleneck(
            _bottleneck(self.student, batch.views),
            targets.bottleneck,
            _last_layer(self.student),
            _last_layer(self.teacher),
            center=targets.center,
            loss=self.config.loss,
            student_temp=self.config.student_temp,
            teacher_temp=self._teacher_temp(clock),
        )
        views, batch_size = targets.bottleneck.shape[:2]
        carry = Carry(terms.logits, terms.logits.new_full((), views * batch_size))
        metrics = {"loss": terms.loss.detach()}
        if terms.entropy is not None and terms.prototype_usage is not None:
            metrics |= {
                "teacher_entropy": terms.entropy,
                "kl": terms.loss.detach() - terms.entropy,  # Eq. 5; each teacher view is in V - 1 pairs
                "marginal_entropy": h(terms.prototype_usage),
                "prototypes_used": terms.prototype_usage,
            }
        return Outputs(terms.loss, carry, metrics)

    @record_function("teacher forward")
    @torch.no_grad()
    def prepare_targets(self, micro_batches: Iterable[Batch], clock: Clock) -> list[TeacherTargets]:
        """Return the teacher's outputs for the global views of each micro-batch, and the center of the whole batch.

        The center is the running one, or for Table 15's alternatives that of the batch: Sinkhorn-Knopp and the softmax
        over the batch are equivalent to a center per prototype, computed in 3 iterations and in 1 iteration.
        """
        outputs, center = [_bottleneck(self.teacher, batch.views[:1]) for batch in micro_batches], self.center
        if self.config.targets in ("sinkhorn", "batch-softmax"):
            iterations = 3 if self.config.targets == "sinkhorn" else 1
            whole, last_layer = torch.cat(outputs, dim=1), _last_layer(self.teacher)
            center = self.implementations.batch_center(whole, last_layer, self._teacher_temp(clock), iterations)
        return [TeacherTargets(output, center) for output in outputs]

    def merge(self, outputs: Sequence[Outputs], weights: Sequence[float]) -> Outputs:
        """Return the outputs of the whole batch; the marginal entropy is that of the merged prototype usage."""
        merged = super().merge(outputs, weights)
        if "marginal_entropy" in merged.metrics:
            merged.metrics["marginal_entropy"] = h(merged.metrics["prototypes_used"])
        return merged

    def merge_carry(self, carries: Sequence[Carry]) -> Carry:
        """Add the logits and the counts of the micro-batches."""
        return Carry(*(torch.stack(values).sum(0) for values in zip(*carries, strict=True)))

    def before_step(self, clock: Clock) -> None:
        """Freeze the prototypes in the first epoch, in which the teacher's outputs are random and change quickly.

        A teacher of the previous step is a copy of the student before the optimizer step.
        """
        if clock.step < self.config.freeze_last_layer * clock.steps_per_epoch:
            for parameter in _last_layer(self.student).parameters():
                parameter.grad = None
        if self.config.teacher == "previous-step":
            self.copy_student()

    def after_step(self, carry: Carry, clock: Clock) -> None:
        """Algorithm 1, its last two lines: update the teacher and the center."""
        match self.config.teacher:
            case "momentum":
                super().after_step(carry, clock)
            case "student":
                self.copy_student()
            case "previous-epoch" if (clock.step + 1) % clock.steps_per_epoch == 0:
                self.copy_student()
        if self.config.targets == "centering":
            batch_mean = distributed.all_reduce_sum(carry.logits) / distributed.all_reduce_sum(carry.count)
            self.center.copy_(update_center(self.center, batch_mean, self.config.center_momentum))

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the norm of the center and the relative distance between teacher and student."""
        return {"center_norm": self.center.norm(), **super().diagnostics()}


def _bottleneck(network: Network, views: Sequence[Tensor]) -> Tensor:
    """Return the inputs of the last layer, one [n, B, 3, H, W] per resolution -> [sum of n, B, d]."""
    assert isinstance(network.head, DINOHead)
    return network.head.embed(network.backbone.forward_views(views)).unflatten(0, (-1, views[0].shape[1]))


def _last_layer(network: Network) -> nn.Module:
    """Return the last layer, [..., d] -> [..., K]."""
    return network.head.get_submodule("last_layer")
