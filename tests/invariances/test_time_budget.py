"""A run that is planned for a time gets, once, the number of epochs that fits into it, and resumes exactly."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import CPU, Run, dataset_of, edit, same_training, tiny

from dino_ssl.api import time_budget
from dino_ssl.api.session import Outcome, run_session
from dino_ssl.api.time_budget import TimeBudget
from dino_ssl.events import EpochDone, Event, Logged, Started
from dino_ssl.metrics import read_metrics
from dino_ssl.presets.plan import fit_schedule
from dino_ssl.report.sections import plan_section
from dino_ssl.run import read_run
from dino_ssl.schedules import Clock
from dino_ssl.terminal import Terminal

STARTED = Started(Clock(0, 5, 10), None, None, None, {}, {})  # pyright: ignore[reportArgumentType]
now = 0.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still, unless `session` advances it by one second per step; no report."""
    global now
    for name in ("write_report", "save_snapshot", "write_neighbors"):
        monkeypatch.setattr(f"dino_ssl.api.session.{name}", lambda *_: None)
    now = 0.0
    monkeypatch.setattr(time_budget, "time", SimpleNamespace(monotonic=lambda: now))


def narrow(out: Path) -> Run:
    return tiny(out, backbone=dict(width=24, depth=1, heads=2), optim=dict(epochs=4), save_minutes=60)


def fit(run: Run, epochs: int) -> Run:
    return edit(fit_schedule(run, epochs), online_eval=dict(every_epochs=0))


def session(run: Run, *, minutes: float | None = None, resume: bool = False, stop_at: int | None = None) -> Outcome:
    def observe(event: Event) -> None:
        global now
        if isinstance(event, Logged):
            now += 1
            if event.clock.step == stop_at:
                signal.raise_signal(signal.SIGINT)

    budget = None if minutes is None else TimeBudget(minutes, lambda epochs: fit(run, epochs))
    data, terminal = dataset_of(run.data), Terminal(quiet=True)
    return run_session(run, CPU, data, terminal, resume=resume, observe=observe, budget=budget)


def test_the_corrected_run_fits_into_the_time_and_resumes_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four epochs of five seconds, planned for 30 seconds: known after 15 %, at the end of the first epoch."""
    whole, part = narrow(tmp_path / "whole"), narrow(tmp_path / "part")
    with caplog.at_level("INFO", "dino_ssl"):
        outcome = session(whole, minutes=0.5)
    assert outcome.finished
    assert [line for line in caplog.messages if line.startswith(("Training", "Resuming", "The number"))] == [
        f"Training 4 epochs, 20 steps on 44 images; output in {whole.out}/",
        "The number of epochs is corrected from 4 to 6, which fit into 30 s at the measured speed. "
        "Training continues at step 6 of 30.",
    ]
    assert now == outcome.clock.step == 30
    content = json.loads((tmp_path / "whole/run.json").read_text())
    assert content["corrected"] == {"step": 6, "epochs": [4, 6], "minutes": 0.5}
    corrected = read_run(tmp_path / "whole")
    assert corrected == fit(whole, 6)
    rates = {line["step"]: line["lr"] for line in read_metrics(tmp_path / "whole")}
    for step, run in ((5, whole), (6, whole), (7, corrected), (29, corrected)):
        assert rates[step] == pytest.approx(run.optim.lr_schedule()(Clock(step - 1, 5, run.optim.epochs)))
    assert "the speed until step 6" in plan_section(tmp_path / "whole", private=False)

    assert not session(part, minutes=0.5, stop_at=13).finished
    assert session(read_run(tmp_path / "part"), resume=True).finished
    assert not same_training(part, whole)
    assert json.loads((tmp_path / "part/run.json").read_text())["corrected"] == content["corrected"]


def test_a_signal_at_the_correction_stops_the_run_as_planned(tmp_path: Path) -> None:
    outcome = session(narrow(tmp_path), minutes=0.5, stop_at=6)
    assert (outcome.signal, outcome.clock.step) == (signal.SIGINT, 6)
    assert "corrected" not in json.loads((tmp_path / "run.json").read_text())


@pytest.mark.parametrize(
    ("seconds", "planned", "every", "epoch", "epochs"),
    [
        (7, 10, 1, 1, 14),  # 7 % of the time, after an evaluation
        (4, 10, 1, 2, 25),  # 4 % are too early
        (6, 30, 5, 3, 17),  # no evaluation before 15 %
        (60, 10, 1, 1, 3),  # one whole epoch follows
        (60, 2, 1, 1, 2),
        (10, 10, 1, 1, 10),
        (1.01, 100, 6, 6, 100),  # within 3 %
    ],
)
def test_the_number_of_epochs_is_known_after_the_first_percents(
    seconds: float, planned: int, every: float, epoch: int, epochs: int
) -> None:
    """An epoch takes `seconds` of a hundred, with evaluations every `every` epochs."""
    global now

    budget = TimeBudget(100 / 60, lambda epochs: Run())
    budget.update(STARTED, every)
    for done in range(1, epoch + 1):
        assert budget.epochs is None
        now += seconds
        budget.update(EpochDone(Clock(done * 5, 5, planned), None), every)  # pyright: ignore[reportArgumentType]
    assert budget.epochs == epochs
    stops = budget.update(Logged(Clock(epoch * 5 + 1, 5, planned), {}), every)
    assert stops == (epochs != planned)
