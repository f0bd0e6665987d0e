"""What every evaluation shares: the contract, and features of a data set, once, over all ranks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dino import dist
from dino.data.loader import eval_batches
from dino.data.pictures import BadImage, Pictures, Skipped
from dino.data.views import normalize
from dino.models.backbone import Backbone

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all) after every batch, on every rank, over that rank's share."""
Autocast = Callable[[], AbstractContextManager]
"""Makes the context that the backbone runs in; `runtime` owns the choice of precision."""

GATHER_ROWS = 16384  # rows of features that cross between ranks at once: 50 MB at 768 wide


class Evaluator(Protocol):
    """Anything that looks at a backbone and says numbers. It never sees a method, a loss or an optimizer."""

    @property
    def name(self) -> str: ...

    def __call__(self, backbone: Backbone) -> Mapping[str, float]: ...


class Extracted(NamedTuple):
    """Features of the readable pictures of a data set, in the data set's order, the same on every rank."""

    features: Tensor  # [N, D] float32 on the CPU, not normalised
    labels: Tensor | None  # [N] int64, -1 where a picture has no label; None where the data set has no labels
    indices: Tensor  # [N] int64: the place of each row in the data set
    skipped: list[Skipped]  # pictures that could not be read, by name and reason


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every submodule is in the mode it had, mixed modes
    included.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def extract(
    backbone: Backbone,
    pictures: Pictures,
    *,
    size: int,
    device: torch.device | str,
    batch_size: int = 64,
    workers: int = 0,
    autocast: Autocast = nullcontext,
    progress: Progress | None = None,
) -> Extracted:
    """The [CLS] (or pooled) feature of every picture: resize, center crop to `size`, one forward pass.

    Rank r takes pictures r, r + world, ... and all ranks end with all rows. Features stay as the backbone
    gives them; what compares by cosine normalises. The backbone must lie on `device`.
    """
    mine, rows, features = share_of(pictures, backbone.embed_dim)
    done = 0
    with evaluating(backbone), torch.random.fork_rng(devices=[]):  # loaders draw a seed: give it back
        for indices, images in eval_batches(pictures, size, batch_size, workers, indices=mine):
            indices = torch.as_tensor(indices, dtype=torch.int64)
            with autocast():
                out = backbone(normalize(images.to(device, non_blocking=True)))
            rows[done : done + len(indices)] = indices
            features[done : done + len(indices)] = out.float().cpu()
            done += len(indices)
            if progress is not None:
                progress(done, len(mine))
    return gathered(rows, features, pictures, device)


def share_of(pictures: Pictures, width: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """This rank's picture numbers, and the empty rows for them: numbers [n] of -1 and features [n, width].

    n is the same on every rank, at least the number of its pictures, so that gathering is regular.
    """
    n = -(-len(pictures) // dist.world())
    mine = np.arange(dist.rank(), len(pictures), dist.world())
    return mine, torch.full((n,), -1, dtype=torch.int64), torch.zeros(n, width)


def gathered(rows: Tensor, features: Tensor, pictures: Pictures, device: torch.device | str) -> Extracted:
    """The rows of all ranks in the data set's order, on every rank; number -1 means that no picture stands
    there.
    """
    rows, features = _gather_rows(rows, device), _gather_rows(features, device)
    order = rows.argsort(stable=True)
    order = order[rows[order] >= 0]
    indices = rows[order]
    labels = None
    if pictures.labels is not None:
        labels = torch.as_tensor(np.asarray(pictures.labels), dtype=torch.int64)[indices]
    missing = np.setdiff1d(np.arange(len(pictures)), indices.numpy())
    return Extracted(features[order], labels, indices, [_why(pictures, int(index)) for index in missing])


def _gather_rows(rows: Tensor, device: torch.device | str) -> Tensor:
    if dist.world() == 1:
        return rows
    pieces = rows.split(GATHER_ROWS)  # collectives of NCCL want the device, those of gloo the CPU
    return torch.cat([dist.gather(piece.to(device)).cpu() for piece in pieces])


def _why(pictures: Pictures, index: int) -> Skipped:
    """Batches name the pictures they hold, not why another is absent: reading it once more tells."""
    try:
        pictures.read(index)
    except BadImage as bad:
        return Skipped(pictures.names[index], bad.reason)
    return Skipped(pictures.names[index], "could not be read at first, could be later")
