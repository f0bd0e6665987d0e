"""The contract between a method of learning and the loop that trains it.

A method knows networks, losses and its own state (a teacher, a center, a queue). It never sees a device or a rank:
the loop moves it and its batches, and `dist` is the identity where there is one process. Its settings are a
`MethodConfig`, which builds it; nobody else needs to know which method it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from dino_ssl import objectives
from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.models import Backbone, BackboneConfig, Network
from dino_ssl.models.weights import load_strict
from dino_ssl.objectives import LossTerms
from dino_ssl.schedules import Clock, Schedule


class Outputs(NamedTuple):
    """What one forward pass gives."""

    loss: Tensor
    """A scalar to take the gradient of."""
    carry: Any
    """What `after_step` needs of this batch; detached."""
    metrics: dict[str, Tensor]
    """Detached scalars, left on the device until somebody logs them. A vector of shares that sum to 1 is logged as the
    number of those in use: exp of the entropy of their average."""


class Method(nn.Module, ABC):
    """Forward, and then two moments around the optimizer's step. See `training.train_step` for the whole order."""

    @abstractmethod
    def forward(self, batch: Batch, clock: Clock, ahead: Any = None) -> Outputs:
        """The loss of a batch of normalised views; changes no state of the method's own.

        ahead: where the batch is a part of a larger one, what `prepare_targets` said of it.
        """

    def prepare_targets(self, parts: Iterable[Batch], clock: Clock) -> list[Any]:
        """What `forward` must know of the whole batch before it sees each of its parts, of which only the views of the
        first resolution are given."""
        return [None for _ in parts]

    def merge(self, parts: Sequence[Outputs], shares: Sequence[float]) -> Outputs:
        """The outputs of the whole batch from those of its parts, of which each has a share of the pictures."""
        metrics = {name: _weighed([out.metrics[name] for out in parts], shares) for name in parts[0].metrics}
        return Outputs(
            _weighed([out.loss for out in parts], shares), self.merge_carry([o.carry for o in parts]), metrics
        )

    def merge_carry(self, carries: Sequence[Any]) -> Any:
        """The carry of the whole batch from those of its parts."""
        return None

    def before_step(self, clock: Clock) -> None:
        """Gradients are ready and clipped: hold back what must not move yet."""

    def after_step(self, carry: Any, clock: Clock) -> None:
        """The student has moved: the method's own state follows."""

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars that tell how its own state does (`center_norm`, `teacher_distance`), on the device: asked once for a
        line of metrics, not at every step."""
        return {}

    @property
    @abstractmethod
    def trainable(self) -> nn.Module:
        """The part that the optimizer moves."""

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The network that is evaluated and exported."""

    @property
    def classifier(self) -> Network | None:
        """Backbone and head that give a number for each class, where the labels are learned: its own accuracy is
        then what is measured while training."""
        return None


def _weighed(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return sum(value.detach() * share for value, share in zip(values, shares, strict=True))  # pyright: ignore[reportReturnType]


@torch.no_grad()
def relative_distance(teacher: nn.Module, student: nn.Module) -> Tensor:
    """|theta_t - theta_s| / |theta_s| over the teacher's parameters and the student's of the same names."""
    names = [name for name, _ in teacher.named_parameters()]
    own, other = ([net.get_parameter(name) for name in names] for net in (teacher, student))
    apart = torch.stack([(a - b).norm() for a, b in zip(own, other, strict=True)])
    return apart.norm() / torch.stack([b.norm() for b in other]).norm()


class Implementations(NamedTuple):
    """Functions with a reference and an optimized implementation (`kernels.optimized`); None: the network's own."""

    loss_from_bottleneck: Callable[..., LossTerms] = objectives.loss_from_bottleneck
    batch_center: Callable[..., Tensor] = objectives.batch_center
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    forward_views: Callable[..., Tensor] | None = None


class BuildContext(NamedTuple):
    """What a method is built from, besides its own settings."""

    network: BackboneConfig
    seed: int = 0
    """For randomness of its own that depends on the step."""
    classes: int = 0
    """How many the pictures' labels tell apart; 0 where there are none."""
    weights: Mapping[str, Tensor] | None = None
    """Of a backbone that somebody has trained; None begins with the network's own."""
    source: str = ""
    """Where those weights are from, for messages."""

    implementations: Implementations = Implementations()

    def student(self) -> Backbone:
        """Return the backbone of a student that has a teacher; views of all resolutions may be packed together."""
        network = self.backbone()
        network.use_kernels(attention=self.implementations.attention, forward_views=self.implementations.forward_views)
        return network

    def teacher(self) -> Backbone:
        """Return the backbone of a teacher: as the student's, without drop-path."""
        return self.backbone(drop_path=0.0)

    def backbone(self, *, drop_path: float | None = None) -> Backbone:
        """Return the backbone with its initial weights; `drop_path` overrides its setting."""
        network = self.network.build(drop_path=drop_path)
        network.use_kernels(attention=self.implementations.attention)
        if self.weights is not None:
            load_strict(network, self.weights, self.source)
        return network


class MethodConfig(ABC):
    """Settings of a method: a frozen dataclass whose fields become flags. It builds its method, and answers what the
    rest of a run depends on."""

    global_views: ClassVar[int] = 1
    """Views of the first resolution that it needs of every picture."""
    local_views: ClassVar[bool] = True
    """Whether local views help it; the plan gives it some. Any method takes them, or does without."""
    classifies: ClassVar[bool] = False
    """Whether it learns the labels, so that its own classifier is what the accuracy is asked of."""
    about: ClassVar[str] = "trained with no labels"
    """What the report says of a network that it trained."""

    @abstractmethod
    def build(self, context: BuildContext) -> Method:
        """The method with fresh weights, on the CPU; all randomness is torch's."""

    @property
    def summary(self) -> str:
        """A few words for the plan."""
        return type(self).__name__.removesuffix("Config")

    @property
    def num_prototypes(self) -> int | None:
        """K, if the loss is a cross-entropy over prototypes: curves are compared with ln K."""
        return None

    @classmethod
    def for_small_data(cls, num_images: int) -> Self:
        """Return settings for thousands of images and few steps."""
        return cls()

    def for_few_steps(self) -> Self | None:
        """Return settings for a run of a few thousand steps; None if the method has none."""
        return None

    def schedules(self) -> Mapping[str, Schedule]:
        """Values of its own that change with the clock: logged beside the learning rate."""
        return {}

    @property
    def supports_grad_accumulation(self) -> bool:
        """Whether a batch may be taken in parts (`optim.micro_batch`) and nothing changes but the memory."""
        return False

    def filter_dataset(self, dataset: ImageDataset) -> ImageDataset:
        """Those of the pictures that it can learn from. Raises UserError where there are none."""
        return dataset
