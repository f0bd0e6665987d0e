"""The interface between a method and the training loop.

A method has networks, a loss and its own state (a teacher, a center, a queue). It does not depend on devices or ranks:
the loop moves the method and its batches, and `distributed` is the identity on one process. Its settings are a
`MethodConfig`, which builds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from dino_ssl import objectives
from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.models import Backbone, BackboneConfig, Network
from dino_ssl.models.weights import load_strict
from dino_ssl.objectives import LossTerms
from dino_ssl.schedules import Clock, Schedule


class Outputs(NamedTuple):
    """The outputs of one forward pass."""

    loss: Tensor
    """A scalar with a gradient."""
    carry: Any
    """The part of this batch that `after_step` needs; detached."""
    metrics: dict[str, Tensor]
    """Detached scalars on the device. A vector of shares that sum to 1 is logged as the effective number of entries:
    exp of the entropy of its average over steps."""


class Method(nn.Module, ABC):
    """A forward pass and two hooks around the optimizer step; `training.train_step` shows the order."""

    @abstractmethod
    def forward(self, batch: Batch, clock: Clock, targets: Any = None) -> Outputs:
        """Return the loss of normalized views without changing the method's state.

        targets: the item of `prepare_targets` that belongs to `batch`, if it is a micro-batch.
        """

    def prepare_targets(self, micro_batches: Iterable[Batch], clock: Clock) -> list[Any]:
        """Return the statistics of the whole batch that `forward` needs, one item per micro-batch.

        The micro-batches have only the views of the first resolution here.
        """
        return [None for _ in micro_batches]

    def merge(self, outputs: Sequence[Outputs], weights: Sequence[float]) -> Outputs:
        """Return the outputs of the whole batch from those of its micro-batches, weighted by their shares of images."""

        def mean(values: Iterable[Tensor]) -> Any:
            return sum(value.detach() * weight for value, weight in zip(values, weights, strict=True))

        metrics = {name: mean(out.metrics[name] for out in outputs) for name in outputs[0].metrics}
        return Outputs(mean(out.loss for out in outputs), self.merge_carry([out.carry for out in outputs]), metrics)

    def merge_carry(self, carries: Sequence[Any]) -> Any:
        """Return the carry of the whole batch from those of its micro-batches."""
        return None

    def before_step(self, clock: Clock) -> None:
        """Run after gradients are clipped and before the optimizer step; may remove gradients of frozen parameters."""

    def after_step(self, carry: Any, clock: Clock) -> None:
        """Update the method's own state after the optimizer step."""

    def diagnostics(self) -> dict[str, Tensor]:
        """Return scalars about the method's state on the device, logged once per line of metrics."""
        return {}

    @property
    @abstractmethod
    def trainable(self) -> nn.Module:
        """The module whose parameters the optimizer updates."""

    @property
    def backbone(self) -> Backbone:
        """The network that is evaluated and exported; by default the backbone of `trainable`."""
        backbone = self.trainable.get_submodule("backbone")
        assert isinstance(backbone, Backbone)
        return backbone

    @property
    def classifier(self) -> Network | None:
        """The backbone with a linear classifier if the method learns labels; its accuracy is then measured."""
        return None


class Implementations(NamedTuple):
    """Functions with a reference and an optimized implementation (`kernels.optimized`); None: the network's own."""

    loss_from_bottleneck: Callable[..., LossTerms] = objectives.loss_from_bottleneck
    batch_center: Callable[..., Tensor] = objectives.batch_center
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    forward_views: Callable[..., Tensor] | None = None
    conv2d: Callable[[nn.Conv2d, Tensor], Tensor] | None = None


class BuildContext(NamedTuple):
    """Everything that is needed to build a method, apart from its own settings."""

    network: BackboneConfig
    seed: int = 0
    """For a method's own randomness, which depends on seed and step."""
    classes: int = 0
    """Number of classes of the labels; 0 without labels."""
    weights: Mapping[str, Tensor] | None = None
    """State dict of a pretrained backbone; None: the initial weights of `network`."""
    source: str = ""
    """Origin of the weights, for messages."""
    implementations: Implementations = Implementations()

    def build_backbone(self, *, drop_path: float | None = None, pack_views: bool = False) -> Backbone:
        """Return the backbone with its initial weights.

        drop_path: overrides the setting (0 for a teacher). pack_views: allow one forward pass for all resolutions.
        """
        backbone = self.network.build(drop_path=drop_path)
        kernels = self.implementations
        forward_views = kernels.forward_views if pack_views else None
        backbone.use_kernels(attention=kernels.attention, forward_views=forward_views, conv2d=kernels.conv2d)
        if self.weights is not None:
            load_strict(backbone, self.weights, self.source)
        return backbone

    def build_backbones(self) -> tuple[Backbone, Backbone]:
        """Return the backbones of a student and of its teacher, which has no drop-path."""
        return self.build_backbone(pack_views=True), self.build_backbone(drop_path=0.0)


class MethodConfig(ABC):
    """Settings of a method: a frozen dataclass whose fields become flags, and properties that other modules need."""

    global_views: ClassVar[int] = 1
    """Views of the first resolution that the method needs of each image."""
    local_views: ClassVar[bool] = True
    """True if local views improve the method; the plan then adds some. Every method accepts any number of them."""
    classifies: ClassVar[bool] = False
    """True if the method learns the labels, so that the accuracy of its own classifier is measured."""

    @abstractmethod
    def build(self, context: BuildContext) -> Method:
        """Return the method with initial weights on the CPU, drawn from torch's global generator."""

    @property
    def summary(self) -> str:
        """The method and its number of prototypes, for plans and reports."""
        name = type(self).__name__.removesuffix("Config")
        return f"{name}, K {self.num_prototypes}" if self.num_prototypes else name

    @property
    def num_prototypes(self) -> int | None:
        """K, if the loss is a cross-entropy over prototypes: curves are compared with ln K."""
        return None

    @property
    def supports_grad_accumulation(self) -> bool:
        """True if micro-batches (`optim.micro_batch`) give the same results as the whole batch."""
        return False

    @classmethod
    def for_small_data(cls, num_images: int) -> Self:
        """Return settings for thousands of images and few steps."""
        return cls()

    def for_few_steps(self) -> Self | None:
        """Return settings for a run of a few thousand steps; None if the method has none."""
        return None

    def schedules(self) -> dict[str, Schedule]:
        """Return the method's scheduled values by the name under which they are logged."""
        return {}

    def filter_dataset(self, dataset: ImageDataset) -> ImageDataset:
        """Return the images from which the method can learn. Raise UserError if there are none."""
        return dataset
