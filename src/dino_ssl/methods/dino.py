"""DINO: self-distillation with no labels (Caron et al., 2021, Sec. 3.1, Fig. 2, Algorithm 1)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from dino_ssl import distributed
from dino_ssl.data.batch import Batch
from dino_ssl.errors import UserError, check_range
from dino_ssl.methods.method import BuildContext, Implementations, Method, MethodConfig, Outputs, relative_distance
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.heads import DINOHead, Network, Predictor
from dino_ssl.objectives import Layer, h, momentum_update, update_center
from dino_ssl.schedules import Clock, Constant, Cosine, EpochRamp, Schedule


@dataclass(frozen=True, kw_only=True)
class DINOConfig(MethodConfig):
    """The paper's method, its head, and the switches of its ablations (docs/switches.md has their figures).

    The defaults are the published code's; Sec. 3.2 names those that differ.
    """

    global_views: ClassVar[int] = 2
    about: ClassVar[str] = "self-distilled with no labels"

    out_dim: int = 65536
    """K, the number of prototypes: 65536 for ImageNet (App. C), 1024 to 4096 for thousands of pictures."""
    head_layers: int = 3
    """Linear layers of the head's MLP, before the prototypes; App. C counts those too, where there is a bottleneck."""
    head_hidden: int = 2048
    """Width of the head's hidden layers."""
    head_bottleneck: int = 256
    """Width of the l2-normalised bottleneck; 0 removes it and its norm (App. C: then 3 or 4 layers fail)."""
    head_norm: Literal["none", "batch"] = "none"
    """Norm inside the head. The paper's ViTs have none, ResNet-50 has batch norm."""
    head_act: Literal["gelu", "relu"] = "gelu"
    """Activation inside the head (App. C: GELU 69.7, ReLU 68.9)."""
    norm_last: bool = True
    """Keep the prototypes at unit length. Stabler; False gained a little for ViT-S with a long schedule."""
    predictor: bool = False
    """BYOL's predictor behind the student's head, with hidden layers as wide as the head's (Table 7: 71.8 with, 72.8
    without)."""
    teacher: Literal["momentum", "student", "previous-step", "previous-epoch"] = "momentum"
    """The student's slow average, or its copy: as it is, as it was a step ago, or an epoch ago (Fig. 6, Table 15)."""
    targets: Literal["centering", "sinkhorn", "batch-softmax", "none"] = "centering"
    """What keeps one prototype from taking everything (Table 15). With none, it does: entropy goes to 0 (Fig. 7)."""
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    """mse compares l2-normalised outputs, which no temperature sharpens (Tables 7 and 14)."""
    student_temp: float = 0.1
    """tau_s, Sec. 3.2."""
    warmup_teacher_temp: float = 0.04
    """tau_t in the first epoch."""
    teacher_temp: float = 0.04
    """tau_t after its warm-up. Lower is sharper, 0 the argmax; above 0.07 the outputs become uniform (App. D)."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs in which tau_t goes from one to the other (Sec. 3.2: 30, from 0.04 to 0.07)."""
    momentum: float = 0.996
    """Momentum of the teacher in the first step. Smaller batches and shorter runs want less (0.99)."""
    momentum_end: float = 1.0
    """Momentum of the teacher in the last step, reached by a cosine."""
    center_momentum: float = 0.9
    """m of Eq. 4. 0 to 0.99 work, 0.999 does not (App. D)."""
    sharpening: bool = True
    """Off, the teacher has the student's temperature and becomes uniform: entropy goes to ln K (Fig. 7)."""
    freeze_last_layer: float = 1
    """Epochs in which the prototypes stand still."""

    def __post_init__(self) -> None:
        check_range(self, "out_dim", prefix="method.", least=2)
        check_range(self, "head_layers", "head_hidden", prefix="method.", least=1)
        check_range(self, "head_bottleneck", prefix="method.", least=0)  # 0 leaves it out
        check_range(self, "student_temp", prefix="method.", above=0)
        check_range(self, "warmup_teacher_temp", "teacher_temp", prefix="method.", least=0)  # 0 is argmax
        check_range(self, "momentum", "momentum_end", "center_momentum", prefix="method.", least=0, most=1)
        if self.targets in ("sinkhorn", "batch-softmax"):
            _check(self.loss != "mse", f"loss mse needs targets centering or none, not {self.targets}", self.loss)
            first = self.warmup_teacher_temp if self.warmup_teacher_temp_epochs else self.teacher_temp
            warm = not self.sharpening or min(first, self.teacher_temp) > 0
            _check(warm, f"targets {self.targets} has no argmax: expected a teacher's temperature above 0", 0)

    def momentum_schedule(self) -> Schedule:
        """Sec. 3.2: a cosine over the whole run, per step."""
        return Cosine(self.momentum, self.momentum_end)

    def teacher_temp_schedule(self) -> Schedule:
        """Sec. 3.2: a ramp per epoch, then constant. Without sharpening, the student's temperature (Fig. 7)."""
        if not self.sharpening:
            return Constant(self.student_temp)
        return EpochRamp(self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs)

    @property
    def summary(self) -> str:
        return f"K {self.out_dim}"

    @property
    def num_prototypes(self) -> int | None:
        """K, unless the loss is `mse`."""
        return self.out_dim if self.loss == "cross-entropy" else None

    def for_few_steps(self) -> Self:
        """Return settings with a final momentum of at most 0.98."""
        return replace(self, momentum_end=min(self.momentum_end, 0.98))

    @property
    def supports_grad_accumulation(self) -> bool:
        return True

    def schedules(self) -> Mapping[str, Schedule]:
        momentum = {"momentum": self.momentum_schedule()} if self.teacher == "momentum" else {}
        return momentum | ({"teacher_temp": self.teacher_temp_schedule()} if self.loss == "cross-entropy" else {})

    @staticmethod
    def from_older(fields: dict[str, Any]) -> dict[str, Any]:
        """Files of before there were other targets say `centering`, yes or no."""
        if "centering" in fields:
            fields["targets"] = "centering" if fields.pop("centering") else "none"
        return fields

    def build(self, context: BuildContext) -> "DINO":
        """Student and teacher, the teacher a copy without drop-path and predictor."""
        student, teacher = context.student(), context.teacher()
        heads = self.head(student.embed_dim), self.head(teacher.embed_dim)
        predictor = Predictor(self.out_dim, hidden=self.head_hidden) if self.predictor else None
        return DINO(Network(student, heads[0], predictor), Network(teacher, heads[1]), self, context.implementations)

    def head(self, in_dim: int) -> DINOHead:
        return DINOHead(
            in_dim,
            self.out_dim,
            layers=self.head_layers,
            hidden=self.head_hidden,
            bottleneck=self.head_bottleneck or None,
            norm=self.head_norm,
            act=self.head_act,
            norm_last=self.norm_last,
        )


class Carry(NamedTuple):
    """What the center needs of a batch: the sum of the teacher's logits [K], and over how many."""

    logits: Tensor
    count: Tensor


class TeacherTargets(NamedTuple):
    """The teacher's side of a batch, or of a part of it."""

    teacher: Tensor
    """[G, B, d], what enters its last layer."""
    center: Tensor
    """[K] or [G, 1, K]; of the whole batch."""


class DINO(Method):
    """A student that learns to predict, from every view, what its own slow average says of the global views.

    student and teacher are networks of the same shape, but for a predictor that the student alone may have; the teacher
    starts as the student's copy, takes no gradients, and stays in training mode as the authors' does (it matters for
    batch norm alone).
    """

    center: Tensor

    def __init__(
        self,
        student: Network,
        teacher: Network,
        config: DINOConfig,
        implementations: Implementations = Implementations(),  # noqa: B008 - a value
    ) -> None:
        super().__init__()
        self.config, self.implementations = config, implementations
        self.student = student
        self.teacher = teacher
        self._copy_student()
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(config.out_dim))
        self._momentum = config.momentum_schedule()
        self._teacher_temp = config.teacher_temp_schedule()

    def forward(self, batch: Batch, clock: Clock, ahead: "TeacherTargets | None" = None) -> Outputs:
        """Algorithm 1, the loss: the teacher sees the two global views, the student all of them."""
        taught = ahead if ahead is not None else self.prepare_targets([batch], clock)[0]
        found = self.implementations.loss_from_bottleneck(
            _embed(self.student, batch.views),
            taught.teacher,
            _outputs_of(self.student),
            _outputs_of(self.teacher),
            center=taught.center,
            loss=self.config.loss,
            student_temp=self.config.student_temp,
            teacher_temp=self._teacher_temp(clock),
        )
        views, batch_size = taught.teacher.shape[:2]
        carry = Carry(found.logits, found.logits.new_full((), views * batch_size))
        metrics = {"loss": found.loss.detach()}
        if found.entropy is not None and found.prototype_usage is not None:
            metrics |= {
                "teacher_entropy": found.entropy,
                "kl": found.loss.detach() - found.entropy,  # Eq. 5: a teacher view is in V - 1 pairs, so means subtract
                "marginal_entropy": h(found.prototype_usage),
                "prototypes_used": found.prototype_usage,
            }
        return Outputs(found.loss, carry, metrics)

    @torch.no_grad()
    def prepare_targets(self, parts: Iterable[Batch], clock: Clock) -> list["TeacherTargets"]:
        """What the teacher makes of the global views, and the center of the whole batch, for each of its parts."""
        seen = [_embed(self.teacher, part.views[:1]) for part in parts]
        center = self._center_of(torch.cat(seen, dim=1), self._teacher_temp(clock))
        return [TeacherTargets(teacher, center) for teacher in seen]

    def _center_of(self, teacher: Tensor, temperature: float) -> Tensor:
        """What is subtracted from the teacher's logits: the running center, or the batch's own (Table 15)."""
        match self.config.targets:
            case "sinkhorn":
                return self.implementations.batch_center(teacher, _outputs_of(self.teacher), temperature, 3)
            case "batch-softmax":
                return self.implementations.batch_center(teacher, _outputs_of(self.teacher), temperature, 1)
            case "centering" | "none":  # without centering the center stays at 0
                return self.center

    def merge(self, parts: Sequence[Outputs], shares: Sequence[float]) -> Outputs:
        whole = super().merge(parts, shares)
        if "marginal_entropy" in whole.metrics:
            whole.metrics["marginal_entropy"] = h(whole.metrics["prototypes_used"])
        return whole

    def merge_carry(self, carries: Sequence[Carry]) -> Carry:
        return Carry(*(torch.stack(values).sum(0) for values in zip(*carries, strict=True)))

    def before_step(self, clock: Clock) -> None:
        """The prototypes stand still in the first epoch, or the student chases a moving random target.

        A teacher from a step ago is the student as it is now, before it moves.
        """
        if clock.step < self.config.freeze_last_layer * clock.steps_per_epoch:
            for parameter in self._last_layer.parameters():
                parameter.grad = None
        if self.config.teacher == "previous-step":
            self._copy_student()

    def after_step(self, carry: Carry, clock: Clock) -> None:
        """Algorithm 1, its last two lines: the teacher follows the student, the center follows the teacher."""
        match self.config.teacher:
            case "momentum":
                student = dict(self.student.named_parameters())
                followed = [student[name] for name, _ in self.teacher.named_parameters()]
                momentum_update(list(self.teacher.parameters()), followed, self._momentum(clock))
            case "student":
                self._copy_student()
            case "previous-epoch" if (clock.step + 1) % clock.steps_per_epoch == 0:
                self._copy_student()
        if self.config.targets == "centering":
            batch_center = distributed.all_reduce_sum(carry.logits) / distributed.all_reduce_sum(carry.count)
            self.center.copy_(update_center(self.center, batch_center, self.config.center_momentum))

    @torch.no_grad()
    def _copy_student(self) -> None:
        """The teacher becomes the student as it is, the statistics of batch norm included."""
        student = self.student.state_dict()
        self.teacher.load_state_dict({name: student[name] for name in self.teacher.state_dict()})

    def diagnostics(self) -> dict[str, Tensor]:
        return {"center_norm": self.center.norm(), "teacher_distance": relative_distance(self.teacher, self.student)}

    @property
    def backbone(self) -> Backbone:
        """The teacher's: better than the student's all along (Fig. 6)."""
        return self.teacher.backbone

    @property
    def trainable(self) -> Network:
        return self.student

    @property
    def _last_layer(self) -> nn.Module:
        return self.student.head.get_submodule("last_layer")


def _embed(network: Network, views: Sequence[Tensor]) -> Tensor:
    """One [n, B, 3, H, W] per resolution -> [sum of n, B, d]."""
    assert isinstance(network.head, DINOHead)
    return network.head.embed(network.backbone.forward_views(views)).unflatten(0, (-1, views[0].shape[1]))


def _outputs_of(network: Network) -> Layer:
    """[..., d] -> [..., K]: the last layer, and a predictor where the student has one (its batch norm wants rows)."""
    last = network.head.get_submodule("last_layer")
    predictor = network.predictor
    if predictor is None:
        return last
    return lambda x: predictor(last(x).flatten(0, -2)).unflatten(0, x.shape[:-1])


def _check(holds: bool, expected: str, came: object) -> None:
    if not holds:
        raise UserError(f"{expected}; got {came}.")
