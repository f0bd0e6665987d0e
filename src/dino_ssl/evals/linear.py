"""Linear classification on frozen features (Sec. 4.1, Table 2, Appendix F.2): a sweep of learning rates, trained
side by side in one pass over the pictures, chosen among on training pictures alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import eval_batches
from dino_ssl.data.sources import DatasetSource, described, labelled_alone, labelled_pair
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import VAL, EvalContext, Scores, Source, evaluating
from dino_ssl.evals.crop_features import Course, Extract, fresh_crops, stored_crops
from dino_ssl.evals.linear_heads import Heads, class_rank
from dino_ssl.models.backbone import Attentive, Backbone

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""For a batch of 256. The authors sweep too and publish no values; their script's default is 1e-3, and the log of
their ResNet-50 starts at 0.3."""


class FeatureSpec(NamedTuple):
    """Which frozen feature the classifier sees."""

    blocks: int
    """The last blocks, whose [CLS] tokens stand side by side."""
    patches: bool
    """And, behind them, the mean of the last block's patches."""


def paper_look(backbone: Backbone) -> FeatureSpec:
    """Appendix F.2: four [CLS] for ViT-S; [CLS] and the mean of the patches for ViT-B; what a ConvNet pools.

    Any ViT narrower than ViT-B counts as a small one. XCiT, which is no plain ViT, gives its [CLS].
    """
    if not isinstance(backbone, Attentive):
        return FeatureSpec(1, False)
    return FeatureSpec(min(4, backbone.num_blocks), False) if backbone.embed_dim < 768 else FeatureSpec(1, True)


def frozen_feature(backbone: Backbone, images: Tensor, look: FeatureSpec) -> Tensor:
    """Normalised images [B, 3, H, W] -> [B, D] float32 (Appendix F.2)."""
    if look == FeatureSpec(1, False):
        return backbone(images).float()
    last = backbone.features(images, look.blocks)
    parts = [block.cls for block in last] + ([last[-1].patches.mean((1, 2))] if look.patches else [])
    return torch.cat(parts, dim=1).float()


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Accuracy of a linear classifier on frozen features (Appendix F.2), its learning rate chosen without VAL."""

    name: ClassVar[str] = "linear"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("TRAIN", "Folder of class folders that the classifier is trained on; `scenes` draws pictures."),
        VAL,
    )
    paper: ClassVar[str] = "Table 2, Appendix F.2"
    examples: ClassVar[str] = """\
  dino eval linear runs/photos photos/                 one folder: a part of every class is held back
  dino eval linear runs/photos photos_train/ photos_val/
  dino eval linear dino_vits16 imagenet/train imagenet/val --crops 0     a fresh crop every epoch, as in the paper
  dino eval linear timm:resnet50 photos/ --lr 0.1 0.3 1"""

    epochs: int = 100
    """Times that every picture is seen."""
    crops: int = 5
    """Random crops of each picture whose features are made once and then seen in turn. 0 makes a new crop in every
    epoch, as in the paper, for as many forward passes as epochs."""
    batch: int = 1024
    """Pictures in one step of the classifier, over all ranks; all of them where there are fewer."""
    lr: tuple[float, ...] = LRS
    """Learning rates for a batch of 256, scaled by the batch. Each trains a classifier; one is chosen."""
    weight_decay: tuple[float, ...] = (0.0,)
    """Weight decays; each is tried with each learning rate."""
    momentum: float = 0.9
    """Of SGD."""
    choosing: float = 0.1
    """Share of every class of TRAIN that the choice is made on; the classifier that is reported learns from it too."""
    val_fraction: float = 0.2
    """Share of every class that is asked about, where there is no VAL."""
    blocks: int | None = None
    """Last blocks whose [CLS] the classifier sees; without it 4 of a ViT narrower than ViT-B, 1 of others."""
    patches: bool | None = None
    """Whether it sees the mean of the patches too; without it (and without blocks) for ViT-B and wider."""
    size: int | None = None
    """Side in pixels of what the network sees; without it, what it was trained on."""
    seed: int = 0
    """Of the crops, the order, the first weights, and of what is held back."""

    def __post_init__(self) -> None:
        check_range(self, "epochs", "batch", "blocks", "size", least=1)
        check_range(self, "crops", "seed", least=0)
        check_range(self, "choosing", "val_fraction", above=0, below=1)
        check_range(self, "momentum", least=0, below=1)
        if not self.lr or not min(self.lr) > 0:
            raise UserError(f"--lr needs rates above 0; got {' '.join(map(str, self.lr)) or 'none'}.")
        if not self.weight_decay or not min(self.weight_decay) >= 0:
            shown = " ".join(map(str, self.weight_decay)) or "none"
            raise UserError(f"--weight-decay needs values of 0 or more; got {shown}.")

    @property
    def sweep(self) -> list[tuple[float, float]]:
        """(learning rate for a batch of 256, weight decay) of every setting."""
        return list(product(self.lr, self.weight_decay))

    def look(self, backbone: Backbone) -> FeatureSpec:
        """The paper's for this network, unless blocks or patches say otherwise."""
        rule = paper_look(backbone)
        blocks = rule.blocks if self.blocks is None else self.blocks
        patches = rule.patches and self.blocks is None
        return FeatureSpec(blocks, patches if self.patches is None else self.patches)

    def bind(self, sources: Sequence[DatasetSource], context: EvalContext) -> "BoundLinear":
        with context.progress("looking at the pictures") as done:
            pair = labelled_pair(*sources, val_fraction=self.val_fraction, seed=self.seed, progress=done)
        return BoundLinear(self, *labelled_alone(pair, "A linear classifier"), context)


@dataclass(frozen=True)
class BoundLinear:
    """The evaluator: the settings with the pictures, and where it works."""

    settings: Linear
    train: ImageDataset
    val: ImageDataset
    context: EvalContext
    name: str = "linear"

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        return {"train": described(self.train), "val": described(self.val)}

    @property
    def size(self) -> int:
        return self.settings.size or self.context.size

    def __call__(self, backbone: Backbone) -> Scores:
        """{"top-1": percent, "top-5": percent}, the same on every rank; `details` tells the whole sweep."""
        asked, look, held = self.settings, self.settings.look(backbone), self.held()

        def extract(images: Tensor) -> Tensor:
            with self.context.autocast():
                return frozen_feature(backbone, normalize(images.to(self.context.device, non_blocking=True)), look)

        with evaluating(backbone), torch.random.fork_rng(devices=[]):  # loaders draw a seed: give it back
            width = extract(torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8)).shape[1]
            heads = self.fit(extract, width, held)
            best, table = self.choose(heads, extract, held)
            top1, top5 = self.accuracy(heads, extract, self.val, "pictures asked about")
        lr, decay = asked.sweep[best]
        details = {
            "feature": {**look._asdict(), "width": width},
            "chosen": {"lr": lr, "weight_decay": decay},
            "at_the_edge": len(asked.lr) > 1 and lr in (min(asked.lr), max(asked.lr)),  # a rate beyond may be better
            "sweep": table,
        }
        best -= len(asked.sweep)  # of the twins the later one, which learnt from all training pictures
        return Scores({"top-1": top1[best], "top-5": top5[best]}, details)

    def held(self) -> np.ndarray:
        """[N] bool: the training pictures that the choice is made on; none where there is nothing to choose."""
        if len(self.settings.sweep) == 1:
            return np.zeros(len(self.train), dtype=bool)
        _, part = self.train.split(self.settings.choosing, self.settings.seed)
        if not len(part):
            raise UserError(
                "The choice among learning rates holds training pictures back, and no class has two. "
                f"Give more pictures, or a single rate: --lr {self.settings.lr[0]:g}"
            )
        return np.isin(self.train.names, part.names)

    def fit(self, extract: Extract, width: int, held: np.ndarray) -> Heads:
        """Trains twins of every setting in one pass: first those that do not see `held`, then those that see all."""
        asked, n, device = self.settings, len(self.train), self.context.device
        twins = 2 if held.any() else 1
        heads = Heads(
            width,
            len(self.train.classes),
            [lr * min(asked.batch, n) / 256 for lr, _ in asked.sweep] * twins,
            [decay for _, decay in asked.sweep] * twins,
            momentum=asked.momentum,
            seed=asked.seed,
            device=device,
        )
        seen = torch.ones(n, twins, len(asked.sweep), dtype=torch.bool)
        seen[torch.from_numpy(held), 0] = False
        labels, seen = torch.as_tensor(self.train.labels), seen.flatten(1)
        course = Course(self.train, self.size, asked.batch, asked.epochs, asked.seed, self.context)
        steps = (
            stored_crops(course, extract, width, asked.crops) if asked.crops else fresh_crops(course, extract, width)
        )
        with self.context.progress("training the classifiers") as progress:
            done = 0
            for epoch, rows, features in steps:
                factor = 0.5 * (1 + math.cos(math.pi * epoch / asked.epochs))  # a value per epoch, towards 0
                heads.step(features.to(device), labels[rows].to(device), seen[rows].to(device), factor)
                done += len(rows)
                progress(done, asked.epochs * len(course.mine()))
        return heads

    def choose(self, heads: Heads, extract: Extract, held: np.ndarray) -> tuple[int, list[dict[str, float]]]:
        """The setting that does best on the training pictures held back, the first of equals; and how all do."""
        table = [{"lr": lr, "weight_decay": decay} for lr, decay in self.settings.sweep]
        if not held.any():
            return 0, table
        dataset = self.train.subset(np.flatnonzero(held))
        top1 = self.accuracy(heads, extract, dataset, "pictures to choose the rate by")[0][: len(table)]
        for row, accuracy in zip(table, top1, strict=True):
            row["top-1 on training pictures held back"] = accuracy
        return top1.index(max(top1)), table

    def accuracy(self, heads: Heads, extract: Extract, dataset: ImageDataset, label: str) -> list[list[float]]:
        """[top-1, top-5] of every classifier in percent, on center crops of the readable pictures."""
        labels, device = torch.as_tensor(dataset.labels), self.context.device
        classes = len(self.train.classes)
        mine = np.arange(distributed.rank(), len(dataset), distributed.world_size())
        hits = torch.zeros(2, heads.weights.shape[1] + 1, dtype=torch.int64, device=device)
        with self.context.progress(label) as progress:
            done = 0
            for rows, images in eval_batches(dataset, self.size, self.context.batch_size, self.context.workers, mine):
                if len(rows):
                    place = class_rank(heads.logits(extract(images)), labels[rows].to(device))
                    place = F.pad(place, (0, 1))  # one more classifier, always right: it counts the pictures
                    hits += torch.stack([(place < min(top, classes)).sum(0) for top in (1, 5)])
                done += len(rows)
                progress(done, len(mine))
        hits = distributed.all_reduce_sum(hits).double()
        return (100 * hits[:, :-1] / hits[:, -1:].clamp(min=1)).tolist()
