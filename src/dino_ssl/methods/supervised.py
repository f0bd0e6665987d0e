"""Supervised training and fine-tuning by DeiT's recipe (Touvron et al., 2021; Sec. 4.2.3, Tables 2, 6 and 11).

Cross-entropy of a linear classifier on the backbone. Labels are smoothed, and every batch is mixed with itself: by
mixup (Zhang et al., 2018) or by CutMix (Yun et al., 2019), one draw for all pictures of a step.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_ssl.data.batch import Batch
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import mix_rng
from dino_ssl.errors import UserError
from dino_ssl.methods.method import BuildContext, Method, MethodConfig, Outputs
from dino_ssl.models import Backbone, Network
from dino_ssl.models.blocks import init_weights
from dino_ssl.objectives import H, log_P
from dino_ssl.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MethodConfig):
    """Learning the labels of class folders. The defaults are DeiT's."""

    local_views: ClassVar[bool] = False  # it looks at the first resolution alone
    classifies: ClassVar[bool] = True
    about: ClassVar[str] = "trained with labels"

    smoothing: float = 0.1
    """Part of every target that is spread evenly over all classes."""
    mixup: float = 0.8
    """Mixup: lambda is drawn from Beta(this, this); 0 switches it off."""
    cutmix: float = 1.0
    """CutMix: lambda is drawn from Beta(this, this); 0 switches it off."""
    cutmix_share: float = 0.5
    """Share of the steps that CutMix gets where both are on; mixup gets the others."""
    head_scale: float = 0.001
    """Factor on the classifier's first weights: small ones let the backbone move gently at first (fine-tuning)."""

    def __post_init__(self) -> None:
        for name, top in (("smoothing", 1), ("cutmix_share", 1), ("mixup", math.inf), ("cutmix", math.inf)):
            value = getattr(self, name)
            if not 0 <= value <= top:
                raise UserError(f"method.{name}: expected {'0 to 1' if top == 1 else '0 or more'}, got {value}.")
        if not self.head_scale > 0:
            raise UserError(f"method.head_scale: expected a factor above 0, got {self.head_scale}.")

    @property
    def summary(self) -> str:
        return "learns labels"

    def build(self, context: BuildContext) -> "Supervised":
        if context.classes < 2:
            raise UserError(f"A classifier needs labels of two classes or more, and there are {context.classes}.")
        backbone = context.backbone()
        head = nn.Linear(backbone.embed_dim, context.classes)
        init_weights(head)
        head.weight.data.mul_(self.head_scale)
        return Supervised(Network(backbone, head), self, context.seed)

    @property
    def supports_grad_accumulation(self) -> bool:
        return self.mixup == self.cutmix == 0  # else pictures of the whole batch are mixed

    def filter_dataset(self, dataset: ImageDataset) -> ImageDataset:
        if dataset.labels is None or not (dataset.labels >= 0).any():
            raise UserError(
                "Learning labels needs labels, and these pictures have none: put the pictures of each class in a "
                "folder of its own (photos/cat/1.jpg, photos/dog/2.jpg, ...)."
            )
        known = np.flatnonzero(dataset.labels >= 0)
        return dataset if len(known) == len(dataset) else dataset.subset(known)


class Mix(NamedTuple):
    """How the pictures of a step are mixed with one another."""

    weight: float = 1.0
    """lambda: the part of a picture that stays its own."""
    box: tuple[int, int, int, int] | None = None
    """CutMix: top, bottom, left and right of what the other picture fills. Without it, mixup."""


class Supervised(Method):
    """A backbone and a linear classifier."""

    def __init__(self, network: Network, config: SupervisedConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.network, self.seed = config, network, seed

    def forward(self, batch: Batch, clock: Clock, ahead: None = None) -> Outputs:
        """H(targets, softmax(logits)) of the mixed views of the first resolution. What is mixed how depends on (seed,
        step) alone: ranks agree about it, and a run goes on as if it had never stopped."""
        assert batch.labels is not None, "the run gives labels: `filter_dataset` has seen to it"
        views = batch.views[0]
        classes = self.network.head.out_features
        assert isinstance(classes, int)
        targets = smoothed(batch.labels, classes, self.config.smoothing)
        mix = draw_mix(self.config, views.shape[-2], views.shape[-1], mix_rng(self.seed, clock.step))
        logits = self.network([mixed_images(views, mix)])
        loss = H(mixed_targets(targets, mix), log_P(logits, 1.0)).mean()
        return Outputs(loss, None, {"loss": loss.detach()})

    @property
    def trainable(self) -> Network:
        return self.network

    @property
    def backbone(self) -> Backbone:
        return self.network.backbone

    @property
    def classifier(self) -> Network:
        return self.network


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[B] -> [B, C]: 1 - smoothing for the label, and smoothing / C for every class, the label included."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def draw_mix(config: SupervisedConfig, height: int, width: int, rng: np.random.Generator) -> Mix:
    """One draw for a whole step, as DeiT's batch mode has it: mixup or CutMix, and lambda from a Beta distribution.

    CutMix's box has 1 - lambda of the area and its middle anywhere; what lies outside the picture is lost, and lambda
    becomes the part that is left.
    """
    cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.cutmix_share)
    alpha = config.cutmix if cut else config.mixup
    if alpha == 0:
        return Mix()
    weight = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(weight)
    tall, wide = (int(side * math.sqrt(1 - weight)) for side in (height, width))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
    left, right = max(0, x - wide // 2), min(width, x + wide // 2)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def partners(values: Tensor, dim: int = 0) -> Tensor:
    """What each of B pictures is mixed with: the one half a batch further, so that pairs mix with each other.

    DeiT takes the batch in reverse. Here partners meet on one rank however many there are (position p lies on rank
    p mod world), so that the number of ranks changes nothing.
    """
    return values.roll(values.shape[dim] // 2, dims=dim)


def mixed_images(views: Tensor, mix: Mix) -> Tensor:
    """[n, B, 3, H, W]: each picture with its partner, added (mixup) or cut in (CutMix)."""
    if mix.weight == 1:
        return views
    other = partners(views, dim=1)
    if mix.box is None:
        return torch.lerp(other, views, mix.weight)
    top, bottom, left, right = mix.box
    views = views.clone()
    views[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return views


def mixed_targets(targets: Tensor, mix: Mix) -> Tensor:
    """[B, C]: each target with its partner's, by the parts of the pictures."""
    return torch.lerp(partners(targets), targets, mix.weight)
