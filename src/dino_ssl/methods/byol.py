"""BYOL: Bootstrap Your Own Latent (Grill et al., 2020); Tables 2, 7, 13 and 14.

The student guesses, through a predictor of its own, what its slow average says of another view. There are no negatives
and no center: what keeps it from giving one answer to everything is the predictor, with batch norm in the heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from dino_ssl.data.batch import Batch
from dino_ssl.errors import check_range
from dino_ssl.methods.method import BuildContext, Method, MethodConfig, Outputs, relative_distance
from dino_ssl.models import Backbone, MLPHead, Network, Predictor
from dino_ssl.objectives import byol_loss, momentum_update
from dino_ssl.schedules import Clock, Cosine, Schedule


@dataclass(frozen=True, kw_only=True)
class BYOLConfig(MethodConfig):
    """A student that predicts its slow average. The defaults are BYOL's own."""

    global_views: ClassVar[int] = 2
    local_views: ClassVar[bool] = False  # App. E: 66.6 without, 59.8 with them
    about: ClassVar[str] = "trained by BYOL with no labels"

    head_dim: int = 256
    """Width of the projections that are compared."""
    head_layers: int = 2
    """Linear layers of the projection."""
    head_hidden: int = 4096
    """Width of the hidden layers of projection and predictor."""
    head_norm: Literal["none", "batch"] = "batch"
    """Norm in both. Without batch norm, BYOL needs a careful start, or answers the same to everything."""
    predictor: bool = True
    """Off, the student has no predictor, and everything becomes one point (Table 14, row 8: 0.1)."""
    momentum: float = 0.996
    """Momentum of the teacher in the first step. Smaller batches and shorter runs want less (0.99)."""
    momentum_end: float = 1.0
    """Momentum of the teacher in the last step, reached by a cosine."""

    def __post_init__(self) -> None:
        check_range(self, "head_dim", "head_layers", "head_hidden", prefix="method.", least=1)
        check_range(self, "momentum", "momentum_end", prefix="method.", least=0, most=1)

    @property
    def supports_grad_accumulation(self) -> bool:
        return True

    def schedules(self) -> Mapping[str, Schedule]:
        return {"momentum": Cosine(self.momentum, self.momentum_end)}

    @classmethod
    def for_small_data(cls, num_images: int) -> Self:
        """Return settings with narrower heads and a lower momentum."""
        return cls(head_dim=128, head_hidden=512, momentum=0.97)

    def build(self, context: BuildContext) -> "BYOL":
        student, teacher = context.student(), context.teacher()
        predictor = Predictor(self.head_dim, hidden=self.head_hidden, norm=self.head_norm) if self.predictor else None
        return BYOL(
            Network(student, self.head(student.embed_dim), predictor),
            Network(teacher, self.head(teacher.embed_dim)),
            self,
        )

    def head(self, in_dim: int) -> MLPHead:
        return MLPHead(in_dim, self.head_dim, layers=self.head_layers, hidden=self.head_hidden, norm=self.head_norm)


class BYOL(Method):
    """The teacher starts as the student's copy, has no predictor, takes no gradients, and sees the global views."""

    def __init__(self, student: Network, teacher: Network, config: BYOLConfig) -> None:
        super().__init__()
        self.config, self.student, self.teacher = config, student, teacher
        self.teacher.backbone.load_state_dict(self.student.backbone.state_dict())
        self.teacher.head.load_state_dict(self.student.head.state_dict())
        self.teacher.requires_grad_(False)
        self._momentum = config.schedules()["momentum"]

    def forward(self, batch: Batch, clock: Clock, ahead: None = None) -> Outputs:
        """BYOL's Eq. 2, in both directions, and from every local view to both global ones."""
        with torch.no_grad():
            teacher = self.teacher(batch.views[:1])  # [G, B, D]
        loss = byol_loss(self.student(batch.views), teacher)
        return Outputs(loss, None, {"loss": loss.detach()})

    def after_step(self, carry: None, clock: Clock) -> None:
        """BYOL's Eq. 1: the teacher follows the student."""
        followed = [*self.student.backbone.parameters(), *self.student.head.parameters()]
        momentum_update(list(self.teacher.parameters()), followed, self._momentum(clock))

    def diagnostics(self) -> dict[str, Tensor]:
        return {"teacher_distance": relative_distance(self.teacher, self.student)}

    @property
    def backbone(self) -> Backbone:
        """The teacher's, as DINO's. BYOL itself keeps the student's: a late teacher is its average."""
        return self.teacher.backbone

    @property
    def trainable(self) -> Network:
        return self.student
