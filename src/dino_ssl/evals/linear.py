"""Linear classification on frozen features (Sec. 4.1, Table 2, Appendix F.2).

All learning rates are trained in one pass over the images. The best one is selected on held-out training images.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import crop_batches, epoch_order, eval_batches
from dino_ssl.data.sources import described, labeled_only
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.base import EvalContext, LabeledEvaluation, PreparedEval, Scores, evaluating, full_precision
from dino_ssl.models.backbone import Attentive, Backbone
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.runtime import machine, machine_memory

Extract = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] -> features [B, D] float32 on the device."""
MOMENTUM = 0.9
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""For a batch of 256. The authors sweep too but publish no values: their script's default is 1e-3, and the log of
their ResNet-50 starts at 0.3."""


class FeatureSpec(NamedTuple):
    """The frozen feature that the classifier is trained on."""

    blocks: int  # number of last blocks whose [CLS] tokens are concatenated
    patches: bool  # append the mean of the last block's patch tokens


def frozen_feature(backbone: Backbone, images: Tensor, spec: FeatureSpec) -> Tensor:
    """Appendix F.2: normalized images [B, 3, H, W] -> [B, D] float32."""
    if spec == FeatureSpec(1, False):
        return backbone(images).float()
    features = backbone.features(images, spec.blocks)
    parts = [block.cls for block in features] + ([features[-1].patches.mean((1, 2))] if spec.patches else [])
    return torch.cat(parts, dim=1).float()


class LinearHeads:
    """T softmax classifiers of C classes on one feature [D], each with its own learning rate, trained by SGD.

    All start from the same weights, N(0, 0.01), and zero biases, so each equals the classifier trained alone. One
    matmul serves all of them.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        lr: Sequence[float],  # [T], for the actual batch size
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        initial = 0.01 * torch.randn(width, 1, classes, generator=torch.Generator().manual_seed(seed))
        initial = torch.cat([initial, torch.zeros(1, 1, classes)])  # the last row is the bias
        self.weights = initial.repeat(1, len(lr), 1).to(device)  # [D + 1, T, C]
        self.velocity = torch.zeros_like(self.weights)
        self.lr, self.weight_decay = torch.tensor(lr, device=device)[:, None], weight_decay

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of every classifier in float32: [B, D] -> [B, T, C]."""
        with full_precision(features.device):
            return (_append_one(features) @ self.weights.flatten(1)).unflatten(1, self.weights.shape[1:])

    def step(self, features: Tensor, labels: Tensor, mask: Tensor, factor: float = 1.0) -> None:
        """Update as torch.optim.SGD does: v <- momentum v + gradient + decay w; w <- w - factor lr v.

        The gradient x^T (softmax - one-hot) / n is that of the mean cross-entropy over the n images of all ranks for
        which `mask` is set: [B, D], [B], bool [B, T]. factor: the learning rate schedule, relative to the peak.
        """
        residual = self.logits(features).softmax(-1)
        residual[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        residual *= (mask / distributed.all_reduce_sum(mask.sum(0)).clamp(min=1))[..., None]
        with full_precision(features.device):
            gradient = distributed.all_reduce_sum(_append_one(features).T @ residual.flatten(1))
        with torch.no_grad():
            gradient = gradient.unflatten(1, self.weights.shape[1:]) + self.weight_decay * self.weights
            self.velocity.mul_(MOMENTUM).add_(gradient)
            self.weights -= factor * self.lr * self.velocity


def _append_one(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)


def class_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of the true class, 0 for the largest logit: [B, T, C], [B] -> [B, T].

    Equal logits are ranked by ascending class. With non-finite logits, the true class is not among the first five.
    """
    true_logits = logits.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1))
    classes = torch.arange(logits.shape[2], device=logits.device)
    before = (logits > true_logits) | ((logits == true_logits) & (classes < labels[:, None, None]))
    return before.sum(2).masked_fill(~logits.isfinite().all(2), max(5, logits.shape[2]))


def accuracies(
    logits: Callable[[Tensor], Tensor],
    classifiers: int,
    dataset: ImageDataset,
    transform: Preprocessing,
    context: EvalContext,
    label: str,
) -> list[list[float]]:
    """Return [top-1, top-5] of each classifier in percent, on center crops of the readable images with a label.

    logits: uint8 images [B, 3, size, size] -> [B, classifiers, C] on the device.
    """
    assert dataset.labels is not None
    labels, done, total = torch.as_tensor(dataset.labels), 0, torch.zeros(1, dtype=torch.int64, device=context.device)
    shard = np.flatnonzero(dataset.labels >= 0)[distributed.rank() :: distributed.world_size()]
    correct = torch.zeros(2, classifiers, dtype=torch.int64, device=context.device)
    with context.progress(label) as progress:
        for rows, images in eval_batches(dataset, transform, context.batch_size, context.workers, shard):
            if len(rows):
                ranks = class_rank(logits(images), labels[rows].to(context.device))
                correct += torch.stack([(ranks < top).sum(0) for top in (1, 5)])
            done += len(rows)
            progress(done, len(shard))
    correct = distributed.all_reduce_sum(correct).double()
    return (100 * correct / distributed.all_reduce_sum(total + done).clamp(min=1)).tolist()


@dataclass(frozen=True, kw_only=True)
class Linear(LabeledEvaluation):
    """Accuracy of a linear classifier on frozen features: its learning rate is selected without VAL."""

    name: ClassVar[str] = "linear"
    paper: ClassVar[str] = "Table 2, Appendix F.2"
    examples: ClassVar[str] = """\
  dino eval linear runs/photos photos/                 one folder: a part of every class is held out
  dino eval linear dino_vits16 imagenet/train imagenet/val --crops 0     new crops in every epoch, as in the paper
  dino eval linear timm:resnet50 photos/ --lr 0.1 0.3 1"""

    epochs: int = 100
    """Training epochs."""
    crops: int = 5
    """Random crops per image whose features are extracted once and kept in memory: 4 bytes x crops x images x
    dimensions over all ranks. 0: new crops in every epoch, as in the paper, with one forward pass per image and
    epoch."""
    batch: int = 1024
    """Batch size of the classifier's training, over all ranks; at most the number of images."""
    lr: tuple[float, ...] = LRS
    """Learning rates for a batch of 256, scaled linearly with the batch size. The best one is selected."""
    weight_decay: float = 0.0
    """Weight decay."""
    tune_fraction: float = 0.1
    """Fraction of every class of TRAIN on which the learning rate is selected; the final classifier uses it too."""
    blocks: int | None = None
    """Last blocks whose [CLS] tokens are used; default: 4 for a ViT narrower than ViT-B, otherwise 1."""
    patches: bool | None = None
    """Append the mean patch token; default: for ViT-B and wider, unless the number of blocks is given."""
    seed: int = 0
    """Seed of crops, order, initial weights and the images that select the learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr:
            raise UserError("`lr` needs at least one value, for example 0.1.")
        check_range(self, "epochs", "batch", "blocks", least=1)
        check_range(self, "crops", "seed", "weight_decay", least=0)
        check_range(self, "tune_fraction", above=0, below=1)
        check_range(self, "lr", above=0)

    def feature_spec(self, backbone: Backbone) -> FeatureSpec:
        """Return the feature of Appendix F.2, or the one that `blocks` and `patches` define.

        The paper: four [CLS] tokens for ViT-S; [CLS] and mean patch token for ViT-B; the pooled feature of a ConvNet.
        Any ViT with fewer than 768 dimensions counts as small. XCiT is not a plain ViT; its [CLS] token is used.
        """
        is_small = backbone.embed_dim < 768
        blocks = min(4, backbone.num_blocks) if isinstance(backbone, Attentive) and is_small else 1
        patches = isinstance(backbone, Attentive) and not is_small and self.blocks is None
        return FeatureSpec(self.blocks or blocks, patches if self.patches is None else self.patches)

    def prepare_datasets(self, train: ImageDataset, val: ImageDataset, context: EvalContext) -> PreparedEval:
        """Prepare the evaluation on the labeled images of both datasets."""
        train, val = labeled_only((train, val), "A linear classifier")
        return PreparedEval(
            name=self.name,
            data={"train": described(train), "val": described(val)},
            score=lambda backbone: self._score(backbone, train, val, context),
        )

    def _score(self, backbone: Backbone, train: ImageDataset, val: ImageDataset, context: EvalContext) -> Scores:
        """Train the sweep, select a learning rate, and return its top-1 and top-5 accuracy in percent."""
        spec, tune_mask = self.feature_spec(backbone), self.tune_mask(train)
        transform = replace(backbone.transform, size=self.size or context.size)
        train = train.with_bit_depth(transform.bit_depth)  # `val` is by `eval_batches`

        def extract(images: Tensor) -> Tensor:
            with context.autocast():
                pixels = images.to(context.device, non_blocking=True)
                return frozen_feature(backbone, transform.normalize(pixels), spec)

        def logits(images: Tensor) -> Tensor:
            return heads.logits(extract(images))

        with evaluating(backbone), torch.random.fork_rng(devices=[]):  # data loaders draw a seed
            width = extract(torch.zeros(1, 3, transform.size, transform.size, dtype=torch.uint8)).shape[1]
            heads = self.fit(train, tune_mask, extract, width, context)
            count, best = heads.weights.shape[1], 0
            table = [{"lr": lr} for lr in self.lr]
            if tune_mask.any():
                tune = train.subset(np.flatnonzero(tune_mask))
                top1, _ = accuracies(logits, count, tune, transform, context, "accuracy on held-out training images")
                top1 = top1[: len(table)]  # the classifiers that were not trained on them
                best = top1.index(max(top1))
                for row, accuracy in zip(table, top1, strict=True):
                    row["top-1 on held-out training images"] = accuracy
            top1, top5 = accuracies(logits, count, val, transform, context, "accuracy on validation images")
        final = best - len(table)  # the classifier of the same learning rate that was trained on all images
        details = {"feature": {**spec._asdict(), "width": width}, "selected": {"lr": self.lr[best]}, "sweep": table}
        return Scores({"top-1": top1[final], "top-5": top5[final]}, details)

    def tune_mask(self, train: ImageDataset) -> np.ndarray:
        """Return bool [N]: training images on which the learning rate is selected; none for a single one."""
        if len(self.lr) == 1:
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
        rates = [lr * min(self.batch, n) / 256 for lr in self.lr] * copies
        heads = LinearHeads(width, len(train.classes), rates, self.weight_decay, seed=self.seed, device=device)
        mask = torch.ones(n, copies, len(self.lr), dtype=torch.bool)
        mask[torch.from_numpy(tune_mask), 0] = False
        labels, mask, done = torch.as_tensor(train.labels), mask.flatten(1), 0
        with context.progress("training the classifiers") as progress:
            for epoch, rows, features in self.crop_features(train, extract, width, context):
                factor = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))  # cosine, one value per epoch
                heads.step(features.to(device), labels[rows].to(device), mask[rows].to(device), factor)
                done += len(rows)
                progress(done, -(-self.epochs * n // distributed.world_size()))
        return heads

    def crop_features(
        self, train: ImageDataset, extract: Extract, width: int, context: EvalContext
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (epoch, indices [b], features [b, D]) of every training step: this rank's readable images.

        Image i belongs to rank i mod world size, so features never move between ranks. Those of the first `crops`
        epochs are stored and used again in turn; with 0, every epoch has new crops.
        """
        world_size, crops = distributed.world_size(), self.crops or self.epochs
        shape, memory = (self.crops, -(-len(train) // world_size), width), machine_memory() / machine().ranks
        if (size := 4 * math.prod(shape)) > memory:
            raise UserError(
                f"The features of {self.crops} crops of {shape[1]} images take {size / 2**30:.1f} GiB of memory; "
                f"{memory / 2**30:.1f} GiB exist. Set `crops` to a smaller number, or to 0 (new crops in every epoch)."
            )
        store = torch.empty(shape)
        is_readable = torch.zeros(store.shape[:2], dtype=torch.bool)

        def steps() -> Iterator[tuple[int, np.ndarray]]:
            for epoch in range(self.epochs):
                order = epoch_order(self.seed, epoch, len(train))
                for step in _chunks(order, self.batch):
                    yield epoch, step[step % world_size == distributed.rank()]

        jobs = ((e, part) for e, indices in steps() if e < crops for part in _chunks(indices, context.batch_size))
        batches = crop_batches(train, self.size or context.size, jobs, seed=self.seed, workers=context.workers)
        for epoch, indices in steps():
            if epoch < crops:
                parts = [(torch.empty(0, dtype=torch.int64), torch.empty(0, width, device=context.device))]
                for readable, images in islice(batches, len(_chunks(indices, context.batch_size))):
                    if len(readable):
                        parts.append((readable, extract(images)))
                rows, features = (torch.cat(part) for part in zip(*parts, strict=True))
                if self.crops:
                    store[epoch, rows // world_size] = features.cpu()
                    is_readable[epoch, rows // world_size] = True
            else:
                rows = torch.from_numpy(indices)
                rows = rows[is_readable[epoch % crops, rows // world_size]]
                features = store[epoch % crops, rows // world_size]
            yield epoch, rows, features


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
