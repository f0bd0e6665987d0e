"""Accuracy of a trained classifier on center crops, for fine-tuning and supervised training."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import eval_batches
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.evals.base import EvalContext, Scores, evaluating
from dino_ssl.models.heads import Network


def classifier_accuracy(classifier: Network, dataset: ImageDataset, size: int, context: EvalContext) -> Scores:
    """Return {"top-1": percent, "top-5": percent} of a network with one logit per class, the same on every rank."""

    def hits(images: Tensor, labels: Tensor) -> Tensor:
        with context.autocast():
            (logits,) = classifier([normalize(images.to(context.device, non_blocking=True))[None]])
        correct = logits.float().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        return torch.stack([correct[:, :1].sum(0), correct.any(1, keepdim=True).sum(0)])

    with evaluating(classifier), torch.random.fork_rng(devices=[]):  # data loaders draw a seed
        (top1,), (top5,) = accuracies(hits, 1, dataset, size, context, "accuracy")
    return Scores({"top-1": top1, "top-5": top5})


def accuracies(
    hits: Callable[[Tensor, Tensor], Tensor],
    classifiers: int,
    dataset: ImageDataset,
    size: int,
    context: EvalContext,
    label: str,
) -> list[list[float]]:
    """Return [top-1, top-5] of each classifier in percent, on center crops of the readable images with a label.

    hits: uint8 images [B, 3, size, size], labels [B] on the device -> int64 [2, classifiers], correct top-1 and top-5.
    """
    assert dataset.labels is not None
    labels, done, total = torch.as_tensor(dataset.labels), 0, torch.zeros(1, dtype=torch.int64, device=context.device)
    shard = np.flatnonzero(dataset.labels >= 0)[distributed.rank() :: distributed.world_size()]
    correct = torch.zeros(2, classifiers, dtype=torch.int64, device=context.device)
    with context.progress(label) as progress:
        for rows, images in eval_batches(dataset, size, context.batch_size, context.workers, shard):
            if len(rows):
                correct += hits(images, labels[rows].to(context.device))
            done += len(rows)
            progress(done, len(shard))
    correct = distributed.all_reduce_sum(correct).double()
    return (100 * correct / distributed.all_reduce_sum(total + done).clamp(min=1)).tolist()


def majority_class_accuracy(train: ImageDataset, val: ImageDataset) -> Scores:
    """Return the accuracy of always predicting the classes that are most frequent in `train`."""
    assert train.labels is not None
    assert val.labels is not None
    counts = np.bincount(train.labels[train.labels >= 0], minlength=len(train.classes))
    frequent = np.argsort(-counts, kind="stable")
    labels = val.labels[val.labels >= 0]
    return Scores({f"top-{n}": 100 * float(np.isin(labels, frequent[:n]).mean()) for n in (1, 5)})
