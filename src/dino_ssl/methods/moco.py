"""MoCo-v2: momentum contrast (He et al., 2020; Chen et al., 2020); Tables 2, 7, 13 and 14.

Two views of an image should be more similar to each other than to the images of many earlier batches, kept in a queue.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from dino_ssl import distributed
from dino_ssl.data.batch import Batch
from dino_ssl.errors import check_range
from dino_ssl.methods.method import BuildContext, Outputs
from dino_ssl.methods.queue import Queue
from dino_ssl.methods.teacher_student import TeacherStudent, TeacherStudentConfig
from dino_ssl.models import MLPHead, Network
from dino_ssl.objectives import info_nce, l2_normalize
from dino_ssl.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(TeacherStudentConfig):
    """MoCo-v2. The defaults are those of DINO's authors for their tables.

    MoCo-v2's own are 2 layers without norm, dimension 128, temperature 0.2 and a constant momentum of 0.999.
    """

    global_views: ClassVar[int] = 2

    queue: int = 65536
    """Keys of earlier images, two per image, that are the negatives of each query. 4096 are almost as good."""
    temperature: float = 0.1
    """Temperature of the contrastive loss; lower is sharper."""
    head_dim: int = 256
    """Width of queries and keys."""
    head_layers: int = 3
    """Linear layers of the head."""
    head_hidden: int = 2048
    """Width of the head's hidden layers."""
    head_norm: Literal["none", "batch"] = "batch"
    """Normalization layers in the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "queue", "head_dim", "head_layers", "head_hidden", prefix="method.", least=1)
        check_range(self, "temperature", prefix="method.", least=1e-4)

    @classmethod
    def for_small_data(cls, num_images: int) -> Self:
        """Return settings with narrower heads, a lower momentum, and a queue of half an epoch's keys at most."""
        half_epoch = 2 ** int(math.log2(max(64, num_images)))  # two keys per image
        return cls(head_dim=128, head_hidden=512, momentum=0.97, queue=min(65536, half_epoch))

    def build(self, context: BuildContext) -> "MoCo":
        """Return student, teacher and an empty queue."""
        student, teacher = context.build_backbones()
        head = partial(MLPHead, student.embed_dim, self.head_dim, layers=self.head_layers, hidden=self.head_hidden)
        heads = [head(norm=self.head_norm) for _ in range(2)]
        return MoCo(Network(student, heads[0]), Network(teacher, heads[1]), self)


class MoCo(TeacherStudent):
    """The student encodes all views as queries, the teacher (the momentum encoder) the global ones as keys.

    Keys older than an epoch are masked, because in a queue larger than the dataset they belong to the query's own
    image. Empty entries of the queue are masked too; MoCo fills them with random vectors. MoCo itself evaluates the
    student.
    """

    def __init__(self, student: Network, teacher: Network, config: MoCoConfig) -> None:
        super().__init__(student, teacher, config)
        self.config = config
        self.queue = Queue(config.queue, config.head_dim)

    def forward(self, batch: Batch, clock: Clock, targets: None = None) -> Outputs:
        """MoCo's Eq. 1 in both directions, and from each local view to both global ones."""
        with torch.no_grad(), record_function("teacher forward"):
            keys = l2_normalize(self.teacher(batch.views[:1]))  # [G, B, D]
        queries = self.student(batch.views)  # [V, B, D]
        valid = self.queue.pushed_since(clock.step - max(1, clock.steps_per_epoch - 1))
        loss = info_nce(queries, keys, self.queue.rows, self.config.temperature, valid)
        return Outputs(loss, keys.transpose(0, 1), {"loss": loss.detach()})

    def merge_carry(self, carries: Sequence[Tensor]) -> Tensor:
        """Concatenate the keys of the micro-batches."""
        return torch.cat(list(carries))

    def after_step(self, carry: Tensor, clock: Clock) -> None:
        """MoCo's Eq. 2, then the keys of all ranks replace the oldest of the queue. carry: the keys [B, G, D]."""
        super().after_step(carry, clock)
        self.queue.push(distributed.unshard(carry).flatten(0, 1), clock.step)
