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


def test_centering_corrects_different_means(results: dict) -> None:
    """Without it, the channel of the highest mean dominates; with it, channels of equal deviation have equal shares."""
    assert results["shares"]["softmax only"][3] > 0.65
    equal = results["shares"]["centered (Eq. 4, m = 0.9)"][:4]
    assert max(equal) - min(equal) < 0.02


def test_centering_does_not_correct_a_large_deviation(results: dict) -> None:
    """It has twice an equal share, more at low temperature; dividing by the deviation corrects it."""
    shares = results["shares"]
    wide = [shares[name][4] for name in ("centered (Eq. 4, m = 0.9)", "centered, temperature 0.1")]
    assert 0.34 < wide[0] < wide[1]
    assert shares["centered and divided by the deviation"] == pytest.approx([0.2] * 5, abs=0.02)


def test_repeated_centering_converges_to_uniform_at_high_temperature(results: dict) -> None:
    for temperature, entropies in results["repeated"].items():
        if temperature >= 0.5:
            assert entropies[-1] == pytest.approx(math.log(5), abs=1e-3)
        else:
            assert entropies[-1] < 0.4


def test_center_follows_eq4(script: ModuleType) -> None:
    logits = script.outputs(3)
    centers = script.centers(logits, 0.9)
    first = 0.1 * logits[0].mean(0)
    assert torch.equal(centers[0], torch.zeros(5))
    assert torch.allclose(centers[1], first)
    assert torch.allclose(centers[2], 0.9 * first + 0.1 * logits[1].mean(0))


def test_a_slow_center_lags(results: dict) -> None:
    late = {momentum: sum(values[300:]) / len(values[300:]) for momentum, values in results["lag"].items()}
    assert late[0.9] < 0.2 < 0.5 < late[0.999]


def test_figures_are_written(script: ModuleType, results: dict, tmp_path: Path) -> None:
    script.draw_batch(tmp_path / "batch.png")
    script.draw_study(results, tmp_path / "study.png")
    assert min((tmp_path / name).stat().st_size for name in ("batch.png", "study.png")) > 10_000
