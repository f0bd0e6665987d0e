"""Every evaluation by its name on the command line. Each module is imported when it is asked for."""

import importlib
from typing import Any, NamedTuple

from dino.errors import UserError, nearest


class Entry(NamedTuple):
    home: str
    """module:class of its settings."""
    what: str


EVALUATIONS = {
    "knn": Entry("dino.evals.knn:KNN", "weighted k-NN accuracy of frozen features"),
    "linear": Entry("dino.evals.linear:Linear", "accuracy of a linear classifier on frozen features"),
    "low-shot": Entry("dino.evals.low_shot:LowShot", "accuracy with the labels of 1 %, 10 % or a few pictures"),
    "retrieval": Entry("dino.evals.retrieval:Retrieval", "landmark search: revisited Oxford and Paris"),
    "copy-detection": Entry("dino.evals.copy_detection:CopyDetection", "finding the originals of edited pictures"),
    "attention-masks": Entry(
        "dino.evals.attention_masks:AttentionMasks", "how well masks of the attention cover objects"
    ),
}


def find(name: str) -> Any:
    """The class of an evaluation's settings (an `Evaluation`). Raises UserError with the nearest names."""
    if name not in EVALUATIONS:
        raise UserError(
            f"There is no evaluation {name!r}{nearest(name, EVALUATIONS)}\n"
            f"Expected one of {', '.join(EVALUATIONS)}, as in: dino eval knn CHECKPOINT TRAIN VAL"
        )
    module, kind = EVALUATIONS[name].home.split(":")
    return getattr(importlib.import_module(module), kind)
