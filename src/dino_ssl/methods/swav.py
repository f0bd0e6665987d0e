"""SwAV: swapping assignments between views (Caron et al., 2020); Tables 2, 7, 13 and 15.

The pictures of a batch are spread evenly over K prototypes (Sinkhorn-Knopp), and each view predicts the others' places.
One network: the targets are its own, without a teacher.
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
from dino_ssl.models import Backbone, MLPHead, Network
from dino_ssl.models.heads import l2_norm
from dino_ssl.objectives import cross_entropy_over_pairs, h, log_P, sinkhorn_knopp
from dino_ssl.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class SwAVConfig(MethodConfig):
    """Prototypes that share out the pictures evenly. The defaults are SwAV's own."""

    global_views: ClassVar[int] = 2
    about: ClassVar[str] = "trained by SwAV with no labels"

    out_dim: int = 3000
    """K, the number of prototypes; fewer for thousands of pictures."""
    temperature: float = 0.1
    """Temperature of the predictions."""
    epsilon: float = 0.05
    """Temperature of the targets: lower is sharper."""
    iterations: int = 3
    """Rounds of Sinkhorn-Knopp."""
    queue: int = 0
    """Earlier pictures that are shared out with the batch, where batch and K are of one size: 3840 for 256; 0: none."""
    queue_from: float = 15
    """Epochs before the queue is used: features still change too fast."""
    freeze_prototypes: float = 1
    """Epochs in which the prototypes stand still."""
    head_dim: int = 128
    """Width of the features that are compared with prototypes."""
    head_layers: int = 2
    """Linear layers of the head, before the prototypes."""
    head_hidden: int = 2048
    """Width of the head's hidden layers."""
    head_norm: Literal["none", "batch"] = "batch"
    """Norm inside the head."""

    def __post_init__(self) -> None:
        check_range(self, "head_dim", "head_layers", "head_hidden", "iterations", prefix="method.", least=1)
        check_range(self, "out_dim", prefix="method.", least=2)
        check_range(self, "temperature", "epsilon", prefix="method.", least=1e-4)
        check_range(self, "queue", "queue_from", "freeze_prototypes", prefix="method.", least=0)

    @property
    def summary(self) -> str:
        return f"SwAV, K {self.out_dim}"

    @property
    def num_prototypes(self) -> int:
        """K."""
        return self.out_dim

    @classmethod
    def for_small_data(cls, num_images: int) -> Self:
        """Return settings with fewer prototypes and a narrower head."""
        return cls(out_dim=300, head_hidden=512)

    def build(self, context: BuildContext) -> "SwAV":
        backbone = context.backbone()
        head = MLPHead(
            backbone.embed_dim,
            self.head_dim,
            layers=self.head_layers,
            hidden=self.head_hidden,
            norm=self.head_norm,
        )
        return SwAV(Network(backbone, PrototypeHead(head, self.head_dim, self.out_dim)), self)


class PrototypeHead(nn.Module):
    """[n, D] -> [n, d] at unit length, and beside it the prototypes, of unit length too: [..., d] -> [..., K]."""

    def __init__(self, projection: nn.Module, dim: int, count: int) -> None:
        super().__init__()
        self.projection = projection
        self.prototypes = nn.Linear(dim, count, bias=False)
        self.normalise()

    def forward(self, x: Tensor) -> Tensor:
        return l2_norm(self.projection(x))

    @torch.no_grad()
    def normalise(self) -> None:
        self.prototypes.weight.copy_(l2_norm(self.prototypes.weight))


class SwAV(Method):
    """A network and its prototypes; the queue remembers the features of both global views of earlier pictures."""

    def __init__(self, network: Network, config: SwAVConfig) -> None:
        super().__init__()
        self.config, self.network = config, network
        self.queue = Queue(config.queue, config.global_views, config.head_dim) if config.queue else None

    def forward(self, batch: Batch, clock: Clock, ahead: None = None) -> Outputs:
        """SwAV's Eq. 1 and 2 in both directions, and from every local view to both global ones."""
        features = self.network(batch.views)  # [V, B, D], of unit length
        logits = self.head.prototypes(features)  # [V, B, K]
        known = features[: self.config.global_views].detach()
        targets = self.targets(known, clock)
        loss = cross_entropy_over_pairs(targets, log_P(logits, self.config.temperature))
        entropy, shares = h(targets).mean(), targets.mean((0, 1))
        metrics = {
            "loss": loss.detach(),
            "teacher_entropy": entropy,
            "kl": loss.detach() - entropy,  # every target is in V - 1 pairs, so means subtract
            "marginal_entropy": h(shares),
            "prototypes_used": shares,
        }
        return Outputs(loss, known.transpose(0, 1), metrics)

    @torch.no_grad()
    def targets(self, features: Tensor, clock: Clock) -> Tensor:
        """[G, B, D] -> [G, B, K]: where the pictures belong, all ranks' and the queue's shared out together."""
        batch = features.shape[1]
        if self.queue is not None and clock.step >= self._first(clock) and self.queue.is_full():
            earlier = distributed.shard(self.queue.rows).transpose(0, 1)  # each rank brings its part of it
            features = torch.cat([earlier, features], dim=1)
        logits = self.head.prototypes(features)
        return sinkhorn_knopp(logits, self.config.epsilon, self.config.iterations)[:, -batch:]

    def before_step(self, clock: Clock) -> None:
        """The prototypes stand still at first: features that differ by chance would pull them together."""
        if clock.step < self.config.freeze_prototypes * clock.steps_per_epoch:
            self.head.prototypes.weight.grad = None

    def after_step(self, carry: Tensor, clock: Clock) -> None:
        """The prototypes are brought back to unit length, and the batch joins the queue. carry: features [B, G, D]."""
        self.head.normalise()
        if self.queue is not None and clock.step >= self._first(clock):
            self.queue.push(distributed.unshard(carry), clock.step)

    def _first(self, clock: Clock) -> float:
        """The step from which on features are kept, and used as soon as the queue is full."""
        return self.config.queue_from * clock.steps_per_epoch

    @property
    def head(self) -> PrototypeHead:
        head = self.network.head
        assert isinstance(head, PrototypeHead)
        return head

    @property
    def backbone(self) -> Backbone:
        return self.network.backbone

    @property
    def trainable(self) -> Network:
        return self.network
