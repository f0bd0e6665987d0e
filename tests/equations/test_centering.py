"""What docs/centering.md says of five channels, at a small size: the page's script is run as it stands."""

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
def found(script: ModuleType) -> dict:
    return script.study(1000)


def test_centering_repairs_every_mean(found: dict) -> None:
    """Alone, the channel with the highest mean takes most; centered, channels of one deviation share alike."""
    assert found["shares"]["softmax alone"][3] > 0.65
    quiet = found["shares"]["centered (Eq. 4, m = 0.9)"][:4]
    assert max(quiet) - min(quiet) < 0.02


def test_centering_does_not_repair_a_deviation(found: dict) -> None:
    """What swings widest keeps twice a share, more at a low temperature; dividing by the deviation repairs that."""
    shares = found["shares"]
    wide = [shares[name][4] for name in ("centered (Eq. 4, m = 0.9)", "centered, temperature 0.1")]
    assert 0.34 < wide[0] < wide[1]
    assert shares["centered and divided by the deviation"] == pytest.approx([0.2] * 5, abs=0.02)


def test_repeated_it_tends_to_uniform_unless_it_is_sharp(found: dict) -> None:
    for temperature, entropies in found["repeated"].items():
        if temperature >= 0.5:
            assert entropies[-1] == pytest.approx(math.log(5), abs=1e-3)
        else:
            assert entropies[-1] < 0.4


def test_the_center_is_eq_4_step_by_step(script: ModuleType) -> None:
    logits = script.outputs(3)
    met = script.centers(logits, 0.9)
    first = 0.1 * logits[0].mean(0)
    assert torch.equal(met[0], torch.zeros(5))
    assert torch.allclose(met[1], first)
    assert torch.allclose(met[2], 0.9 * first + 0.1 * logits[1].mean(0))


def test_a_slow_center_lags(found: dict) -> None:
    late = {momentum: sum(values[300:]) / len(values[300:]) for momentum, values in found["lag"].items()}
    assert late[0.9] < 0.2 < 0.5 < late[0.999]


def test_the_figures_are_drawn(script: ModuleType, found: dict, tmp_path: Path) -> None:
    script.draw_batch(tmp_path / "batch.png")
    script.draw_study(found, tmp_path / "study.png")
    assert min((tmp_path / name).stat().st_size for name in ("batch.png", "study.png")) > 10_000
