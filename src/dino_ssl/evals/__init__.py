"""Registry of the evaluations by name; a module is imported when its evaluation is used."""

from typing import Any, NamedTuple

from dino_ssl.config import import_type
from dino_ssl.errors import UserError, did_you_mean


class Entry(NamedTuple):
    """A registered evaluation."""

    home: str
    """module:class."""
    summary: str


EVALUATIONS = {
    "knn": Entry("dino_ssl.evals.knn:KNN", "weighted k-NN accuracy of frozen features"),
    "linear": Entry("dino_ssl.evals.linear:Linear", "accuracy of a linear classifier on frozen features"),
    "low-shot": Entry("dino_ssl.evals.low_shot:LowShot", "accuracy with the labels of 1 %, 10 % or a few images"),
    "retrieval": Entry("dino_ssl.evals.retrieval:Retrieval", "landmark retrieval: revisited Oxford and Paris"),
    "copy-detection": Entry("dino_ssl.evals.copy_detection:CopyDetection", "finding the originals of edited images"),
    "video-segmentation": Entry(
        "dino_ssl.evals.video_segmentation:VideoSegmentation",
        "video object segmentation from the first mask: DAVIS 2017",
    ),
    "attention-masks": Entry(
        "dino_ssl.evals.attention_masks:AttentionMasks", "overlap of attention masks and annotated objects"
    ),
}

FINETUNE = "finetune"
"""Name of fine-tuning in `dino eval`; it is a training run, not an `Evaluation`."""


def find_evaluation(name: str) -> Any:
    """Return the `Evaluation` class of a registered name or of `module:Class`; raise UserError if there is none."""
    from dino_ssl.evals.base import Evaluation

    if ":" not in name and name not in EVALUATIONS:
        names = (*EVALUATIONS, FINETUNE)
        raise UserError(
            f"Unknown evaluation {name!r}{did_you_mean(name, names)}\n"
            f"Expected {', '.join(names)}, or module:Class; for example: dino eval knn CHECKPOINT TRAIN VAL"
        )
    return import_type(name if ":" in name else EVALUATIONS[name].home, Evaluation)


def import_all() -> None:
    """Import every registered evaluation, so that `config.from_dict` finds its settings by class name."""
    for name in EVALUATIONS:
        find_evaluation(name)
