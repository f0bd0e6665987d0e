"""Semantic segmentation from image-level labels: masks found without labels become the training data of a linear head.

A patch inside the mask of an image with one class gets that class, other patches are background. A linear classifier of
patches learns these pseudo-labels and is scored on images with true masks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.benchmarks.voc import CLASSES as VOC_CLASSES
from dino_ssl.data.benchmarks.voc import VOC, Masked, open_voc
from dino_ssl.data.dataset import BadImage, ImageDataset, spaced_indices
from dino_ssl.data.masks import BACKGROUND, VOID
from dino_ssl.data.sources import DatasetSource, annotated, folder_path, open_dataset
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.attention_maps import attention_size, network_input, resize_to_patches
from dino_ssl.evals.base import EvalContext, Evaluation, PreparedEval, Scores, Source
from dino_ssl.evals.features import gather_rows, weights_hash
from dino_ssl.evals.knn import knn_votes
from dino_ssl.evals.nearest import top_k
from dino_ssl.evals.object_masks import ObjectMasks
from dino_ssl.evals.segmentation_head import SegmentationHead, feature_maps, fit_head
from dino_ssl.models.backbone import Attentive, Backbone
from dino_ssl.progress import Progress

UNLABELED = -1
"""Pseudo-label of a patch that trains nothing."""
KNN = "k-NN"
Predictor = Callable[[Tensor], Tensor]
"""Feature maps [1, h, w, D] -> logits [1, C, h, w]."""


@dataclass(frozen=True, kw_only=True)
class WeakSegmentation(Evaluation):
    """Segmentation by a linear head that learned from masks without labels: mean IoU over classes and the background.

    Rows differ in the training data: the whole image as its class, masks of attention and of TokenCut, true masks as
    the upper bound; and k-NN on patches with the labels of TokenCut instead of a linear head.
    """

    name: ClassVar[str] = "weak-segmentation"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("TRAIN", "Folder of PASCAL VOC 2012, a folder of class folders, or `scenes`: images with classes."),
        Source("VAL", "Images with masks of the same classes; default: the val part of TRAIN.", required=False),
    )
    examples: ClassVar[str] = """\
  dino eval weak-segmentation runs/photos scenes                 synthetic images with classes and masks
  dino eval weak-segmentation dino_vits16 VOCdevkit/VOC2012 -o heads    train and val of ImageSets/Segmentation
  dino segment dino_vits16 photos/ --head heads/weak-segmentation-tokencut.safetensors"""

    max_images: int = 300
    """Largest number of training images and of validation images, evenly spaced."""
    size: int | None = None
    """Short side of the input in pixels; default: 480, or twice a training size below 224."""
    mass: float = 0.6
    """Share of the attention that its masks hold."""
    tau: float = 0.2
    """Cosine above which two patches are similar in TokenCut."""
    center: bool = True
    """Subtract the mean over the patches of the image from the keys of TokenCut."""
    regularization: float = 1e-4
    """The penalty is half of this times |W|^2, added to the mean loss over the patches."""
    k: int = 20
    """Neighbors of the k-NN on patches; 0 skips it."""
    max_patches: int = 20000
    """Largest number of patches that vote in the k-NN, evenly spaced."""

    def __post_init__(self) -> None:
        check_range(self, "max_images", "size", "max_patches", least=1)
        check_range(self, "k", least=0)
        check_range(self, "regularization", above=0)
        self.finders()

    def finders(self) -> dict[str, ObjectMasks]:
        """Return the methods that make pseudo-labels."""
        tokencut = ObjectMasks(method="tokencut", tau=self.tau, center=self.center)
        return {"attention": ObjectMasks(method="attention", mass=self.mass), "TokenCut": tokencut}

    def prepare(self, sources: Sequence[DatasetSource], context: EvalContext) -> PreparedEval:
        """Open images with classes, and others with masks."""
        train_source, *others = sources
        with context.progress("reading the datasets") as progress:
            train = _open(train_source, "train", progress)
            val = annotated(_open(others[0] if others else train_source, "val", progress), Masked, "masks")
        classes = class_names(train)
        if not classes or class_names(val) != classes:
            raise UserError(
                f"weak-segmentation expected the same classes in both datasets; got {', '.join(classes) or 'none'} and "
                f"{', '.join(class_names(val)) or 'none'}."
            )
        sets = [spaced_indices(len(part), self.max_images) for part in (train, val)]
        out = context.out or (context.cache and context.cache.parent)

        def score(backbone: Backbone, folder: Path | None) -> Scores:
            return self._score(backbone, train, val, sets, classes, context, folder)

        return PreparedEval(
            name=self.name,
            data={
                role: {"images": len(used), "classes": len(classes), "fingerprint": part.fingerprint}
                for role, part, used in zip(("train", "val"), (train, val), sets, strict=True)
            },
            score=lambda backbone: score(backbone, out),
            score_reference=lambda backbone: score(backbone, None),
        )

    def _score(
        self,
        backbone: Backbone,
        train: ImageDataset,
        val: ImageDataset,
        sets: Sequence[np.ndarray],
        classes: tuple[str, ...],
        context: EvalContext,
        folder: Path | None,
    ) -> Scores:
        """Return {"mIoU whole image": percent, ...}, equal on every rank; save the heads to `folder`."""
        size, count = self.size or attention_size(context.size), len(classes) + 1
        features, labels = self._training_patches(backbone, train, sets[0], size, context)
        heads, digest = {}, weights_hash(backbone)
        for title, target in labels.items():
            used = target != UNLABELED
            if not used.any():
                raise UserError(f"No training image has exactly one class, so `{title}` has no labels.")
            heads[title] = SegmentationHead(
                *fit_head(features[used], target[used], count, self.regularization), classes, digest, size
            )
        predictors: dict[str, Predictor] = dict(heads)
        if self.k:
            used = torch.nonzero(labels["TokenCut"] != UNLABELED)[:, 0]
            rows = used[torch.from_numpy(spaced_indices(len(used), self.max_patches))]
            memory, votes = features[rows].to(context.device), labels["TokenCut"][rows].to(context.device)
            predictors[KNN] = lambda patches: patch_votes(memory, votes, patches, self.k, count)
        confusion = self._confusion(backbone, val, sets[1], predictors, count, size, context)
        scores, per_class = {}, {}
        for title, matrix in zip(predictors, confusion, strict=True):
            iou = class_iou(matrix)
            scores[f"mIoU {title}"] = 100 * float(np.nanmean(iou))
            per_class[title] = dict(zip(("background", *classes), np.round(100 * iou, 2).tolist(), strict=True))
        files = {}
        if folder is not None and distributed.is_rank0():
            for title, head in heads.items():
                path = folder / f"{self.name}-{title.lower().replace(' ', '-')}.safetensors"
                files[title] = str(head.save(path))
        return Scores(scores, {"classes": per_class, "heads": files, "patches": len(features)})

    def _training_patches(
        self, backbone: Backbone, train: ImageDataset, indices: np.ndarray, size: int, context: EvalContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the features [P, D] of all patches, and their class by each kind of label, [P] int64."""
        finders = self.finders() if isinstance(backbone, Attentive) else {"TokenCut": self.finders()["TokenCut"]}
        titles = ["whole image", *finders, *(["true masks"] if isinstance(train, Masked) else [])]
        parts: list[Tensor] = []
        shard = indices[distributed.rank() :: distributed.world_size()]
        with context.progress("pseudo-labels") as progress:
            for done, index in enumerate(shard.tolist(), 1):
                try:
                    image, truth = train.read(index), class_mask(train, index)
                except BadImage:
                    continue
                pixels = network_input(backbone, resize_to_patches(image, size, backbone.patch)[None])
                with context.autocast():
                    patches = feature_maps(backbone, pixels)[0]
                grid = (patches.shape[0], patches.shape[1])
                number = image_class(train, index, truth)
                columns = [np.full(grid, number)]
                for find in finders.values():
                    mask = find.find(backbone, pixels)[0].masks
                    columns.append(np.where(mask.any(0), number, BACKGROUND) if number > 0 else np.full(grid, number))
                if truth is not None:
                    columns.append(patch_classes(truth, grid))
                table = torch.from_numpy(np.stack(columns, -1).reshape(-1, len(columns)))
                order = torch.full((len(table), 1), index)
                parts.append(torch.cat([order, table, patches.flatten(0, 1).cpu()], dim=1))
                progress(done, len(shard))
        width = 1 + len(titles) + backbone.embed_dim
        rows = gather_rows(torch.cat(parts) if parts else torch.zeros(0, width), context.device)
        if not len(rows):
            raise UserError("None of the training images can be read.")
        rows = rows[rows[:, 0].argsort(stable=True)]
        labels = {title: rows[:, 1 + i].long() for i, title in enumerate(titles)}
        return rows[:, 1 + len(titles) :], labels

    def _confusion(
        self,
        backbone: Backbone,
        val: ImageDataset,
        indices: np.ndarray,
        predictors: Mapping[str, Predictor],
        count: int,
        size: int,
        context: EvalContext,
    ) -> np.ndarray:
        """Return the pixels by true class and predicted class for each predictor, [predictors, C, C]."""
        confusion = torch.zeros(len(predictors), count, count, dtype=torch.int64)
        shard = indices[distributed.rank() :: distributed.world_size()]
        with context.progress("segmentation") as progress:
            for done, index in enumerate(shard.tolist(), 1):
                try:
                    image, truth = val.read(index), class_mask(val, index)
                except BadImage:
                    continue
                assert truth is not None
                pixels = network_input(backbone, resize_to_patches(image, size, backbone.patch)[None])
                with context.autocast():
                    patches = feature_maps(backbone, pixels)
                valid = truth != VOID
                for matrix, predict in zip(confusion, predictors.values(), strict=True):
                    predicted = class_map(predict(patches), *truth.shape)
                    pairs = count * truth[valid].astype(np.int64) + predicted[valid]
                    matrix += torch.from_numpy(np.bincount(pairs, minlength=count**2).reshape(count, count))
                progress(done, len(shard))
        return distributed.all_reduce_sum(confusion.to(context.device)).cpu().numpy()


def class_names(dataset: ImageDataset) -> tuple[str, ...]:
    """Return the names of the classes: those of the images' labels, or of PASCAL VOC."""
    return VOC_CLASSES if isinstance(dataset, VOC) else tuple(dataset.classes)


def class_mask(dataset: ImageDataset, index: int) -> np.ndarray | None:
    """Return the class of each pixel, uint8 [H, W]: 0 the background, i + 1 class i; None without masks.

    In a dataset with labels, the objects of an image have its class.
    """
    if not isinstance(dataset, Masked):
        return None
    mask = dataset.mask(index)
    if dataset.labels is None:
        return mask
    return np.where((mask != BACKGROUND) & (mask != VOID), dataset.labels[index] + 1, mask).astype(np.uint8)


def image_class(dataset: ImageDataset, index: int, truth: np.ndarray | None) -> int:
    """Return the class of an image, from 1: its label, or the only one in its mask; UNLABELED if it has several."""
    if dataset.labels is not None:
        return int(dataset.labels[index]) + 1 or UNLABELED
    numbers = np.setdiff1d(truth if truth is not None else [], (BACKGROUND, VOID))
    return int(numbers[0]) if len(numbers) == 1 else UNLABELED


def patch_classes(truth: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the class that covers most of each patch, int64 [h, w]; UNLABELED where that is void."""
    numbers = np.unique(truth)
    shares = [cv2.resize((truth == n).astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA) for n in numbers]
    classes = numbers[np.argmax(shares, axis=0)].astype(np.int64)
    return np.where(classes == VOID, UNLABELED, classes)


def patch_votes(memory: Tensor, labels: Tensor, patches: Tensor, k: int, classes: int) -> Tensor:
    """Return the log of the shares of the k-NN votes: patches [B, h, w, D] -> [B, C, h, w]."""
    cosines, rows = top_k(patches.flatten(0, 2), memory, k)
    votes = knn_votes(cosines, labels[rows], classes)
    shares = F.normalize(votes, p=1, dim=1)
    return shares.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2).clamp(min=1e-6).log()


def class_map(logits: Tensor, height: int, width: int) -> np.ndarray:
    """Return the class of each pixel from logits [1, C, h, w], enlarged bilinearly: int64 [height, width]."""
    large = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return large[0].argmax(0).cpu().numpy()


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Return intersection over union of each class [C] from pixels by (true, predicted) class; nan for absent ones."""
    hits = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    present = confusion.sum(1) > 0
    return np.where(present, hits / np.maximum(union, 1), np.nan)


def _open(source: DatasetSource, part: Literal["train", "val"], progress: Progress) -> ImageDataset:
    path = folder_path(source)
    if path is not None and any((path / name).is_dir() for name in ("SegmentationClass", "VOC2012", "VOCdevkit")):
        return open_voc(path, split=part, progress=progress)
    return open_dataset(source, progress, part=part)
