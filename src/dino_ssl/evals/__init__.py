"""Registry of the evaluations by name; a module is imported when its evaluation is used."""

from collections.abc import Iterable
from typing import Any

from dino_ssl.config import import_type
from dino_ssl.errors import UserError, did_you_mean

EVALUATIONS = {
    "knn": "dino_ssl.evals.knn:KNN",
    "linear": "dino_ssl.evals.linear:Linear",
    "low-shot": "dino_ssl.evals.low_shot:LowShot",
    "retrieval": "dino_ssl.evals.retrieval:Retrieval",
    "copy-detection": "dino_ssl.evals.copy_detection:CopyDetection",
    "video-segmentation": "dino_ssl.evals.video_segmentation:VideoSegmentation",
    "attention-masks": "dino_ssl.evals.attention_masks:AttentionMasks",
    "object-discovery": "dino_ssl.evals.object_discovery:ObjectDiscovery",
    "weak-segmentation": "dino_ssl.evals.weak_segmentation:WeakSegmentation",
    "two-crop-retrieval": "dino_ssl.evals.two_crop_retrieval:TwoCropRetrieval",
}
FINETUNE = "finetune"
"""Name of fine-tuning in `dino eval`; it is a training run, not an `Evaluation`."""


def check_name(name: str, known: Iterable[str] = (*EVALUATIONS, FINETUNE)) -> None:
    """Raise UserError if there is no evaluation of this name."""
    if ":" not in name and name not in known:
        names = (*EVALUATIONS, FINETUNE)
        raise UserError(
            f"Unknown evaluation {name!r}{did_you_mean(name, names)}\n"
            f"Expected {', '.join(names)}, or module:Class; for example: dino eval knn CHECKPOINT TRAIN VAL"
        )


def find_evaluation(name: str) -> Any:
    """Return the `Evaluation` class of a registered name or of `module:Class`; raise UserError if there is none."""
    from dino_ssl.evals.base import Evaluation

    check_name(name, EVALUATIONS)
    return import_type(EVALUATIONS.get(name, name), Evaluation)


def import_all() -> None:
    """Import every registered evaluation, so that `config.from_dict` finds its settings by class name."""
    for name in EVALUATIONS:
        find_evaluation(name)
