"""Every evaluation by its name on the command line. Each module is imported when it is asked for."""

import importlib
from typing import Any, NamedTuple

from dino_ssl.errors import UserError, did_you_mean


class Entry(NamedTuple):
    home: str
    """module:class of its settings."""
    what: str
    score: str = ""
    """module:function that scores results that exist already, given their folder and the benchmark's, if any can."""


EVALUATIONS = {
    "knn": Entry("dino_ssl.evals.knn:KNN", "weighted k-NN accuracy of frozen features"),
    "linear": Entry("dino_ssl.evals.linear:Linear", "accuracy of a linear classifier on frozen features"),
    "low-shot": Entry("dino_ssl.evals.low_shot:LowShot", "accuracy with the labels of 1 %, 10 % or a few pictures"),
    "retrieval": Entry("dino_ssl.evals.retrieval:Retrieval", "landmark search: revisited Oxford and Paris"),
    "copy-detection": Entry("dino_ssl.evals.copy_detection:CopyDetection", "finding the originals of edited pictures"),
    "video-segmentation": Entry(
        "dino_ssl.evals.video_segmentation:VideoSegmentation",
        "following objects through videos from their first mask: DAVIS 2017",
        score="dino_ssl.evals.davis_score:score_results",
    ),
    "attention-masks": Entry(
        "dino_ssl.evals.attention_masks:AttentionMasks", "how well masks of the attention cover objects"
    ),
}

FINETUNE = "finetune"
"""Asked for like an evaluation, and a training run of its own: accuracy of the whole network, trained with labels."""


def entry(name: str) -> Entry:
    """The entry of that name. Raises UserError with the nearest names."""
    if name not in EVALUATIONS:
        raise UserError(
            f"There is no evaluation {name!r}{did_you_mean(name, (*EVALUATIONS, FINETUNE))}\n"
            f"Expected one of {', '.join((*EVALUATIONS, FINETUNE))}, as in: dino eval knn CHECKPOINT TRAIN VAL"
        )
    return EVALUATIONS[name]


def find_evaluation(name: str) -> Any:
    """The class of an evaluation's settings, an `Evaluation`."""
    return _imported(entry(name).home)


def scorer(name: str) -> Any:
    """What scores results that exist, (results, root, *, split, progress) -> dict. Raises UserError where none can."""
    if not entry(name).score:
        able = ", ".join(name for name, one in EVALUATIONS.items() if one.score)
        raise UserError(f"dino eval {name} has no --score: results that exist are scored by {able} alone.")
    return _imported(entry(name).score)


def _imported(home: str) -> Any:
    module, thing = home.split(":")
    return getattr(importlib.import_module(module), thing)
