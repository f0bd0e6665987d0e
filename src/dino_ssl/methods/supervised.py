"""Supervised training and fine-tuning by DeiT's recipe (Touvron et al., 2021; Sec. 4.2.3, Tables 2, 6 and 11).

Cross-entropy of a linear classifier on the backbone, with label smoothing, and mixup (Zhang et al., 2018) or CutMix
(Yun et al., 2019) within the batch, with one random draw per step.
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
from dino_ssl.errors import UserError, check_range
from dino_ssl.methods.method import BuildContext, Method, MethodConfig, Outputs
from dino_ssl.models import Network
from dino_ssl.models.blocks import init_weights
from dino_ssl.objectives import H, log_P
from dino_ssl.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MethodConfig):
    """Supervised training on labels. The defaults are DeiT's."""

    local_views: ClassVar[bool] = False  # only the first resolution is used
    classifies: ClassVar[bool] = True

    smoothing: float = 0.1
    """Label smoothing: the part of each target that is distributed evenly over all classes."""
    mixup: float = 0.8
    """Mixup alpha: lambda is drawn from Beta(alpha, alpha); 0 disables it."""
    cutmix: float = 1.0
    """CutMix alpha: lambda is drawn from Beta(alpha, alpha); 0 disables it."""
    cutmix_share: float = 0.5
    """Probability of CutMix instead of mixup if both are enabled."""
    head_scale: float = 0.001
    """Factor on the classifier's initial weights; a small one limits the first updates of a pretrained backbone."""

    def __post_init__(self) -> None:
        check_range(self, "smoothing", "cutmix_share", prefix="method.", least=0, most=1)
        check_range(self, "mixup", "cutmix", prefix="method.", least=0)
        check_range(self, "head_scale", prefix="method.", above=0)

    def build(self, context: BuildContext) -> "Supervised":
        """Return the backbone with a linear classifier. Raise UserError if there are fewer than two classes."""
        if context.classes < 2:
            raise UserError(f"A classifier needs labels of at least 2 classes, got {context.classes}.")
        backbone = context.build_backbone()
        head = nn.Linear(backbone.embed_dim, context.classes)
        init_weights(head)
        head.weight.data.mul_(self.head_scale)
        return Supervised(Network(backbone, head), self, context.seed)

    @property
    def supports_grad_accumulation(self) -> bool:
        """True without mixup and CutMix, which mix images of the whole batch."""
        return self.mixup == self.cutmix == 0

    def filter_dataset(self, dataset: ImageDataset) -> ImageDataset:
        """Return the labeled images. Raise UserError if there are none."""
        labeled = np.flatnonzero([] if dataset.labels is None else dataset.labels >= 0)
        if not len(labeled):
            raise UserError("Supervised training needs labels: put the images of each class in a folder of its own.")
        return dataset if len(labeled) == len(dataset) else dataset.subset(labeled)


class Mix(NamedTuple):
    """The parameters of mixup or CutMix in one step."""

    weight: float = 1.0
    """lambda, the weight of an image's own label."""
    box: tuple[int, int, int, int] | None = None
    """CutMix: top, bottom, left and right of the box that is replaced; None: mixup."""


class Supervised(Method):
    """A backbone and a linear classifier."""

    def __init__(self, network: Network, config: SupervisedConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.network, self.seed = config, network, seed

    def forward(self, batch: Batch, clock: Clock, targets: None = None) -> Outputs:
        """Return H(targets, softmax(logits)) of the mixed views of the first resolution.

        The mix is a function of (seed, step), so that it is equal on all ranks and after a resume.
        """
        assert batch.labels is not None, "filter_dataset selects labeled images"
        views, num_classes = batch.views[0], len(self.network.head.get_parameter("bias"))
        smoothed = smooth_labels(batch.labels, num_classes, self.config.smoothing)
        mix = draw_mix(self.config, views.shape[-2], views.shape[-1], mix_rng(self.seed, clock.step))
        logits = self.network([mix_images(views, mix)])
        loss = H(mix_targets(smoothed, mix), log_P(logits, 1.0)).mean()
        return Outputs(loss, None, {"loss": loss.detach()})

    @property
    def trainable(self) -> Network:
        """Backbone and classifier."""
        return self.network

    classifier = trainable


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return targets with 1 - smoothing for the label plus smoothing / C for each class, [B] -> [B, C]."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def draw_mix(config: SupervisedConfig, height: int, width: int, rng: np.random.Generator) -> Mix:
    """Return mixup or CutMix parameters for one step, as DeiT's batch mode: lambda from a Beta distribution.

    CutMix's box has the area 1 - lambda around a uniform center. It is clipped to the image, and lambda is adjusted.
    """
    use_cutmix = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.cutmix_share)
    alpha = config.cutmix if use_cutmix else config.mixup
    if alpha == 0:
        return Mix()
    weight = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return Mix(weight)
    box_height, box_width = (int(side * math.sqrt(1 - weight)) for side in (height, width))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - box_height // 2), min(height, y + box_height // 2)
    left, right = max(0, x - box_width // 2), min(width, x + box_width // 2)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def partners(values: Tensor, dim: int = 0) -> Tensor:
    """Return the entry half a batch further for each of B images, so that pairs are mixed with each other.

    DeiT reverses the batch. Here both images of a pair are on the same rank (position p is on rank p mod world size),
    so that results do not depend on the number of ranks.
    """
    return values.roll(values.shape[dim] // 2, dims=dim)


def mix_images(views: Tensor, mix: Mix) -> Tensor:
    """Return each image mixed with its partner by interpolation (mixup) or a box (CutMix), [n, B, 3, H, W]."""
    if mix.weight == 1:
        return views
    other = partners(views, dim=1)
    if mix.box is None:
        return torch.lerp(other, views, mix.weight)
    top, bottom, left, right = mix.box
    views = views.clone()
    views[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return views


def mix_targets(targets: Tensor, mix: Mix) -> Tensor:
    """Return each target mixed with its partner's, weighted as the images, [B, C]."""
    return torch.lerp(partners(targets), targets, mix.weight)
