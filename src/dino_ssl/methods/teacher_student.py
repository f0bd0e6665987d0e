"""Base class of DINO, BYOL and MoCo: a student, and a teacher that is its EMA (Sec. 3.1)."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from dino_ssl.errors import check_range
from dino_ssl.methods.method import Method, MethodConfig
from dino_ssl.models import Backbone, Network
from dino_ssl.objectives import momentum_update
from dino_ssl.schedules import Clock, Cosine, Schedule


@dataclass(frozen=True, kw_only=True)
class TeacherStudentConfig(MethodConfig):
    """Settings of the teacher's EMA."""

    momentum: float = 0.996
    """Initial momentum of the teacher. Smaller batches and shorter runs need a lower one (0.99)."""
    momentum_end: float = 1.0
    """Final momentum of the teacher, reached by a cosine schedule."""

    def __post_init__(self) -> None:
        check_range(self, "momentum", "momentum_end", prefix="method.", least=0, most=1)

    def momentum_schedule(self) -> Schedule:
        """Sec. 3.1: a cosine over the whole run, per step."""
        return Cosine(self.momentum, self.momentum_end)

    def for_few_steps(self) -> Self:
        """Return settings with a final momentum of at most 0.98, but not below the initial one."""
        return replace(self, momentum_end=max(self.momentum, min(self.momentum_end, 0.98)))

    def schedules(self) -> dict[str, Schedule]:
        """Return the momentum schedule."""
        return {"momentum": self.momentum_schedule()}

    @property
    def supports_grad_accumulation(self) -> bool:
        """True: the losses are means over images."""
        return True


class TeacherStudent(Method):
    """A student with gradients and a teacher without, of the same shape except for a predictor of the student.

    The teacher starts as a copy of the student. It stays in training mode as the authors' does, which matters for batch
    norm only, and is the network that is evaluated: it is better than the student during training (Fig. 6).
    """

    def __init__(self, student: Network, teacher: Network, config: TeacherStudentConfig) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.copy_student()
        self.teacher.requires_grad_(False)
        self._momentum = config.momentum_schedule()

    @torch.no_grad()
    def copy_student(self) -> None:
        """Copy the student's weights and batch norm statistics to the teacher."""
        student = self.student.state_dict()
        self.teacher.load_state_dict({name: student[name] for name in self.teacher.state_dict()})

    def after_step(self, carry: Any, clock: Clock) -> None:
        """Sec. 3.1: theta_t <- m theta_t + (1 - m) theta_s."""
        student = [self.student.get_parameter(name) for name, _ in self.teacher.named_parameters()]
        momentum_update(list(self.teacher.parameters()), student, self._momentum(clock))

    def diagnostics(self) -> dict[str, Tensor]:
        """Return the relative distance between teacher and student."""
        return {"teacher_distance": relative_distance(self.teacher, self.student)}

    @property
    def backbone(self) -> Backbone:
        """The teacher's backbone."""
        return self.teacher.backbone

    @property
    def trainable(self) -> Network:
        """The student."""
        return self.student


@torch.no_grad()
def relative_distance(teacher: nn.Module, student: nn.Module) -> Tensor:
    """Return |theta_t - theta_s| / |theta_s| over the parameters of the teacher's names."""
    pairs = [(theta_t, student.get_parameter(name)) for name, theta_t in teacher.named_parameters()]
    differences = torch.stack([(theta_t - theta_s).norm() for theta_t, theta_s in pairs])
    return differences.norm() / torch.stack([theta_s.norm() for _, theta_s in pairs]).norm()
