"""The statements and the numbers of docs/centering.md, by its script."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import centering

PAGE = (Path(__file__).parents[2] / "docs/centering.md").read_text()


@pytest.fixture(scope="module")
def results() -> dict:
    return centering.study(4000)


@pytest.fixture(scope="module")
def step() -> centering.Step:
    return centering.one_step(centering.samples(1)[0])


def rows_of(table: str) -> list[list[float]]:
    """Return the numbers in the cells of a table, without the head and the first column."""
    rows = [line.replace("*", "").split("|")[2:-1] for line in table.splitlines()[2:]]
    return [[float(cell) for cell in row if re.fullmatch(r"\s*-?[\d.]+\s*", cell)] for row in rows]


def test_the_tables_of_the_page_are_those_of_the_script(step: centering.Step, results: dict) -> None:
    entropies = [*results["entropy"].values()]
    expected = [
        (2, step.samples),
        (3, step.softmax_of_samples),
        (2, step.center[None]),
        (2, step.centered),
        (3, step.softmax_of_centered),
        (3, [[*shares, entropy] for shares, entropy in zip(results["shares"].values(), entropies, strict=True)]),
        (3, [[values[times - 1] for times in (1, 2, 5, 60)] for values in results["repeated"].values()]),
    ]
    tables = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    for table, (digits, values) in zip(tables, expected, strict=True):
        np.testing.assert_allclose(rows_of(table), values, rtol=0, atol=0.51 * 10**-digits, err_msg=table)


def test_the_page_says_how_fast_the_center_adapts() -> None:
    for momentum in centering.MOMENTA:
        batches = centering.batches_to_adapt(momentum)
        assert 1000 * momentum**batches < 1 <= 1000 * momentum ** (batches - 1)
        assert re.search(rf"after\s{batches:,}\s(batches )?with (m = )?{momentum}\b", PAGE)


def test_one_step_centers_a_batch_by_its_mean(step: centering.Step) -> None:
    assert step.samples.shape == (4, 5)
    torch.testing.assert_close(step.center, step.samples.mean(0))
    torch.testing.assert_close(step.centered.sum(0), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(step.softmax_of_centered, step.centered.softmax(1), atol=1e-4, rtol=0)
    assert (step.softmax_of_samples.argmax(1) == 3).all()


def test_centering_corrects_an_extreme_mean(results: dict) -> None:
    """Without it, the channel has nearly every target; with it, it has the share of others with its deviation."""
    assert results["shares"]["softmax only"][3] > 0.8
    narrow, _, _, extreme, _ = results["shares"]["centered"]
    assert extreme == pytest.approx(narrow, abs=0.02)


def test_centering_does_not_correct_an_extreme_deviation(results: dict) -> None:
    """It has half of the targets, those of the images above its mean; dividing by the deviation corrects it."""
    assert results["shares"]["centered"][4] == pytest.approx(0.5, abs=0.03)
    assert results["shares"]["centered and divided by the deviation"] == pytest.approx([0.2] * 5, abs=0.02)


def test_repeated_centering_converges_to_uniform_at_high_temperature(results: dict) -> None:
    for temperature, entropies in results["repeated"].items():
        if temperature >= 0.5:
            assert entropies[-1] == pytest.approx(math.log(5), abs=1e-3)
            assert entropies == sorted(entropies) or entropies[10] == pytest.approx(math.log(5), abs=1e-2)
        else:
            assert entropies[-1] < 0.85


def test_the_figure_is_written(step: centering.Step, results: dict, tmp_path: Path) -> None:
    centering.draw(step, results, tmp_path / "centering.png")
    assert (tmp_path / "centering.png").stat().st_size > 10_000
