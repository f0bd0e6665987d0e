"""What settings have to do with a collapse: which of them are known for one, and what to turn when it comes.

The sources are the paper's ablations (Figs. 6 and 7, Table 15, App. C and D) and what its authors advised.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dino_ssl.config import edit
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.run import Run
from dino_ssl.schedules import Clock

SAFE_TEMPERATURE = 0.06
"""App. D: 0.06 works from the first epoch on, 0.07 after a warm-up from 0.04, 0.08 at once does not."""
HOT_TEMPERATURE = 0.08
"""Above it a warm-up is not known to help."""
SLOW_CENTER = 0.99
"""App. D: a center momentum of 0.99 works, 0.999 does not."""
PROTOTYPES_EACH = 4
"""More prototypes for each picture than this are too many."""

ADVICE = {
    "Uniform collapse": "Lower the teacher's temperature (--method.teacher-temp), or the learning rate; warm both up "
    "for longer.",
    "Collapse to one prototype": "Check that centering is on (--method.targets centering); lower "
    "--method.center-momentum, or raise the teacher's temperature.",
    "One target for all": "Raise the teacher's momentum (--method.momentum), lower the learning rate, or take batch "
    "norm in the head (--method.head-norm batch).",
    "Feature collapse": "Lower the learning rate or warm it up for longer, and check that what holds the method up is "
    "on: centering and sharpening, a predictor, negatives.",
    "The teacher does not move": "Lower --method.momentum: 0.996 for some ten thousand steps, 0.97 to 0.99 for some "
    "thousand.",
    "Divergence": "Lower --optim.lr, set --optim.clip-grad to 1 or less, or train with --precision float32.",
    "Not learning yet": "Raise the learning rate, lower the teacher's momentum (0.99 for small data), or take fewer "
    "prototypes.",
}
"""What to turn, whatever the settings are."""


@dataclass(frozen=True)
class Finding:
    """What is wrong: its name, what was seen, and what to turn."""

    name: str
    seen: str
    turn: str
    grave: bool = True
    """Whether going on as it is is of no use; otherwise it is a hint."""

    def __str__(self) -> str:
        return f"{self.name}: {self.seen} {self.turn}"


def check_config(run: Run, steps_per_epoch: int, dataset: int) -> list[Finding]:
    """What the settings alone give reason to fear, before the first step."""
    return [*_known_for_collapse(run), *_too_short(run, steps_per_epoch), *_too_many(run, dataset)]


def advise(name: str, run: Run | None) -> str:
    """What to turn where a finding of this name has come: first the settings that are known for it."""
    known = [] if run is None or name == "The teacher does not move" else list(_known_for_collapse(run))
    return " ".join([*(f"{finding.name}: {finding.turn}" for finding in known), ADVICE[name]])


def relax(run: Run, name: str) -> Run | None:
    """The run with which to go on from a healthy checkpoint after a collapse of this name; None where no milder setting
    helps, since a part is missing that holds it up.

    The learning rate is halved, whatever came. Uniform: the teacher's temperature falls by a quarter. Diverged: the
    gradients are clipped at 1 or less. A slow center gets 0.9, a teacher that does not move 0.99.
    """
    if any(finding.grave for finding in _known_for_collapse(run)):
        return None
    run = edit(run, optim=dict(lr=run.optim.lr / 2, min_lr=min(run.optim.min_lr, run.optim.lr / 2)))
    if name == "Divergence":
        run = edit(run, optim=dict(clip_grad=min(run.optim.clip_grad or 1.0, 1.0)))
    method = run.method
    if name == "The teacher does not move" and hasattr(method, "momentum"):
        run = edit(run, method=dict(momentum=0.99))
    if isinstance(method, DINOConfig):
        cooler = 0.75 if name == "Uniform collapse" else 1.0
        changed = dict(
            teacher_temp=method.teacher_temp * cooler,
            warmup_teacher_temp=method.warmup_teacher_temp * cooler,
            center_momentum=method.center_momentum if method.center_momentum <= SLOW_CENTER else 0.9,
        )
        run = edit(run, method=changed)
    return run


def _known_for_collapse(run: Run) -> Iterator[Finding]:
    """Settings with which others have collapsed. Grave: a part is missing that no milder setting replaces."""
    method = run.method
    if isinstance(method, BYOLConfig) and not method.predictor:
        yield Finding("No predictor", "BYOL without one gives one answer (Table 14, row 8: 0.1).", "--method.predictor")
    if not isinstance(method, DINOConfig):
        return
    if method.head_bottleneck == 0 and method.head_layers >= 3:
        seen = f"{method.head_layers} layers without a bottleneck's norm do not learn (App. C: 0.1)."
        yield Finding("No bottleneck", seen, "Set --method.head-bottleneck 256.")
    if method.targets in ("centering", "none") and method.teacher in ("student", "previous-step"):
        seen = (
            f"--method.teacher {method.teacher} has no memory, and centering does not hold it (Fig. 6, Table 15: 0.1)."
        )
        yield Finding("No momentum", seen, "Set --method.teacher momentum, or --method.targets sinkhorn.")
    if method.loss == "mse":
        return
    if method.targets == "none":
        seen = "one prototype will take every picture (Fig. 7)."
        yield Finding("No centering", seen, "Set --method.targets centering.")
    if not method.sharpening:
        seen = f"the teacher has the student's temperature, {method.student_temp:g}, and becomes uniform (Fig. 7)."
        yield Finding("No sharpening", seen, "Set --method.sharpening.")
    elif method.targets == "centering" and (seen := _too_hot(run, method)):
        turn = "Begin at 0.04 (--method.warmup-teacher-temp) and rise over some ten epochs or more, or stay at 0.04."
        yield Finding("Temperature too high for its warm-up", seen, turn, grave=False)
    if method.targets == "centering" and method.center_momentum > SLOW_CENTER:
        seen = f"--method.center-momentum {method.center_momentum:g} lags behind the outputs (App. D: 0.999 gives 0.1)."
        yield Finding("Center too slow", seen, "Set it to 0.9.", grave=False)


def _too_hot(run: Run, method: DINOConfig) -> str:
    """In words, whether the teacher's temperature is above what works before the learning rate has risen, or at all."""
    ramp, epochs = method.teacher_temp_schedule(), run.optim.epochs
    warming = range(min(epochs, math.ceil(run.optim.warmup_epochs) or 1))
    early = next((epoch for epoch in warming if ramp(Clock(epoch, 1, epochs)) > SAFE_TEMPERATURE), None)
    if early is None and method.teacher_temp <= HOT_TEMPERATURE:
        return ""
    when = "at last" if early is None else "from the first step on" if early == 0 else f"in epoch {early + 1} already"
    return (
        f"--method.teacher-temp {method.teacher_temp:g} is above {SAFE_TEMPERATURE:g} {when} (App. D: 0.08 gives 0.1)."
    )


def _too_short(run: Run, steps_per_epoch: int) -> Iterator[Finding]:
    """The teacher's memory against the length of the run: what is left of its random start at the end."""
    momentum = run.method.schedules().get("momentum")
    steps = steps_per_epoch * run.optim.epochs
    if momentum is None or steps == 0:
        return
    points = min(steps, 1000)
    clocks = (Clock(int(steps * (i + 0.5) / points), steps_per_epoch, run.optim.epochs) for i in range(points))
    taken = steps / points * sum(1 - momentum(clock) for clock in clocks)
    if taken < 1:
        seen = f"in {steps} steps the teacher stays {math.exp(-taken):.0%} the network that it begins as."
        turn = f"Set --method.momentum to {max(0.9, 1 - 6 / steps):.3g} or less, or train for longer."
        yield Finding("Momentum too high for so few steps", seen, turn, grave=False)


def _too_many(run: Run, dataset: int) -> Iterator[Finding]:
    method = run.method
    if (num_prototypes := method.num_prototypes) is not None and num_prototypes > PROTOTYPES_EACH * dataset:
        seen = f"{num_prototypes} prototypes share {dataset} pictures, and most stay empty."
        enough = max(32, 2 ** int(math.log2(max(1, dataset))))
        turn = f"Set --method.out-dim to {enough} or so."
        yield Finding("K too large for so few pictures", seen, turn, grave=False)
