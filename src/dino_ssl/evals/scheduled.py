"""Evaluations that a training run asks of its network on the way: a Run's `evals`, and what they are bound to."""

import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.evals.attention_masks import AttentionMasks
from dino_ssl.evals.base import EvalContext, Evaluator, RequiresBackbone
from dino_ssl.evals.copy_detection import CopyDetection
from dino_ssl.evals.knn import KNN
from dino_ssl.evals.linear import Linear
from dino_ssl.evals.low_shot import LowShot
from dino_ssl.evals.retrieval import Retrieval
from dino_ssl.evals.video_segmentation import VideoSegmentation
from dino_ssl.models.backbone import Backbone

Settings = KNN | Linear | LowShot | Retrieval | CopyDetection | VideoSegmentation | AttentionMasks
"""Of every evaluation in `EVALUATIONS`, by type: what a run.json may name."""


@dataclass(frozen=True, kw_only=True)
class ScheduledEval:
    """An evaluation of the network while it trains: what is typed behind `dino eval`, without the checkpoint."""

    evaluation: Settings
    """Which, and its protocol."""
    sources: tuple[str | Folder | Scenes, ...]
    """What it is asked on, in the order of the command line: folders, or the word `scenes`."""
    every_epochs: float = 0
    """Ask before the first step, then each time this many epochs have passed; 0: at the end alone."""

    def __post_init__(self) -> None:
        known = self.evaluation.sources
        least = sum(source.required for source in known)
        if not least <= len(self.sources) <= len(known):
            expected = " ".join(source.name if source.required else f"[{source.name}]" for source in known)
            raise UserError(
                f"{self.evaluation.name} expected {expected}; got {' '.join(map(_word, self.sources)) or 'nothing'}."
            )
        if not 0 <= self.every_epochs < math.inf:
            raise UserError(f"--every-epochs must be 0 (at the end alone) or more; got {self.every_epochs:g}.")

    @property
    def label(self) -> str:
        """What its figures are called: `retrieval roxford5k --multiscale`."""
        words = [self.evaluation.name, *map(_word, self.sources), *_flags(self.evaluation)]
        return shlex.join(words)

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.label} --every-epochs {self.every_epochs:g}" if self.every_epochs else self.label


class BoundEval(NamedTuple):
    """An evaluation that is bound to its data, ready to be called as often as one likes."""

    label: str
    every_epochs: float
    evaluator: Evaluator


def must_differ(asks: Sequence[ScheduledEval]) -> None:
    """Raises UserError where two would have the same name in the curves."""
    labels = [ask.label for ask in asks]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"An evaluation is asked for twice: {twice}. Give each of --evals once.")


def bind_all(asks: Sequence[ScheduledEval], context: EvalContext, backbone: Backbone) -> list[BoundEval]:
    """Opens the data of every one, before anything is trained. Raises UserError, which names the one that cannot be."""
    bound = []
    for ask in asks:
        try:
            evaluator = ask.evaluation.bind(ask.sources, context)
            if isinstance(evaluator, RequiresBackbone):
                evaluator.validate(backbone)
        except UserError as error:
            raise UserError(f'--evals "{ask.label}" cannot be asked: {error}') from error
        bound.append(BoundEval(ask.label, ask.every_epochs, evaluator))
    return bound


def _word(source: str | Folder | Scenes) -> str:
    return "scenes" if isinstance(source, Scenes) else source.path if isinstance(source, Folder) else source


def _flags(settings: Any) -> Iterator[str]:
    """The settings that are not the default ones, as they are typed."""
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(field.default, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield f"--{flag}"
            yield from map(str, value if isinstance(value, tuple) else [value])
