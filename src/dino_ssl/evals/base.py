"""What every evaluation shares: the contract, and features of a data set, once, over all ranks.

An evaluation is settings (a frozen dataclass: its fields are the protocol), bound to data it is an `Evaluator`, and
called with a backbone it says numbers. The command line, the Python call and a training run need nothing else of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from dino_ssl import distributed
from dino_ssl.data.dataset import BadImage, ImageDataset, Skipped
from dino_ssl.data.loader import eval_batches
from dino_ssl.data.sources import DatasetSource
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.evals.cache import cached, key_of, weights_hash
from dino_ssl.models.backbone import Backbone
from dino_ssl.progress import Progress, StartProgress, no_progress

Autocast = Callable[[], AbstractContextManager]
"""Makes the context that the backbone runs in; `runtime` owns the choice of precision."""

GATHER_ROWS = 16384  # rows of features that cross between ranks at once: 50 MB at 768 wide


class Source(NamedTuple):
    """One thing that a person gives behind the checkpoint: a folder, a file, or the word `scenes`."""

    name: str
    help: str
    required: bool = True


VAL = Source("VAL", "Folder of class folders that is asked about; without it a part of TRAIN is.", required=False)
"""Behind a TRAIN of class folders."""


class Scores(dict[str, float]):
    """Numbers by name, in percent unless the name says otherwise, in the order to show them."""

    def __init__(self, values: Mapping[str, float], details: Mapping[str, Any] | None = None) -> None:
        super().__init__(values)
        self.details = dict(details or {})
        """What more the result's JSON holds: per query, per object, what was chosen."""


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """Where an evaluation works: what it needs of the machine, and of the checkpoint beside its weights."""

    device: torch.device | str = "cpu"
    workers: int = 0
    """Processes that decode."""
    batch_size: int = 64
    """Pictures per forward pass."""
    size: int = 224
    """Side in pixels that the backbone was trained at: for protocols that do not fix one."""
    autocast: Autocast = nullcontext
    progress: StartProgress = no_progress
    """`with context.progress("features") as done: done(3, 100)`."""
    cache: Path | None = None
    """Folder of features that were extracted before; None keeps none."""
    out: Path | None = None
    """Folder for the files that an evaluation writes (masks, ...) of the network it is asked of; None writes none."""

    def extract(
        self, backbone: Backbone, dataset: ImageDataset, *, size: int | None = None, label: str = "features"
    ) -> "Extracted":
        """`extract` here, or what it gave before: the same weights saw the same pictures at the same size."""
        size = size or self.size

        def compute() -> Extracted:
            with self.progress(label) as done:
                return extract(
                    backbone,
                    dataset,
                    size=size,
                    device=self.device,
                    batch_size=self.batch_size,
                    workers=self.workers,
                    autocast=self.autocast,
                    progress=done,
                )

        if self.cache is None or (content := distributed.run_on_rank0(lambda: dataset.content_key)) is None:
            return compute()
        stored = self.cache / f"{key_of(weights_hash(backbone), content, f'cls at {size}')}.safetensors"
        tensors = cached(stored, lambda: compute().tensors())
        return Extracted.of(tensors, dataset)


class Evaluator(Protocol):
    """Bound to data, looks at a backbone and says numbers. It never sees a method, a loss or an optimizer.

    A frozen dataclass, so that it can be had for another site.
    """

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> EvalContext: ...

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        """What it measures on, by the source's name: numbers of pictures, fingerprints."""
        ...

    def __call__(self, backbone: Backbone) -> Scores: ...


@runtime_checkable
class HasPixelReference(Protocol):
    """An evaluator that can ask the same of raw pixels: the floor that features must clear."""

    def pixel_reference(self) -> Scores: ...


@runtime_checkable
class RequiresBackbone(Protocol):
    """An evaluator that cannot be asked of every network, and says so before the work begins."""

    def validate(self, backbone: Backbone) -> None:
        """Raises UserError where this network has not what is looked at."""
        ...


class Evaluation(Protocol):
    """The settings of an evaluation: a frozen dataclass whose fields are the protocol, and the flags."""

    name: ClassVar[str]
    """As in `dino eval NAME`."""
    sources: ClassVar[tuple[Source, ...]]
    """What stands behind the checkpoint on the command line, in order."""
    paper: ClassVar[str]
    """Which table and appendix it reproduces."""
    examples: ClassVar[str]
    """Command lines for --help."""

    def bind(self, sources: Sequence[DatasetSource], context: EvalContext) -> Evaluator:
        """Opens and checks the data. Raises UserError where its layout is another, with a picture of the right one."""
        ...


class Extracted(NamedTuple):
    """Features of the readable pictures of a data set, in the data set's order, the same on every rank."""

    features: Tensor  # [N, D] float32 on the CPU, not normalised
    labels: Tensor | None  # [N] int64, -1 where a picture has no label; None where the data set has no labels
    indices: Tensor  # [N] int64: the place of each row in the data set
    skipped: list[Skipped]  # pictures that could not be read, by name and reason

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of it; labels and reasons are the data set's to say."""
        return {"features": self.features, "indices": self.indices}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], dataset: ImageDataset) -> "Extracted":
        """The rows of these pictures, which read as they did."""
        indices = tensors["indices"]
        labels = None
        if dataset.labels is not None:
            labels = torch.as_tensor(np.asarray(dataset.labels), dtype=torch.int64)[indices]
        missing = np.setdiff1d(np.arange(len(dataset)), indices.numpy())
        return Extracted(tensors["features"], labels, indices, [_why(dataset, int(i)) for i in missing])


def untrained(build: Callable[[], Backbone], seed: int = 0) -> Backbone:
    """The same network with random weights, without touching the random state of the run: a floor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def reference_scores(evaluator: Evaluator, build: Callable[[], Backbone] | None) -> dict[str, Scores]:
    """What a figure stands beside: the same asked of raw pixels, where that has a meaning, and of random weights.

    build makes the network with random weights on the evaluator's device; None where nobody knows its settings.
    Files are written of the network that is asked about, and not of these.
    """
    evaluator = _without_files(evaluator)
    references = {"raw_pixels": evaluator.pixel_reference()} if isinstance(evaluator, HasPixelReference) else {}
    return references if build is None else references | {"random_weights": evaluator(untrained(build))}


def _without_files(evaluator: Evaluator) -> Evaluator:
    assert is_dataclass(evaluator)
    assert not isinstance(evaluator, type)
    return replace(evaluator, context=replace(evaluator.context, out=None))


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


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 and no bfloat16 products inside, whatever training has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def extract(
    backbone: Backbone,
    dataset: ImageDataset,
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
    mine, rows, features = rank_shard(dataset, backbone.embed_dim)
    done = 0
    with evaluating(backbone), torch.random.fork_rng(devices=[]):  # loaders draw a seed: give it back
        pin = torch.device(device).type == "cuda"
        for indices, images in eval_batches(dataset, size, batch_size, workers, mine, pin_memory=pin):
            indices = torch.as_tensor(indices, dtype=torch.int64)
            with autocast():
                out = backbone(normalize(images.to(device, non_blocking=True)))
            rows[done : done + len(indices)] = indices
            features[done : done + len(indices)] = out.float().cpu()
            done += len(indices)
            if progress is not None:
                progress(done, len(mine))
    return gathered(rows, features, dataset, device)


def rank_shard(dataset: ImageDataset, width: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """This rank's picture numbers, and the empty rows for them: numbers [n] of -1 and features [n, width].

    n is the same on every rank, at least the number of its pictures, so that gathering is regular.
    """
    n = -(-len(dataset) // distributed.world_size())
    mine = np.arange(distributed.rank(), len(dataset), distributed.world_size())
    return mine, torch.full((n,), -1, dtype=torch.int64), torch.zeros(n, width)


def gathered(rows: Tensor, features: Tensor, dataset: ImageDataset, device: torch.device | str) -> Extracted:
    """The rows of all ranks in the data set's order, on every rank; number -1 means that no picture stands
    there.
    """
    rows, features = _gather_rows(rows, device), _gather_rows(features, device)
    order = rows.argsort(stable=True)
    order = order[rows[order] >= 0]
    return Extracted.of({"features": features[order], "indices": rows[order]}, dataset)


def _gather_rows(rows: Tensor, device: torch.device | str) -> Tensor:
    if distributed.world_size() == 1:
        return rows
    pieces = rows.split(GATHER_ROWS)  # collectives of NCCL want the device, those of gloo the CPU
    return torch.cat([distributed.all_gather(piece.to(device)).cpu() for piece in pieces])


def _why(dataset: ImageDataset, index: int) -> Skipped:
    """Batches name the pictures they hold, not why another is absent: reading it once more tells."""
    try:
        dataset.read(index)
    except BadImage as bad:
        return Skipped(dataset.names[index], bad.reason)
    return Skipped(dataset.names[index], "could not be read at first, could be later")
