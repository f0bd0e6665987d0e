"""An index of a collection of images: search in it, and what the other modules compute from it."""

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dino_ssl.data.dataset import BadImage, ImageDataset, Reduction, Skipped
from dino_ssl.data.decode import decode
from dino_ssl.data.shards import is_shards
from dino_ssl.data.sources import DatasetSource, open_dataset
from dino_ssl.errors import UserError, check_value
from dino_ssl.files import atomic_write
from dino_ssl.formatting import Summarized
from dino_ssl.loading import Checkpoint, open_checkpoint
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.pretrained import Weights
from dino_ssl.progress import Progress, StartProgress, ignore_progress, no_progress
from dino_ssl.runtime import Precision
from dino_ssl.search.approximate import MAX_K, open_approximate, read_approximate, write_approximate
from dino_ssl.search.build import BuildSettings, Changes, update_index
from dino_ssl.search.clusters import Clusters, find_clusters
from dino_ssl.search.deduplicate import Duplicates, duplicates_of
from dino_ssl.search.duplicates import HASH_DISTANCE, Keep
from dino_ssl.search.items import Items
from dino_ssl.search.listing import restore_source
from dino_ssl.search.map import MAX_POINTS, Layout, lay_out
from dino_ssl.search.nearest import top_k
from dino_ssl.search.query import Query, query_vector, thumbnail
from dino_ssl.search.results import load_result, save_result
from dino_ssl.search.select import Method, select
from dino_ssl.search.store import open_store
from dino_ssl.terminal import logger


class Hit(NamedTuple):
    """An image that a search has found."""

    name: str
    similarity: float
    """Cosine of the features, at most 1."""
    row: int


class Selected(NamedTuple):
    """An image to label."""

    name: str
    distance: float
    """One minus a cosine; see `select.Selection`."""
    row: int


class Index(Summarized):
    """The last complete state of an index: N images with their unit features, memory-mapped and read-only.

    index = dino_ssl.Index.build("runs/photos", "photos", path="photos.idx")
    index = dino_ssl.Index("photos.idx")
    index.search("query.jpg", k=20)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        images: DatasetSource | None = None,
        checkpoint: str | Path | Backbone | Checkpoint | None = None,
        device: str | torch.device | None = None,
        trust: bool = False,
    ) -> None:
        """Open an index.

        Args:
            path: Its folder.
            images: The images, if they were moved or are a Python object. Default: those that were indexed.
            checkpoint: The network, if it was moved. Its weights must be those of the index.
            device: Of the network: cpu, cuda, cuda:1, mps, ...; None: a GPU if there is one.
            trust: Import types from outside the package that the index or the checkpoint names, which runs their code.
        """
        self.folder = Path(path)
        """Folder of the index. Other results are kept in it, with the generation that they belong to."""
        self.store = open_store(self.folder)
        if pending := self.store.info.pending:
            logger.warning(f"{self.folder} is not complete: {pending:,} images are not indexed. Update it to continue.")
        self._images, self._checkpoint, self._device, self._trust = images, checkpoint, device, trust
        self._dataset: ImageDataset | None = None
        self.approximate = open_approximate(self.folder, self.generation)
        """Approximate search; None if it was not built for these rows."""
        self.changes = Changes(kept=len(self))
        """What `build` or `update` has changed."""

    @classmethod
    def build(
        cls,
        checkpoint: str | Path | Backbone | Checkpoint,
        images: DatasetSource,
        *,
        path: str | Path,
        size: int | None = None,
        precision: Precision | None = None,
        batch_size: int = 64,
        workers: int = 0,
        approximate: bool = False,
        progress: Progress | None = None,
        device: str | torch.device | None = None,
        weights: Weights = "last",
        num_heads: int | None = None,
        trust: bool = False,
    ) -> "Index":
        """Build the index of a folder, tar shards or any dataset, or update it: only what has changed is read.

        Args:
            checkpoint: A run folder, a file, a released network, timm:NAME, or a backbone.
            images: A folder, a list of images, or any map-style torch dataset.
            path: Folder of the index.
            size: Side of the center crop in pixels. Default: the size at which the run evaluates its network.
            precision: Of the forward pass. Default: bfloat16 if the device supports it, otherwise float32.
            batch_size: Images per forward pass.
            workers: Worker processes that decode images.
            approximate: Build approximate search as well, for 100,000 images and more: needs faiss. Updates keep it.
            progress: Called with (done, total).
            device: cpu, cuda, cuda:1, mps, ...; None: a GPU if there is one.
            weights: Those of a run's folder that are used.
            num_heads: Of a ViT that the file does not describe.
            trust: Import a backbone class from outside the package that the checkpoint names, which runs its code.
        """
        settings = BuildSettings(size=size, precision=precision, batch_size=batch_size, workers=workers)
        loaded = open_checkpoint(checkpoint, device, weights=weights, num_heads=num_heads, trust=trust)
        _, changes = update_index(Path(path), loaded, images, settings, progress)
        index = cls(path, images=images, checkpoint=loaded, device=device, trust=trust)
        index.changes = changes
        index._update_approximate(approximate)
        return index

    def update(self, *, workers: int = 0, batch_size: int = 64, progress: Progress | None = None) -> "Index":
        """Read new and changed images, drop those that are gone, and return this index in its new state."""
        info = self.store.info
        settings = BuildSettings(size=info.preprocessing.size, batch_size=batch_size, workers=workers)
        _, self.changes = update_index(self.folder, self.checkpoint, self._source, settings, progress)
        self.store, self._dataset = open_store(self.folder), None
        self._update_approximate(False)
        return self

    def _update_approximate(self, build: bool) -> None:
        """Build approximate search if there is one of other rows, or none and `build` is set."""
        info = read_approximate(self.folder)
        if (build and info is None) or (info is not None and info.generation != self.generation):
            write_approximate(self.folder, self.features, self.generation)
        self.approximate = open_approximate(self.folder, self.generation)

    def __len__(self) -> int:
        return self.store.info.rows

    @property
    def features(self) -> Any:
        """[N, D] float16, unit length: a memory-mapped array, or `Shards`, whose slices and selections are arrays."""
        return self.store.features

    @property
    def items(self) -> Items:
        """Names, labels, sizes and hashes of the N images."""
        return self.store.items

    @property
    def skipped(self) -> list[Skipped]:
        """Images that cannot be used, with the reason."""
        return self.store.skipped

    @property
    def generation(self) -> int:
        """Number that changes with the rows."""
        return self.store.info.generation

    @property
    def summary(self) -> dict[str, object]:
        """Names and values to show."""
        info = self.store.info
        source = next(iter(info.images.values()))
        shape = {"images": info.rows, "dimensions": info.dimensions, "skipped": len(self.skipped)}
        return {"index": str(self.folder), "of": str(source), **shape, "checkpoint": info.checkpoint["source"]}

    # -- images ------------------------------------------------------------------------------------------------

    @property
    def _source(self) -> DatasetSource:
        return restore_source(self.store.info.images, self._trust) if self._images is None else self._images

    @cached_property
    def _root(self) -> Path | None:
        """The folder of the images; None if they are no files in a folder."""
        if not isinstance(self._source, str | Path) or "folder" not in self.store.info.images:
            return None
        root = Path(self._source).expanduser()
        return None if is_shards(root) else root

    def path_of(self, row: int) -> Path | None:
        """Return the file of an image; None if it is no file, as in tar shards."""
        if self._root is None:
            return None
        return self._root / Path(str(self.items.path(row), "utf-8", "surrogateescape"))

    def change_of(self, row: int) -> str:
        """Return how a file differs from the one that was indexed; an empty string if it does not, or is no file."""
        if (path := self.path_of(row)) is None:
            return ""
        try:
            status = path.stat()
        except OSError:
            return "is missing"
        indexed = int(self.items.sizes_bytes[row]), int(self.items.mtimes[row])
        return "" if (status.st_size, status.st_mtime_ns) == indexed else "has changed since it was indexed"

    def read(self, row: int, *, reduce: Reduction = 1) -> np.ndarray:
        """Return an image as it is viewed, uint8 RGB [H, W, 3]. Raises BadImage if it is missing or unreadable.

        reduce: factor by which a JPEG is downscaled while it is decoded, which is faster.
        """
        if (path := self.path_of(row)) is not None:
            assert self._root is not None
            if not self._root.is_dir():
                raise BadImage(path, f"there is no folder {self._root}; if it was moved, pass it as `images`")
            return decode(path, reduce=reduce, bit_depth=self.store.info.preprocessing.bit_depth)
        name, self._dataset = self.items.names[row], self._dataset or open_dataset(self._source)
        if name not in self._dataset.names:
            raise BadImage(name, "no longer in the dataset; update the index")
        return self._dataset.read_downscaled(self._dataset.names.index(name), reduce)

    def thumbnail(self, row: int, side: int = 128) -> bytes:
        """Return an image as JPEG of at most side x side pixels, cached in the folder by its content."""
        content = self.items.table["content"][row].as_py().hex()
        file = self.folder / "thumbnails" / content[:2] / f"{content}-{side}.jpg"
        with suppress(OSError):
            if cached := file.read_bytes():
                return cached
        ratio = max(int(self.items.widths[row]), int(self.items.heights[row])) // side
        reduce: Reduction = 8 if ratio >= 8 else 4 if ratio >= 4 else 2 if ratio >= 2 else 1
        content = thumbnail(self.read(row, reduce=reduce), side)
        if not self.change_of(row):
            with suppress(UserError):  # a full disk or a read-only folder: only slower
                atomic_write(file, lambda part: part.write_bytes(content), durable=False)
        return content

    # -- search ------------------------------------------------------------------------------------------------

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The network of the index. Raises UserError if it is missing or has other weights."""
        known = self.store.info.checkpoint
        source = known["source"] if self._checkpoint is None else self._checkpoint
        if source is None:
            raise UserError("The network of this index was a Python object: pass it as `checkpoint`.")
        if source is known["source"] and Path(known["source"]).is_absolute() and not Path(known["source"]).exists():
            raise UserError(f"The network of this index is missing: {source}. Pass its new path as `checkpoint`.")
        opened = partial(open_checkpoint, source, self._device, weights=known["weights"] or "last", trust=self._trust)
        loaded, heads = opened(), known["num_heads"]
        if heads not in (None, getattr(loaded.backbone.config, "heads", None)):  # a file that does not describe them
            loaded = opened(num_heads=heads)
        if loaded.hash != known["hash"]:
            raise UserError(
                f"{self.folder} has features of other weights ({known['hash']}) than {loaded.source} ({loaded.hash}). "
                "Pass the file of those weights as `checkpoint`, or build another index."
            )
        return loaded

    @property
    def backbone(self) -> Backbone:
        """The network of the index, loaded when it is first used."""
        return self.checkpoint.backbone

    def search(
        self,
        query: Query | Sequence[Query],
        k: int = 20,
        *,
        region: Sequence[int] | None = None,
        folder: str | None = None,
        label: str | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """Return the k most similar images, best first; images with equal features in the order of their rows.

        The search is exact, unless approximate search was built; it finds 99 % of the 10 nearest images. With a
        condition, or more than 100 results, it is always exact.

        Args:
            query: An image: a path, a PIL image, a uint8 array [H, W, 3]; an image of the index: its row or its name;
                a vector [D]; or a list of these, whose mean feature is the query.
            k: Number of images.
            region: (x, y, width, height) in pixels of the image as it is viewed: the query is this part of it.
            folder: Search only below this folder, relative to that of the images.
            label: Search only in this class.
            exact: Compare with every image in any case.
        """
        check_value("k", k, least=1)
        where, queries = self.items.select(folder, label), query_vector(self, query, region)[None]
        if self.approximate is None or exact or where is not None or k > MAX_K:
            similarity, rows = top_k(queries, self.features, k, where=where, unit=True)
        else:
            similarity, rows = self.approximate.top_k(queries, k)
        return [
            Hit(self.items.names[int(row)], min(value, 1.0), int(row))
            for value, row in zip(similarity[0].tolist(), rows[0].tolist(), strict=True)
            if value >= -1.5  # others are excluded, or not found
        ]

    # -- clusters, map, selection, duplicates -------------------------------------------------------------------

    def clusters(
        self,
        k: int | None = None,
        *,
        density: bool = False,
        min_size: int = 5,
        seed: int = 0,
        progress: Progress = ignore_progress,
    ) -> Clusters:
        """Return clusters of the images; see `clusters.find_clusters`. The last ones are kept in the folder."""
        options: dict[str, Any] = {"k": k, "density": density, "min_size": min_size, "seed": seed}
        arrays = load_result(self.folder, "clusters", generation=self.generation, **options)
        if arrays is not None:
            return Clusters.from_arrays(arrays)
        found = find_clusters(self.features, self.items.labels.tolist(), progress=progress, **options)
        save_result(self.folder, "clusters", found.to_arrays(), generation=self.generation, **options)
        return found

    def last_clusters(self) -> Clusters | None:
        """Return the clusters in the folder, of any settings; None if there are none of this generation."""
        arrays = load_result(self.folder, "clusters", generation=self.generation)
        return None if arrays is None else Clusters.from_arrays(arrays)

    def map(
        self, *, perplexity: float = 30.0, max_points: int = MAX_POINTS, progress: Progress = ignore_progress
    ) -> Layout:
        """Return positions of the images in the plane; see `map.lay_out`. The last ones are kept in the folder."""
        options: dict[str, Any] = {"perplexity": perplexity, "max_points": max_points}
        arrays = load_result(self.folder, "map", generation=self.generation, **options)
        if arrays is not None:
            return Layout(arrays["rows"], arrays["points"], str(arrays["method"]))
        layout = lay_out(self.features, progress=progress, **options)
        arrays = layout._asdict() | {"method": np.array(layout.method)}
        save_result(self.folder, "map", arrays, generation=self.generation, **options)
        return layout

    def select(
        self,
        count: int,
        *,
        method: Method = "coverage",
        labeled: Sequence[str] = (),
        seed: int = 0,
        progress: Progress = ignore_progress,
    ) -> list[Selected]:
        """Return images to label, in this order; see `select.select`.

        Args:
            count: Number of images.
            method: "coverage", "typical" or "outliers".
            labeled: Names of images that are labeled already, so that a second round continues the first.
            seed: Of the clusters of "typical".
            progress: Called with the numbers of images selected and of all.
        """
        names, known = self.items.names, {name: row for row, name in enumerate(self.items.names)} if labeled else {}
        if missing := [name for name in labeled if name not in known]:
            raise UserError(
                f"`labeled` has {len(labeled):,} names, of which {len(missing):,} are not in the index, such as "
                f"{missing[0]!r}. Expected names such as {names[0]!r}."
                if len(self)
                else "The index has no images."
            )
        rows, scores = select(
            self.features, count, method=method, labeled=[known[name] for name in labeled], seed=seed, progress=progress
        )
        pairs = zip(map(int, rows), map(float, scores), strict=True)
        return [Selected(names[row], score, row) for row, score in pairs]

    def duplicates(
        self,
        threshold: float | None = None,
        *,
        keep: Keep = "largest",
        distance: int = HASH_DISTANCE,
        progress: StartProgress = no_progress,
    ) -> Duplicates:
        """Return groups of near-duplicates: same bytes, same pixels, near perceptual hashes, or near features.

        Every image of a group is a duplicate of the one that is kept. No file is changed.

        Args:
            threshold: Cosine from which features are those of duplicates, above -1, at most 1. Default: measured on
                edited copies of 500 images of the index, once for each state of it.
            keep: Of each group, keep the image of most pixels (then bytes), the first by name, or the sharpest.
            distance: Bits of 64 in which the perceptual hashes of duplicates may differ.
            progress: Called with a label; see `progress.StartProgress`.
        """
        return duplicates_of(self, threshold, keep=keep, distance=distance, progress=progress)
