"""How often a trained classifier is right, on center crops: what fine-tuning and supervised training are judged by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.loader import eval_batches
from dino_ssl.data.sources import described
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.evals.base import EvalContext, Scores, evaluating
from dino_ssl.models.heads import Network


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent of a classifier on pictures whose labels it was trained for."""

    train: ImageDataset
    asked: ImageDataset
    size: int
    context: EvalContext
    name: str = "accuracy"

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        return {"train": described(self.train), "val": described(self.asked)}

    def __call__(self, classifier: Network) -> Scores:
        """Rank r asks about pictures r, r + world, ...; all get the same figures. Unreadable ones do not count."""
        assert self.asked.labels is not None
        labels, device = torch.as_tensor(self.asked.labels), self.context.device
        mine = np.flatnonzero(self.asked.labels >= 0)[distributed.rank() :: distributed.world_size()]
        counts, done = torch.zeros(3, dtype=torch.int64, device=device), 0  # right at once, among five, asked
        with (
            evaluating(classifier),
            torch.random.fork_rng(devices=[]),  # loaders draw a seed: give it back
            self.context.progress("accuracy") as progress,
        ):
            for rows, images in eval_batches(
                self.asked, self.size, self.context.batch_size, self.context.workers, mine
            ):
                if len(rows):
                    with self.context.autocast():
                        (logits,) = classifier([normalize(images.to(device, non_blocking=True))[None]])
                    best = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
                    right = best == labels[rows].to(device)[:, None]
                    counts += torch.stack([right[:, 0].sum(), right.any(1).sum(), torch.tensor(len(rows)).to(device)])
                done += len(rows)
                progress(done, len(mine))
        first, among, total = distributed.all_reduce_sum(counts).tolist()
        return Scores({"top-1": 100 * first / max(1, total), "top-5": 100 * among / max(1, total)})

    def references(self) -> dict[str, Scores]:
        """Who always says the classes that are most frequent in training."""
        assert self.train.labels is not None
        assert self.asked.labels is not None
        counts = np.bincount(self.train.labels[self.train.labels >= 0], minlength=len(self.train.classes))
        frequent = np.argsort(-counts, kind="stable")
        asked = self.asked.labels[self.asked.labels >= 0]
        shares = {name: 100 * float(np.isin(asked, frequent[:n]).mean()) for name, n in (("top-1", 1), ("top-5", 5))}
        return {"majority_class": Scores(shares)}
