"""BYOL: Bootstrap Your Own Latent (Grill et al., 2020); Tables 2, 7, 13 and 14.

The student predicts, through a predictor of its own, the teacher's projection of another view. There are no negatives
and no center: predictor and batch norm prevent collapse.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch.autograd.profiler import record_function

from dino_ssl.data.batch import Batch
from dino_ssl.errors import check_range
from dino_ssl.methods.method import BuildContext, Outputs
from dino_ssl.methods.teacher_student import TeacherStudent, TeacherStudentConfig
from dino_ssl.models import MLPHead, Network
from dino_ssl.objectives import byol_loss
from dino_ssl.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class BYOLConfig(TeacherStudentConfig):
    """BYOL, with the defaults of Grill et al. (2020)."""

    global_views: ClassVar[int] = 2
    local_views: ClassVar[bool] = False  # local views are worse (App. E: 66.6 without, 59.8 with them)

    head_dim: int = 256
    """Width of the projections that are compared."""
    head_layers: int = 2
    """Linear layers of the projection head."""
    head_hidden: int = 4096
    """Width of the hidden layers of projection head and predictor."""
    head_norm: Literal["none", "batch"] = "batch"
    """Normalization layers in both. Without batch norm, BYOL collapses unless it is initialized carefully."""
    predictor: bool = True
    """False removes the student's predictor, and the features collapse (Table 14, row 8: 0.1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "head_dim", "head_layers", "head_hidden", prefix="method.", least=1)

    @classmethod
    def for_small_data(cls, num_images: int) -> Self:
        """Return settings with narrower heads and a lower momentum."""
        return cls(head_dim=128, head_hidden=512, momentum=0.97)

    def build(self, context: BuildContext) -> "BYOL":
        """Return student, with a predictor, and teacher."""
        student, teacher = context.build_backbones()
        mlp = partial(MLPHead, out_dim=self.head_dim, hidden=self.head_hidden, norm=self.head_norm)
        predictor = mlp(self.head_dim) if self.predictor else None
        heads = [mlp(student.embed_dim, layers=self.head_layers) for _ in range(2)]
        return BYOL(Network(student, heads[0], predictor), Network(teacher, heads[1]), self)


class BYOL(TeacherStudent):
    """Student and teacher. BYOL itself evaluates the student; late in training, the teacher is its average."""

    def forward(self, batch: Batch, clock: Clock, targets: None = None) -> Outputs:
        """BYOL's Eq. 2, in both directions, and from each local view to both global ones."""
        with torch.no_grad(), record_function("teacher forward"):
            teacher = self.teacher(batch.views[:1])  # [G, B, D]
        loss = byol_loss(self.student(batch.views), teacher)
        return Outputs(loss, None, {"loss": loss.detach()})
