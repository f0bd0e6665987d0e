"""DINO: self-distillation with no labels (Caron et al., 2021, Sec. 3.1, Fig. 2, Algorithm 1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dino import dist
from dino.data.views import Batch
from dino.errors import UserError
from dino.methods.method import Method, MethodConfig, Outputs, Start
from dino.models.backbone import Backbone
from dino.models.heads import DINOHead, Network
from dino.objectives import P, dino_loss, h, momentum_update, update_center
from dino.schedules import Clock, Constant, Cosine, EpochRamp, Schedule


@dataclass(frozen=True, kw_only=True)
class DINOConfig(MethodConfig):
    """The paper's method and its head. The defaults are the published code's; Sec. 3.2 names those that differ."""

    global_views: ClassVar[int] = 2
    about: ClassVar[str] = "self-distilled with no labels"

    out_dim: int = 65536
    """K, the number of prototypes: 65536 for ImageNet (App. C), 1024 to 4096 for thousands of pictures."""
    head_layers: int = 3
    """Linear layers of the head's MLP, before the prototypes (App. C)."""
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
    student_temp: float = 0.1
    """tau_s, Sec. 3.2."""
    warmup_teacher_temp: float = 0.04
    """tau_t in the first epoch."""
    teacher_temp: float = 0.04
    """tau_t after its warm-up. Lower is sharper; above 0.07 the outputs become uniform (App. D)."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs in which tau_t goes from one to the other (Sec. 3.2: 30, from 0.04 to 0.07)."""
    momentum: float = 0.996
    """Momentum of the teacher in the first step. Smaller batches and shorter runs want less (0.99)."""
    momentum_end: float = 1.0
    """Momentum of the teacher in the last step, reached by a cosine."""
    center_momentum: float = 0.9
    """m of Eq. 4. 0 to 0.99 work, 0.999 does not (App. D)."""
    centering: bool = True
    """Off, one prototype takes everything: teacher entropy goes to 0 (Fig. 7)."""
    sharpening: bool = True
    """Off, the teacher has the student's temperature and becomes uniform: entropy goes to ln K (Fig. 7)."""
    freeze_last_layer: float = 1
    """Epochs in which the prototypes stand still."""

    def __post_init__(self) -> None:
        _check(self.out_dim >= 2, "out_dim must be at least 2", self.out_dim)
        _check(self.head_layers >= 1, "head_layers must be at least 1", self.head_layers)
        _check(self.student_temp > 0, "student_temp must be above 0", self.student_temp)
        for name in ("warmup_teacher_temp", "teacher_temp"):
            _check(getattr(self, name) >= 0, f"{name} must be 0 (argmax) or more", getattr(self, name))
        for name in ("momentum", "momentum_end", "center_momentum"):
            _check(0 <= getattr(self, name) <= 1, f"{name} must lie in 0 .. 1", getattr(self, name))

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

    def schedules(self) -> Mapping[str, Schedule]:
        return {"momentum": self.momentum_schedule(), "teacher_temp": self.teacher_temp_schedule()}

    def build(self, start: Start) -> "DINO":
        """Student and teacher, the teacher a copy without drop-path."""
        student, teacher = start.backbone(), start.backbone(drop_path=0.0)
        return DINO(
            Network(student, self.head(student.embed_dim)), Network(teacher, self.head(teacher.embed_dim)), self
        )

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


class DINO(Method):
    """A student that learns to predict, from every view, what its own slow average says of the global views.

    student and teacher are networks of the same shape; the teacher starts as the student's copy, takes no
    gradients, and stays in training mode as the authors' does (it matters for batch norm alone).
    """

    center: Tensor

    def __init__(self, student: Network, teacher: Network, config: DINOConfig) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.teacher = teacher
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(config.out_dim))
        self._momentum = config.momentum_schedule()
        self._teacher_temp = config.teacher_temp_schedule()

    def forward(self, batch: Batch, clock: Clock) -> Outputs:
        """Algorithm 1, the loss: the teacher sees the two global views, the student all of them."""
        temperature = self._teacher_temp(clock)
        with torch.no_grad():
            teacher = self.teacher(batch.views[:1])  # [G, B, K]
        student = self.student(batch.views)  # [V, B, K]
        loss = dino_loss(
            student,
            teacher,
            center=self.center,
            student_temp=self.config.student_temp,
            teacher_temp=temperature,
        )
        with torch.no_grad():
            targets = P(teacher, temperature, self.center)
            entropy = h(targets).mean()
            metrics = {
                "loss": loss.detach(),
                "teacher_entropy": entropy,
                "kl": loss.detach() - entropy,  # Eq. 5: every teacher view is in V - 1 pairs, so means subtract
                "marginal_entropy": h(targets.mean((0, 1))),
            }
            carry = Carry(teacher.float().sum((0, 1)), torch.full((), teacher.shape[0] * teacher.shape[1]))
        return Outputs(loss, carry, metrics)

    def before_step(self, clock: Clock) -> None:
        """The prototypes stand still in the first epoch, or the student chases a moving random target."""
        if clock.step < self.config.freeze_last_layer * clock.steps_per_epoch:
            for parameter in self._last_layer.parameters():
                parameter.grad = None

    def after_step(self, carry: Carry, clock: Clock) -> None:
        """Algorithm 1, its last two lines: the teacher follows the student, the center follows the teacher."""
        momentum_update(list(self.teacher.parameters()), list(self.student.parameters()), self._momentum(clock))
        if self.config.centering:
            count = dist.total(carry.count.to(carry.logits))
            batch_center = dist.total(carry.logits) / count
            self.center.copy_(update_center(self.center, batch_center, self.config.center_momentum))

    @property
    def backbone(self) -> Backbone:
        """The teacher's: better than the student's all along (Fig. 6)."""
        return self.teacher.backbone

    @property
    def trained(self) -> Network:
        return self.student

    @property
    def prototypes(self) -> int:
        return self.config.out_dim

    @property
    def _last_layer(self) -> nn.Module:
        return self.student.head.get_submodule("last_layer")


def _check(holds: bool, expected: str, came: object) -> None:
    if not holds:
        raise UserError(f"{expected}; got {came}.")
