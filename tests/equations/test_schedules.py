"""Schedules against loops over the steps, and at their edges: no warm-up, too long a one, or ramp."""

import math

import pytest

from dino_ssl.schedules import Clock, Constant, Cosine, EpochRamp, Schedule, Warmup, scale_schedule


def curve(schedule: Schedule, epochs: int, steps_per_epoch: int) -> list[float]:
    return [schedule(Clock(step, steps_per_epoch, epochs)) for step in range(epochs * steps_per_epoch)]


def by_hand(start: float, top: float, stop: float, warm: int, steps: int) -> list[float]:
    """A line that reaches its top on its last step, then half a cosine that ends one step short of `stop`."""
    values = []
    for step in range(warm):
        values.append(start + (top - start) * step / (warm - 1) if warm > 1 else start)
    rest = steps - warm
    for step in range(rest):
        values.append(stop + 0.5 * (top - stop) * (1 + math.cos(math.pi * step / rest)))
    return values


@pytest.mark.parametrize(("epochs", "per_epoch", "warmup"), [(10, 7, 3), (5, 11, 1), (3, 4, 0), (4, 1, 1)])
def test_warmup_and_cosine_against_a_loop(epochs: int, per_epoch: int, warmup: int) -> None:
    schedule = Warmup(warmup, Cosine(0.3, 0.0048), start=0.01)
    expected = by_hand(0.01, 0.3, 0.0048, warmup * per_epoch, epochs * per_epoch)
    assert curve(schedule, epochs, per_epoch) == pytest.approx(expected, abs=1e-12)


def test_cosine_starts_at_its_start_and_ends_one_step_short_of_its_stop() -> None:
    values = curve(Cosine(0.04, 0.4), 10, 10)
    assert values[0] == pytest.approx(0.04)
    assert values[50] == pytest.approx(0.22)  # the middle of the way at half time
    assert values[-1] < 0.4
    assert Cosine(0.04, 0.4)(Clock(100, 10, 10)) == pytest.approx(0.4)
    assert values == sorted(values)
    assert values == pytest.approx(by_hand(0, 0.04, 0.4, 0, 100), abs=1e-12)


def test_a_warmup_longer_than_the_run_takes_the_whole_run() -> None:
    values = curve(Warmup(10, Cosine(1.0, 0.0)), epochs=2, steps_per_epoch=5)
    assert values == pytest.approx([step / 9 for step in range(10)])
    assert curve(Warmup(2, Cosine(1.0, 0.0)), 2, 5) == pytest.approx(values)


def test_a_warmup_may_be_a_part_of_an_epoch() -> None:
    values = curve(Warmup(0.5, Cosine(1.0, 0.0)), epochs=2, steps_per_epoch=8)
    assert values == pytest.approx(by_hand(0.0, 1.0, 0.0, 4, 16), abs=1e-12)
    assert curve(Warmup(0.01, Cosine(1.0, 0.0)), 2, 8)[0] == 1.0  # less than half a step is none


def test_warmup_to_a_constant_stays_there() -> None:
    assert curve(Warmup(1, Constant(2.0)), 2, 3) == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert curve(Constant(0.04), 2, 2) == [0.04] * 4


def test_the_ramp_moves_once_an_epoch_and_stays_on_top() -> None:
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
def test_the_ramp_at_its_edges(ramp: EpochRamp, expected: list[float]) -> None:
    assert curve(ramp, epochs=3, steps_per_epoch=1) == pytest.approx(expected)


def test_scaling_moves_the_peak_and_leaves_a_cosines_floor() -> None:
    """The linear scaling rule: lr * batch / 256, min_lr as it is (Sec. 3.2)."""
    assert scale_schedule(Warmup(10, Cosine(5e-4, 1e-6)), 4) == Warmup(10, Cosine(2e-3, 1e-6))
    assert scale_schedule(Warmup(1, Constant(3.0)), 2) == Warmup(1, Constant(6.0))
    assert scale_schedule(Constant(3.0), 2) == Constant(6.0)
    assert scale_schedule(Cosine(2.0, 1.0), 0.5) == Cosine(1.0, 1.0)
    values = curve(scale_schedule(Warmup(1, Cosine(1.0, 0.5)), 2), 3, 4)
    assert max(values) == pytest.approx(2.0)
    assert min(values[4:]) > 0.5


def test_clock_tells_the_epoch() -> None:
    assert [Clock(step, 3, 2).epoch for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert Clock(0, 3, 2).steps == 6


def test_a_run_of_one_step_has_values() -> None:
    for schedule in (Constant(1.0), Cosine(1.0, 0.0), Warmup(10, Cosine(1.0, 0.0)), EpochRamp(1.0, 0.5, 10)):
        assert math.isfinite(schedule(Clock(0, 1, 1)))
