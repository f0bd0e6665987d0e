"""Evaluation during training: the online evaluation on a validation set, and the `evals` of a Run."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from dino_ssl import distributed
from dino_ssl.data.dataset import ImageDataset
from dino_ssl.data.sources import check_distinct, relabeled, source_name
from dino_ssl.evals.base import EvalContext, RunDatasets, reference_scores
from dino_ssl.evals.scheduled import PreparedScheduledEval, is_due, prepare_all
from dino_ssl.events import EvalDone, EvalStarted, Evaluated
from dino_ssl.methods.method import Method
from dino_ssl.metrics import Log, read_metrics
from dino_ssl.run import Run, read_description
from dino_ssl.runtime import Runtime
from dino_ssl.schedules import Clock
from dino_ssl.state import State


class TrainingEvals:
    """The evaluations of a training run, with their data open; call them on all ranks."""

    reference_scores: Mapping[str, Mapping[str, float]]
    """Of the online evaluation, measured at the start of a run; a resumed run reads them from run.json."""

    def __init__(
        self,
        run: Run,
        rt: Runtime,
        method: Method,
        train_set: ImageDataset,
        val_set: ImageDataset | None,
        *,
        resume: bool,
    ) -> None:
        self.folder, self.method, self.every_epochs = Path(run.out), method, run.online_eval.every_epochs
        context = eval_context(run, rt)
        self.online = None
        if val_set is not None:
            self.online = run.online_eval.prepare(method.classifier, train_set, val_set, context)
        self.scheduled = prepare_all(run.evals, context, method.backbone, run_datasets(run, train_set, val_set))
        described = distributed.run_on_rank0(lambda: read_description(self.folder) if resume else None)
        if described is not None:
            self.reference_scores = described["reference_scores"]
        elif self.online is not None:
            build = None if method.classifier else lambda: run.backbone.build(drop_path=0.0).to(rt.device)
            self.reference_scores = reference_scores(self.online, build)
        else:
            self.reference_scores = {}

    def run_online(self, clock: Clock, log: Log, state: State) -> Evaluated | None:
        """Run the online evaluation if it is due, and remember the best one in `state`."""
        if self.online is None or not is_due(self.every_epochs, clock):
            return None
        values = dict(self.online(self.method.backbone))
        name, value = next(iter(values.items()))
        is_best = value > state.best.get("value", -math.inf)
        if is_best:
            state.best = {"value": value, "name": name, "epoch": clock.epoch}
        log.write(clock, {"eval": self.online.name, **values})
        return Evaluated(clock, self.online.name, values, is_best)

    def run(self, evals: list[PreparedScheduledEval], clock: Clock, log: Log) -> Iterator[EvalStarted | EvalDone]:
        """Run these of the scheduled evaluations on the current network."""
        for item in evals:
            yield EvalStarted(clock, item.label)
            values = dict(item.evaluation(self.method.backbone))
            log.write(clock, {"eval": item.label, **values}, item.label)
            yield EvalDone(clock, item.label, values)

    def pending(self, clock: Clock) -> list[PreparedScheduledEval]:
        """Return the evaluations due before the first step.

        At step 0 all scheduled ones; after a resume those that were due at this step and have no line in the metrics,
        because training stopped before they ran.
        """
        if clock.step == 0:
            return [item for item in self.scheduled if item.every_epochs]
        if clock.step % clock.steps_per_epoch:
            return []
        due = [item for item in self.scheduled if is_due(item.every_epochs, clock)]
        lines = distributed.run_on_rank0(lambda: read_metrics(self.folder)) if due else []
        logged = {line.get("eval") for line in lines if line["step"] == clock.step}
        return [item for item in due if item.label not in logged]


def split_dataset(run: Run, dataset: ImageDataset) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the training set and the validation set of the online evaluation; None if it is disabled or impossible."""
    if run.online_eval.every_epochs == 0:
        return dataset, None
    if run.val is None:
        fraction = run.online_eval.held_out_fraction(dataset)
        train_set, val_set = dataset.split(fraction, run.seed) if fraction else (dataset, None)
        return train_set, val_set or None  # no class has two images
    val_set = distributed.run_on_rank0(run.val.open).with_bit_depth(dataset.bit_depth)
    check_distinct(run.data, dataset, run.val, val_set)
    if dataset.labels is None:
        return dataset, val_set
    return dataset, relabeled(val_set, dataset.classes, source_name(run.val))


def run_datasets(run: Run, train_set: ImageDataset, val_set: ImageDataset | None) -> RunDatasets:
    """Return the images that evaluations of a run have by default."""
    return RunDatasets(train_set, val_set, run.online_eval.voters(train_set))


def eval_context(run: Run, rt: Runtime) -> EvalContext:
    """Return the context in which a run's network is evaluated: in float32, as by `dino eval`, at any precision."""
    return EvalContext(
        device=rt.device,
        workers=run.workers,
        batch_size=run.online_eval.batch_size,
        size=run.eval_size,
    )
