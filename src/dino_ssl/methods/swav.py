"""SwAV: swapped assignments between views (Caron et al., 2020); Tables 2, 7, 13 and 15.

The images of a batch are assigned evenly to K prototypes (Sinkhorn-Knopp), and each view predicts the assignments of
the others. There is one network without a teacher.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dino_ssl import distributed
from dino_ssl.data.batch import Batch
from dino_ssl.errors import check_range
from dino_ssl.methods.method import BuildContext, Method, MethodConfig, Outputs
from dino_ssl.methods.queue import Queue
from dino_ssl.models import MLPHead, Network
from dino_ssl.objectives import cross_entropy_over_pairs, h, l2_normalize, log_P, sinkhorn_knopp
from dino_ssl.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class SwAVConfig(MethodConfig):
    """SwAV, with the defaults of Caron et al. (2020)."""

    global_views: ClassVar[int] = 2

    out_dim: int = 3000
    """K, the number of prototypes; fewer for thousands of images."""
    temperature: float = 0.1
    """Temperature of the predictions."""
    epsilon: float = 0.05
    """Temperature of the targets: lower is sharper."""
    iterations: int = 3
    """Iterations of Sinkhorn-Knopp."""
    queue: int = 0
    """Earlier images assigned together with the batch, if it is not much larger than K: 3840 for 256; 0: none."""
    queue_from: float = 15
    """Epochs before the queue is used, in which features change too quickly."""
    freeze_prototypes: float = 1
    """Number of epochs at the start in which the prototypes are frozen."""
    head_dim: int = 128
    """Width of the features and prototypes."""
    head_layers: int = 2
    """Linear layers of the head before the prototypes."""
    head_hidden: int = 2048
    """Width of the head's hidden layers."""
    head_norm: Literal["none", "batch"] = "batch"
    """Normalization layers in the head."""

    def __post_init__(self) -> None:
        check_range(self, "head_dim", "head_layers", "head_hidden", "iterations", prefix="method.", least=1)
        check_range(self, "out_dim", prefix="method.", least=2)
        check_range(self, "temperature", "epsilon", prefix="method.", least=1e-4)
        check_range(self, "queue", "queue_from", "freeze_prototypes", prefix="method.", least=0)

    @property
    def num_prototypes(self) -> int:
        """K."""
        return self.out_dim

    @classmethod
    def for_small_data(cls, num_images: int) -> Self:
        """Return settings with fewer prototypes and a narrower head."""
        return cls(out_dim=300, head_hidden=512)

    def build(self, context: BuildContext) -> "SwAV":
        """Return the network with its prototypes, and an empty queue if there is one."""
        backbone = context.build_backbone()
        head = MLPHead(
            backbone.embed_dim, self.head_dim, layers=self.head_layers, hidden=self.head_hidden, norm=self.head_norm
        )
        return SwAV(Network(backbone, PrototypeHead(head, self.head_dim, self.out_dim)), self)


class PrototypeHead(nn.Module):
    """A projection to l2-normalized features, [n, D] -> [n, d], and l2-normalized prototypes, [..., d] -> [..., K]."""

    def __init__(self, projection: nn.Module, dim: int, count: int) -> None:
        super().__init__()
        self.projection = projection
        self.prototypes = nn.Linear(dim, count, bias=False)
        self.normalize_prototypes()

    def forward(self, x: Tensor) -> Tensor:
        """Return the features; `prototypes` maps them to logits."""
        return l2_normalize(self.projection(x))

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Scale the prototypes to unit length, in place."""
        self.prototypes.weight.copy_(l2_normalize(self.prototypes.weight))


class SwAV(Method):
    """A network with prototypes, and a queue of the features of both global views of earlier images."""

    def __init__(self, network: Network, config: SwAVConfig) -> None:
        super().__init__()
        self.config, self.network = config, network
        self.queue = Queue(config.queue, config.global_views, config.head_dim) if config.queue else None

    def forward(self, batch: Batch, clock: Clock, targets: None = None) -> Outputs:
        """SwAV's Eq. 1 and 2 in both directions, and from each local view to both global ones."""
        features = self.network(batch.views)  # [V, B, D], l2-normalized
        logits = self.head.prototypes(features)  # [V, B, K]
        global_features = features[: self.config.global_views].detach()
        assignments = self.assign(global_features, clock)
        loss = cross_entropy_over_pairs(assignments, log_P(logits, self.config.temperature))
        entropy, usage = h(assignments).mean(), assignments.mean((0, 1))
        metrics = {
            "loss": loss.detach(),
            "teacher_entropy": entropy,
            "kl": loss.detach() - entropy,  # each target is in V - 1 pairs
            "marginal_entropy": h(usage),
            "prototypes_used": usage,
        }
        return Outputs(loss, global_features.transpose(0, 1), metrics)

    @torch.no_grad()
    def assign(self, features: Tensor, clock: Clock) -> Tensor:
        """Return soft assignments, even over the images of all ranks and of the queue, [G, B, D] -> [G, B, K]."""
        batch_size = features.shape[1]
        if self.queue is not None and clock.step >= self._queue_start(clock) and self.queue.is_full():
            earlier = distributed.shard(self.queue.rows).transpose(0, 1)  # each rank adds its part
            features = torch.cat([earlier, features], dim=1)
        logits = self.head.prototypes(features)
        return sinkhorn_knopp(logits, self.config.epsilon, self.config.iterations)[:, -batch_size:]

    def before_step(self, clock: Clock) -> None:
        """Freeze the prototypes at first, when random differences of features would collapse them."""
        if clock.step < self.config.freeze_prototypes * clock.steps_per_epoch:
            self.head.prototypes.weight.grad = None

    def after_step(self, carry: Tensor, clock: Clock) -> None:
        """Normalize the prototypes and push the features [B, G, D] (`carry`) to the queue."""
        self.head.normalize_prototypes()
        if self.queue is not None and clock.step >= self._queue_start(clock):
            self.queue.push(distributed.unshard(carry), clock.step)

    def _queue_start(self, clock: Clock) -> float:
        """Return the first step whose features are queued; they are used once the queue is full."""
        return self.config.queue_from * clock.steps_per_epoch

    @property
    def head(self) -> PrototypeHead:
        """The projection head with the prototypes."""
        head = self.network.head
        assert isinstance(head, PrototypeHead)
        return head

    @property
    def trainable(self) -> Network:
        """The network."""
        return self.network
