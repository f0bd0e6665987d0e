"""Linear classification on frozen features (Sec. 4.1, Table 2, Appendix F.2).

All learning rates are trained in one pass over the images. The best one is selected on held-out training images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import DatasetSource, described, labelled_alone, labelled_pair
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.accuracy import accuracies
from dino_ssl.evals.base import VAL, EvalContext, Evaluation, PreparedEval, Scores, Source, evaluating
from dino_ssl.evals.crop_features import CropPlan, Extract, fresh_crops, stored_crops
from dino_ssl.evals.linear_heads import LinearHeads, class_rank
from dino_ssl.models.backbone import Attentive, Backbone

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""For a batch of 256. The authors sweep too but publish no values: their script's default is 1e-3, and the log of
their ResNet-50 starts at 0.3."""


class FeatureSpec(NamedTuple):
    """The frozen feature that the classifier is trained on."""

    blocks: int
    """Number of last blocks whose [CLS] tokens are concatenated."""
    patches: bool
    """Append the mean of the last block's patch tokens."""


def paper_feature(backbone: Backbone) -> FeatureSpec:
    """Appendix F.2: four [CLS] tokens for ViT-S; [CLS] and mean patch token for ViT-B; the pooled feature of a ConvNet.

    Any ViT with fewer than 768 dimensions counts as small. XCiT is not a plain ViT; its [CLS] token is used.
    """
    if not isinstance(backbone, Attentive):
        return FeatureSpec(1, False)
    return FeatureSpec(min(4, backbone.num_blocks), False) if backbone.embed_dim < 768 else FeatureSpec(1, True)


def frozen_feature(backbone: Backbone, images: Tensor, spec: FeatureSpec) -> Tensor:
    """Appendix F.2: normalized images [B, 3, H, W] -> [B, D] float32."""
    if spec == FeatureSpec(1, False):
        return backbone(images).float()
    features = backbone.features(images, spec.blocks)
    parts = [block.cls for block in features] + ([features[-1].patches.mean((1, 2))] if spec.patches else [])
    return torch.cat(parts, dim=1).float()


@dataclass(frozen=True, kw_only=True)
class Linear(Evaluation):
    """Accuracy of a linear classifier on frozen features (Appendix F.2); its learning rate is selected without VAL."""

    name: ClassVar[str] = "linear"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("TRAIN", "Folder of class folders that the classifier is trained on; `scenes` generates images."),
        VAL,
    )
    paper: ClassVar[str] = "Table 2, Appendix F.2"
    examples: ClassVar[str] = """\
  dino eval linear runs/photos photos/                 one folder: a part of every class is held out
  dino eval linear runs/photos photos_train/ photos_val/
  dino eval linear dino_vits16 imagenet/train imagenet/val --crops 0     new crops in every epoch, as in the paper
  dino eval linear timm:resnet50 photos/ --lr 0.1 0.3 1"""

    epochs: int = 100
    """Training epochs."""
    crops: int = 5
    """Random crops per image whose features are extracted once and reused. 0: new crops in every epoch, as in the
    paper, with one forward pass per image and epoch."""
    batch: int = 1024
    """Batch size of the classifier's training, over all ranks; at most the number of images."""
    lr: tuple[float, ...] = LRS
    """Learning rates for a batch of 256, scaled linearly with the batch size. The best one is selected."""
    weight_decay: tuple[float, ...] = (0.0,)
    """Weight decays; each is combined with each learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    tune_fraction: float = 0.1
    """Fraction of every class of TRAIN on which the learning rate is selected; the final classifier uses it too."""
    val_fraction: float = 0.2
    """Fraction of every class that is held out for validation if VAL is not given."""
    blocks: int | None = None
    """Last blocks whose [CLS] tokens are used; default: 4 for a ViT narrower than ViT-B, otherwise 1."""
    patches: bool | None = None
    """Append the mean patch token; default: for ViT-B and wider, unless the number of blocks is given."""
    size: int | None = None
    """Side of the crops in pixels; default: the size that the network was trained at."""
    seed: int = 0
    """Seed of crops, order, initial weights and held-out images."""

    def __post_init__(self) -> None:
        if not self.lr or not self.weight_decay:
            raise UserError("`lr` and `weight_decay` need at least one value each, for example 0.1 and 0.")
        check_range(self, "epochs", "batch", "blocks", "size", least=1)
        check_range(self, "crops", "seed", "weight_decay", least=0)
        check_range(self, "tune_fraction", "val_fraction", above=0, below=1)
        check_range(self, "lr", above=0)
        check_range(self, "momentum", least=0, below=1)

    @property
    def sweep(self) -> list[tuple[float, float]]:
        """(learning rate for a batch of 256, weight decay) of every configuration."""
        return list(product(self.lr, self.weight_decay))

    def feature_spec(self, backbone: Backbone) -> FeatureSpec:
        """Return the paper's feature for this network, changed by `blocks` and `patches` if they are set."""
        default = paper_feature(backbone)
        blocks = default.blocks if self.blocks is None else self.blocks
        patches = default.patches and self.blocks is None
        return FeatureSpec(blocks, patches if self.patches is None else self.patches)

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open the labeled images."""
        with context.progress("reading the datasets") as progress:
            pair = labelled_pair(*sources, val_fraction=self.val_fraction, seed=self.seed, progress=progress)
        train, val = labelled_alone(pair, "A linear classifier")
        return PreparedEval(
            name=self.name,
            data={"train": described(train), "val": described(val)},
            score=lambda backbone: self._score(backbone, train, val, context),
        )

    def _score(self, backbone: Backbone, train: ImageDataset, val: ImageDataset, context: EvalContext) -> Scores:
        """Train the sweep, select a configuration, and return its top-1 and top-5 accuracy in percent."""
        spec, size, tune_mask = self.feature_spec(backbone), self.size or context.size, self.tune_mask(train)

        def extract(images: Tensor) -> Tensor:
            with context.autocast():
                return frozen_feature(backbone, normalize(images.to(context.device, non_blocking=True)), spec)

        def hits(images: Tensor, labels: Tensor) -> Tensor:
            ranks = class_rank(heads.logits(extract(images)), labels)
            return torch.stack([(ranks < min(top, len(train.classes))).sum(0) for top in (1, 5)])

        with evaluating(backbone), torch.random.fork_rng(devices=[]):  # data loaders draw a seed
            width = extract(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
            heads = self.fit(train, tune_mask, extract, width, context)
            count, best = heads.weights.shape[1], 0
            table = [{"lr": lr, "weight_decay": decay} for lr, decay in self.sweep]
            if tune_mask.any():
                tune = train.subset(np.flatnonzero(tune_mask))
                top1, _ = accuracies(hits, count, tune, size, context, "accuracy on held-out training images")
                top1 = top1[: len(table)]  # the classifiers that were not trained on them
                best = top1.index(max(top1))
                for row, accuracy in zip(table, top1, strict=True):
                    row["top-1 on held-out training images"] = accuracy
            top1, top5 = accuracies(hits, count, val, size, context, "accuracy on validation images")
        lr = table[best]["lr"]
        details = {
            "feature": {**spec._asdict(), "width": width},
            "selected": {"lr": lr, "weight_decay": table[best]["weight_decay"]},
            "lr_at_sweep_edge": len(self.lr) > 1 and lr in (min(self.lr), max(self.lr)),
            "sweep": table,
        }
        final = best - len(table)  # the classifier of the same configuration that was trained on all images
        return Scores({"top-1": top1[final], "top-5": top5[final]}, details)

    def tune_mask(self, train: ImageDataset) -> np.ndarray:
        """Return bool [N]: training images on which the learning rate is selected; none for a sweep of one."""
        if len(self.sweep) == 1:
            return np.zeros(len(train), dtype=bool)
        _, tune = train.split(self.tune_fraction, self.seed)
        if not len(tune):
            raise UserError(
                "Selecting a learning rate needs held-out training images, but no class has two images. "
                f"Add images, or give a single learning rate: `lr` {self.lr[0]:g}"
            )
        return np.isin(train.names, tune.names)

    def fit(
        self, train: ImageDataset, tune_mask: np.ndarray, extract: Extract, width: int, context: EvalContext
    ) -> LinearHeads:
        """Train the sweep twice in one pass: first classifiers without the images of `tune_mask`, then with all."""
        n, device, copies = len(train), context.device, 2 if tune_mask.any() else 1
        heads = LinearHeads(
            width,
            len(train.classes),
            [lr * min(self.batch, n) / 256 for lr, _ in self.sweep] * copies,
            [decay for _, decay in self.sweep] * copies,
            momentum=self.momentum,
            seed=self.seed,
            device=device,
        )
        mask = torch.ones(n, copies, len(self.sweep), dtype=torch.bool)
        mask[torch.from_numpy(tune_mask), 0] = False
        labels, mask = torch.as_tensor(train.labels), mask.flatten(1)
        plan = CropPlan(train, self.size or context.size, self.batch, self.epochs, self.seed, context)
        batches = stored_crops(plan, extract, width, self.crops) if self.crops else fresh_crops(plan, extract, width)
        with context.progress("training the classifiers") as progress:
            done = 0
            for epoch, rows, features in batches:
                factor = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))  # cosine, one value per epoch
                heads.step(features.to(device), labels[rows].to(device), mask[rows].to(device), factor)
                done += len(rows)
                progress(done, self.epochs * len(plan.shard()))
        return heads
