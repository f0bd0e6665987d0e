"""Accuracy of a trained classifier on center crops, for fine-tuning and supervised training."""

import numpy as np
import torch

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import eval_batches
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.evals.base import EvalContext, Scores, evaluating
from dino_ssl.models.heads import Network


def classifier_accuracy(classifier: Network, dataset: ImageDataset, size: int, context: EvalContext) -> Scores:
    """Return {"top-1": percent, "top-5": percent} over the readable images with a label, the same on every rank.

    Args:
        classifier: Network whose outputs are the logits of the dataset's classes.
        dataset: Labelled images; rank r evaluates images r, r + world size, ...
        size: Side of the center crop in pixels.
        context: Device and batch size.
    """
    assert dataset.labels is not None
    labels, device = torch.as_tensor(dataset.labels), context.device
    shard = np.flatnonzero(dataset.labels >= 0)[distributed.rank() :: distributed.world_size()]
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # top-1 hits, top-5 hits, images
    done = 0
    with (
        evaluating(classifier),
        torch.random.fork_rng(devices=[]),  # data loaders draw a seed
        context.progress("accuracy") as progress,
    ):
        for rows, images in eval_batches(dataset, size, context.batch_size, context.workers, shard):
            if len(rows):
                with context.autocast():
                    (logits,) = classifier([normalize(images.to(device, non_blocking=True))[None]])
                guesses = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
                correct = guesses == labels[rows].to(device)[:, None]
                counts += torch.stack(
                    [correct[:, 0].sum(), correct.any(1).sum(), torch.tensor(len(rows), device=device)]
                )
            done += len(rows)
            progress(done, len(shard))
    top1, top5, total = distributed.all_reduce_sum(counts).tolist()
    return Scores({"top-1": 100 * top1 / max(1, total), "top-5": 100 * top5 / max(1, total)})


def majority_class_accuracy(train: ImageDataset, val: ImageDataset) -> Scores:
    """Return the accuracy of always predicting the classes that are most frequent in `train`."""
    assert train.labels is not None
    assert val.labels is not None
    counts = np.bincount(train.labels[train.labels >= 0], minlength=len(train.classes))
    frequent = np.argsort(-counts, kind="stable")
    labels = val.labels[val.labels >= 0]
    return Scores({f"top-{n}": 100 * float(np.isin(labels, frequent[:n]).mean()) for n in (1, 5)})
