"""Schedules equal loops over the steps; edge cases: no warm-up, or a longer one than the run."""

import math

import pytest

from dino_ssl.schedules import Clock, Cosine, EpochRamp, Schedule, Warmup


def curve(schedule: Schedule, epochs: int, steps_per_epoch: int) -> list[float]:
    return [schedule(Clock(step, steps_per_epoch, epochs)) for step in range(epochs * steps_per_epoch)]


def expected_curve(start: float, top: float, stop: float, warm: int, steps: int) -> list[float]:
    """A linear warm-up that reaches its peak on its last step, then half a cosine that ends one step before `stop`."""
    values = []
    for step in range(warm):
        values.append(start + (top - start) * step / (warm - 1) if warm > 1 else start)
    rest = steps - warm
    for step in range(rest):
        values.append(stop + 0.5 * (top - stop) * (1 + math.cos(math.pi * step / rest)))
    return values


@pytest.mark.parametrize(("epochs", "per_epoch", "warmup"), [(10, 7, 3), (5, 11, 1), (3, 4, 0), (4, 1, 1)])
def test_warmup_and_cosine_equal_a_loop(epochs: int, per_epoch: int, warmup: int) -> None:
    schedule = Warmup(warmup, Cosine(0.3, 0.0048), start=0.01)
    expected = expected_curve(0.01, 0.3, 0.0048, warmup * per_epoch, epochs * per_epoch)
    assert curve(schedule, epochs, per_epoch) == pytest.approx(expected, abs=1e-12)


def test_cosine_ends_one_step_before_its_final_value() -> None:
    values = curve(Cosine(0.04, 0.4), 10, 10)
    assert values[0] == pytest.approx(0.04)
    assert values[50] == pytest.approx(0.22)  # the middle of the way at half time
    assert values[-1] < 0.4
    assert Cosine(0.04, 0.4)(Clock(100, 10, 10)) == pytest.approx(0.4)
    assert values == sorted(values)
    assert values == pytest.approx(expected_curve(0, 0.04, 0.4, 0, 100), abs=1e-12)


def test_warmup_is_at_most_the_whole_run() -> None:
    values = curve(Warmup(10, Cosine(1.0, 0.0)), epochs=2, steps_per_epoch=5)
    assert values == pytest.approx([step / 9 for step in range(10)])
    assert curve(Warmup(2, Cosine(1.0, 0.0)), 2, 5) == pytest.approx(values)


def test_warmup_may_be_a_fraction_of_an_epoch() -> None:
    values = curve(Warmup(0.5, Cosine(1.0, 0.0)), epochs=2, steps_per_epoch=8)
    assert values == pytest.approx(expected_curve(0.0, 1.0, 0.0, 4, 16), abs=1e-12)
    assert curve(Warmup(0.01, Cosine(1.0, 0.0)), 2, 8)[0] == 1.0  # less than half a step is none


def test_ramp_changes_once_per_epoch_and_stays_at_its_end() -> None:
    values = curve(EpochRamp(0.04, 0.07, 4), epochs=6, steps_per_epoch=2)
    per_epoch = [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    assert values == pytest.approx([value for value in per_epoch for _ in range(2)])


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (
            EpochRamp(0.04, 0.07, 30),
            [0.04 + 0.03 * epoch / 29 for epoch in range(3)],
        ),  # the run ends on its way up
        (EpochRamp(0.04, 0.07, 3), [0.04, 0.055, 0.07]),
        (EpochRamp(0.04, 0.07, 0), [0.07, 0.07, 0.07]),
        (EpochRamp(0.04, 0.07, 1), [0.04, 0.07, 0.07]),
    ],
)
def test_ramp_edge_cases(ramp: EpochRamp, expected: list[float]) -> None:
    assert curve(ramp, epochs=3, steps_per_epoch=1) == pytest.approx(expected)


def test_clock_counts_epochs() -> None:
    assert [Clock(step, 3, 2).epoch for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert Clock(0, 3, 2).steps == 6


def test_schedules_of_one_step_are_finite() -> None:
    for schedule in (Cosine(1.0, 0.0), Warmup(10, Cosine(1.0, 0.0)), EpochRamp(1.0, 0.5, 10)):
        assert math.isfinite(schedule(Clock(0, 1, 1)))
