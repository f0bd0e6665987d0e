"""It learns, and it collapses the way Fig. 7 says when a half of what prevents it is taken away."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import CPU, RUN, edit, fit

from dino.data.pictures import Pictures
from dino.logs import read_metrics
from dino.train import Evaluated, Started, train

LN_K = math.log(RUN.method.out_dim)

LONGER = edit(
    RUN,
    backbone=dict(drop_path=0.0),
    method=dict(teacher_temp=0.04, warmup_teacher_temp_epochs=0, freeze_last_layer=0),
    optim=dict(epochs=12, lr=0.03),
    save_minutes=60,
)


@pytest.mark.parametrize(
    ("parts", "entropy", "kl"),
    [
        (dict(), (0.1 * LN_K, 0.95 * LN_K), (0.3, LN_K)),
        (dict(centering=False), (0.0, 0.01 * LN_K), (0.0, 0.05)),  # one prototype takes everything
        (dict(sharpening=False), (0.97 * LN_K, LN_K), (0.0, LN_K)),  # all prototypes alike
    ],
    ids=["both", "no centering", "no sharpening"],
)
def test_fig7_each_half_alone_collapses(tmp_path: Path, parts: dict, entropy: tuple, kl: tuple) -> None:
    """The teacher's entropy goes to 0 without centering and to ln K without sharpening; with both to neither."""
    run = edit(LONGER, method=parts, out=str(tmp_path / "run"))
    fit(run)
    end = read_metrics(Path(run.out))[-5:]
    assert entropy[0] <= np.mean([line["teacher_entropy"] for line in end]) <= entropy[1]
    assert kl[0] <= np.mean([line["kl"] for line in end]) <= kl[1]


class Stripes(Pictures):
    """Lying stripes, standing stripes, squares: any colours, width and phase, so that pixels hardly tell."""

    def __init__(self, count: int, size: int = 32) -> None:
        super().__init__(
            names=[str(i) for i in range(count)],
            sizes=np.full((count, 2), size),
            labels=np.arange(count) % 3,
            classes=["lying", "standing", "squares"],
        )
        self.size = size

    def read(self, index: int) -> np.ndarray:
        rng = np.random.default_rng([index, 7])
        place = np.arange(self.size)
        waves = [np.sin(place * rng.uniform(0.9, 1.6) + rng.uniform(0, 2 * np.pi)) > 0 for _ in range(2)]
        lying, standing = np.meshgrid(*waves, indexing="ij")
        mask = (lying, standing, lying ^ standing)[index % 3]
        dark, light = rng.integers(0, 110, 3), rng.integers(145, 256, 3)
        colours = (light, dark) if rng.random() < 0.5 else (dark, light)
        return np.where(mask[..., None], *colours).astype(np.uint8)


def events(tmp_path: Path) -> Iterator:
    run = edit(
        LONGER,
        out=str(tmp_path / "run"),
        method=dict(momentum=0.98),
        optim=dict(epochs=10, batch_size=16, lr=0.03),
        views=dict(local_scale=(0.2, 0.5)),
        knn=dict(every_epochs=10, held_back=0.3),
        log_every=1000,
    )
    yield from train(run, CPU, Stripes(240))


def test_it_learns(tmp_path: Path) -> None:
    """20-NN accuracy of the teacher on held-back pictures rises well above chance and the untrained network."""
    started, *rest = events(tmp_path)
    assert isinstance(started, Started)
    floor = max(values["20-NN"] for values in started.baselines.values())
    [evaluated] = [event for event in rest if isinstance(event, Evaluated)]
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    print(started.baselines, evaluated.values, losses)
    assert evaluated.values["20-NN"] > max(60.0, floor + 10)
    assert losses[-1] < 0.95 * LN_K
