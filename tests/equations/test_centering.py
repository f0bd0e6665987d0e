"""The statements of docs/centering.md, by its script with fewer batches."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/centering.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("centering", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(script: ModuleType) -> dict:
    return script.study(1000)


def test_one_step_centers_a_batch_by_its_mean(script: ModuleType) -> None:
    step = script.one_step(script.samples(1)[0])
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


def test_the_figure_is_written(script: ModuleType, results: dict, tmp_path: Path) -> None:
    script.draw(script.one_step(script.samples(1)[0]), results, tmp_path / "centering.png")
    assert (tmp_path / "centering.png").stat().st_size > 10_000
