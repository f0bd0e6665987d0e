"""The contract between a method of learning and the loop that trains it.

A method knows networks, losses and its own state (a teacher, a center, a queue). It never sees a device or a rank:
the loop moves it and its batches, and `dist` is the identity where there is one process.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from dino.data.views import Batch
from dino.models.backbone import Backbone
from dino.schedules import Clock


class Outputs(NamedTuple):
    """What one forward pass gives."""

    loss: Tensor
    """A scalar to take the gradient of."""
    carry: Any
    """What `after_step` needs of this batch; detached."""
    metrics: dict[str, Tensor]
    """Detached scalars, left on the device until somebody logs them."""


class Method(nn.Module, ABC):
    """Forward, and then two moments around the optimizer's step. See `train.train_step` for the whole order."""

    @abstractmethod
    def forward(self, batch: Batch, clock: Clock) -> Outputs:
        """The loss of a batch of normalised views; changes no state of the method's own."""

    @abstractmethod
    def before_step(self, clock: Clock) -> None:
        """Gradients are ready and clipped: hold back what must not move yet."""

    @abstractmethod
    def after_step(self, carry: Any, clock: Clock) -> None:
        """The student has moved: the method's own state follows."""

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The network that is evaluated and exported."""
