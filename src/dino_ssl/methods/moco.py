"""MoCo-v2: momentum contrast (He et al., 2020; Chen et al., 2020); Tables 2, 7, 13 and 14.

A picture's two views shall be nearer to each other than to the pictures of many earlier batches, which a queue keeps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.batch import Batch
from dino_ssl.errors import check_range
from dino_ssl.methods.method import BuildContext, Method, MethodConfig, Outputs, relative_distance
from dino_ssl.methods.queue import Queue
from dino_ssl.models import Backbone, MLPHead, Network
from dino_ssl.models.heads import l2_norm
from dino_ssl.objectives import info_nce, momentum_update
from dino_ssl.schedules import Clock, Cosine, Schedule


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(MethodConfig):
    """Contrast with a queue of earlier pictures. The defaults are those with which DINO's authors ran it for their
    tables; MoCo-v2's own are 2 layers without norm, dim 128, temperature 0.2 and a momentum of 0.999 throughout."""

    global_views: ClassVar[int] = 2
    about: ClassVar[str] = "trained by MoCo-v2 with no labels"

    queue: int = 65536
    """Keys of earlier pictures that each query is compared with, two of each picture. 4096 are almost as good."""
    temperature: float = 0.1
    """Lower is sharper."""
    head_dim: int = 256
    """Width of queries and keys."""
    head_layers: int = 3
    """Linear layers of the head."""
    head_hidden: int = 2048
    """Width of the head's hidden layers."""
    head_norm: Literal["none", "batch"] = "batch"
    """Norm inside the head."""
    momentum: float = 0.996
    """Momentum of the teacher in the first step. Smaller batches and shorter runs want less (0.99)."""
    momentum_end: float = 1.0
    """Momentum of the teacher in the last step, reached by a cosine."""

    def __post_init__(self) -> None:
        check_range(self, "queue", "head_dim", "head_layers", "head_hidden", prefix="method.", least=1)
        check_range(self, "temperature", prefix="method.", least=1e-4)
        check_range(self, "momentum", "momentum_end", prefix="method.", least=0, most=1)

    @property
    def summary(self) -> str:
        return f"MoCo, queue {self.queue}"

    @property
    def supports_grad_accumulation(self) -> bool:
        return True

    def schedules(self) -> Mapping[str, Schedule]:
        return {"momentum": Cosine(self.momentum, self.momentum_end)}

    @classmethod
    def for_small_data(cls, num_images: int) -> Self:
        """Return settings with narrower heads, a lower momentum, and a queue of half an epoch's keys at most."""
        half_epoch = 2 ** int(math.log2(max(64, num_images)))  # two keys per image
        return cls(head_dim=128, head_hidden=512, momentum=0.97, queue=min(65536, half_epoch))

    def build(self, context: BuildContext) -> "MoCo":
        student, teacher = context.student(), context.teacher()
        return MoCo(
            Network(student, self.head(student.embed_dim)), Network(teacher, self.head(teacher.embed_dim)), self
        )

    def head(self, in_dim: int) -> MLPHead:
        return MLPHead(in_dim, self.head_dim, layers=self.head_layers, hidden=self.head_hidden, norm=self.head_norm)


class MoCo(Method):
    """The student makes queries of all views, the teacher (the momentum encoder) keys of the global ones.

    Keys older than an epoch do not count: in a queue larger than the data they are the query's own picture again. Nor
    do places that no key has taken yet; MoCo fills them with random directions.
    """

    def __init__(self, student: Network, teacher: Network, config: MoCoConfig) -> None:
        super().__init__()
        self.config, self.student, self.teacher = config, student, teacher
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.queue = Queue(config.queue, config.head_dim)
        self._momentum = config.schedules()["momentum"]

    def forward(self, batch: Batch, clock: Clock, ahead: None = None) -> Outputs:
        """MoCo's Eq. 1 in both directions, and from every local view to both global ones."""
        with torch.no_grad():
            keys = l2_norm(self.teacher(batch.views[:1]))  # [G, B, D]
        queries = self.student(batch.views)  # [V, B, D]
        usable = self.queue.since(clock.step - max(1, clock.steps_per_epoch - 1))
        loss = info_nce(queries, keys, self.queue.rows, self.config.temperature, usable)
        return Outputs(loss, keys.transpose(0, 1), {"loss": loss.detach()})

    def merge_carry(self, carries: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(carries))

    def after_step(self, carry: Tensor, clock: Clock) -> None:
        """MoCo's Eq. 2, and the newest keys of all ranks take the place of the oldest. carry: the keys [B, G, D]."""
        momentum_update(list(self.teacher.parameters()), list(self.student.parameters()), self._momentum(clock))
        self.queue.push(distributed.unshard(carry).flatten(0, 1), clock.step)

    def diagnostics(self) -> dict[str, Tensor]:
        return {"teacher_distance": relative_distance(self.teacher, self.student)}

    @property
    def backbone(self) -> Backbone:
        """The teacher's, as DINO's. MoCo itself keeps the student's: a late teacher is its average."""
        return self.teacher.backbone

    @property
    def trainable(self) -> Network:
        return self.student
