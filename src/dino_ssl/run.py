"""The settings of a training run, stored with it as JSON."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dino_ssl.config import from_dict
from dino_ssl.data.sources import DatasetConfig, Folder  # imports every class that run.json may name
from dino_ssl.data.transforms.augment import Augment
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.errors import UserError, check_range
from dino_ssl.evals.online import OnlineEval
from dino_ssl.evals.scheduled import ScheduledEval, check_labels_differ
from dino_ssl.files import check_format, read_json
from dino_ssl.methods import DINOConfig  # likewise
from dino_ssl.methods.method import MethodConfig
from dino_ssl.models import BackboneConfig, ViT  # likewise
from dino_ssl.optim import Optim
from dino_ssl.preprocessing import Preprocessing
from dino_ssl.runtime import Precision
from dino_ssl.schedules import Schedule

FORMAT = 1
"""Version of run.json."""
EXECUTION_FIELDS = (
    "data.path",
    "val.path",
    "online_eval.batch_size",
    "evals",
    "optim.micro_batch",
    "precision",
    "grad_checkpointing",
    "workers",
    "cache",
    "log_every",
    "save_minutes",
    "keep_every",
    "thumbnails",
    "on_collapse",
    "out",
)
"""Fields that do not change what a run learns: where and how fast it runs, what it measures and saves."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Every setting that decides what a training run does. Saved with every checkpoint."""

    data: DatasetConfig = field(default_factory=lambda: Folder(path="photos"))
    """The dataset."""
    val: DatasetConfig | None = None
    """Validation set, labeled if the dataset is; None: a fraction of the dataset (of every class) is held out."""
    backbone: BackboneConfig = field(default_factory=ViT)
    """The network that is trained."""
    init: str | None = None
    """Initial weights of the backbone: a run folder, a file, a released name or timm:NAME; None: random."""
    method: MethodConfig = field(default_factory=DINOConfig)
    """The training method."""
    views: MultiCrop | Augment = field(default_factory=MultiCrop)
    """The augmentation."""
    optim: Optim = field(default_factory=Optim)
    """Optimizer and schedules."""
    online_eval: OnlineEval = field(default_factory=OnlineEval)
    """Quality measured during training: accuracy, or two-crop retrieval if the dataset has no labels."""
    evals: tuple[ScheduledEval, ...] = ()
    """Evaluations during training, each in quotes, as after `dino eval` but without CHECKPOINT:
    --evals "linear train/ val/" "retrieval roxford5k/ --every-epochs 10". They run at the end of training; with
    --every-epochs N also before the first step and every N epochs."""
    precision: Precision = "float32"
    """Autocast precision of matrix products. float32 uses TF32 on GPUs that support it."""
    workers: int = 2
    """Data loading processes per rank; 0: load in the training process."""
    grad_checkpointing: bool = False
    """Activation checkpointing: recompute the activations of each block in the backward pass. Needs far less memory and
    a third more time."""
    cache: bool = False
    """Keep decoded images in memory. Worth it if they fit and decoding is the bottleneck."""
    seed: int = 0
    """Seed of initial weights, image order and augmentation."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    save_minutes: float = 10
    """Minutes between two saves of checkpoints/last.pt. A checkpoint is also saved at the end and after Ctrl-C."""
    keep_every: int = 0
    """Epochs between two checkpoints that are kept; 0: keep only the last and the best."""
    thumbnails: bool = True
    """Show images of the dataset and paths of files in the report. --no-thumbnails omits both, for a report that may be
    shared, and saves no snapshots of attention maps."""
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """Action on a collapse: print a warning, stop, or stop and restore the last healthy checkpoint
    (docs/collapse.md)."""
    out: str = "runs/dino"
    """Output folder."""

    def __post_init__(self) -> None:
        check_range(self, "workers", "seed", "save_minutes", "keep_every", least=0)
        check_range(self, "log_every", least=1)
        views, needed = self.views.view_shapes[0][0], self.method.global_views
        method = type(self.method).__name__.removesuffix("Config")
        if views < needed:
            raise UserError(f"{method} needs {needed} views of an image, got {views}: use MultiCrop.")
        check_labels_differ(self.evals)
        if self.optim.micro_batch and not self.method.supports_grad_accumulation:
            raise UserError(
                f"The loss of {method} depends on the whole batch, which `optim.micro_batch` would split: "
                "set it to 0, and lower `optim.batch_size` instead."
            )

    @property
    def eval_size(self) -> int:
        """Side in pixels of the center crops of which features of the trained network are computed."""
        return self.online_eval.size or self.views.size

    @property
    def preprocessing(self) -> Preprocessing:
        """Evaluation transform of the trained network."""
        return Preprocessing(size=self.eval_size, bit_depth=self.data.bit_depth)

    def schedules(self) -> dict[str, Schedule]:
        """Return every scheduled value by the name under which it is logged."""
        rates = {"lr": self.optim.lr_schedule(), "weight_decay": self.optim.weight_decay_schedule()}
        return rates | self.method.schedules()


def read_run(folder: Path, *, trust: bool = False) -> Run:
    """Return the Run of a run folder. trust: import types from outside the package, which runs their code.

    Raises UserError if there is no run.json, or if it is damaged or has another format version.
    """
    content, path = _read(folder), folder / "run.json"
    try:
        return from_dict(Run, content["run"], trust=trust)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not the run.json of a training run ({type(error).__name__}: {error}).") from error


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of run.json, with the numbers of images and the reference scores that training wrote.

    Raises UserError as `read_run`.
    """
    content, path = _read(folder), folder / "run.json"
    data, scores = content.get("data"), content.setdefault("reference_scores", {})
    if not isinstance(data, dict) or not all(_is_count(data.get(name, 1)) for name in ("trained_on", "validated_on")):
        data = {}
    if not data.get("trained_on"):
        raise UserError(
            f"{path} lacks data.trained_on, the number of training images, so the run cannot be resumed or evaluated. "
            "Restore the file that `dino train` wrote, or start a new run with a different `out`."
        )
    content["versions"] = versions if isinstance(versions := content.get("versions"), dict) else {}
    rows = scores.values() if isinstance(scores, dict) else [None]
    if not all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in rows):
        raise UserError(f"{path} is damaged: expected reference_scores by name, got {scores!r:.80}.")
    return content


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"No run in {folder}: run.json is missing. Expected a folder made by `dino train`.")
    content = read_json(path)
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is not the run.json of a training run: expected a JSON object with `format`.")
    check_format(path, content["format"], FORMAT)
    return content


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**40


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
