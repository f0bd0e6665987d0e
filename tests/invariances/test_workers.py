"""Weights are bit-identical for any number of worker processes."""

from pathlib import Path

import pytest
from tiny import edit, fit, same_training, tiny


@pytest.mark.parametrize("knn", [0, 1])
def test_any_number_of_workers_gives_the_same_weights(tmp_path: Path, knn: int) -> None:
    alone = tiny(tmp_path / "0", optim=dict(epochs=2), online_eval=dict(every_epochs=knn))
    fit(alone)
    for workers in (1, 2) if knn == 0 else (2,):
        run = edit(alone, out=str(tmp_path / str(workers)), workers=workers)
        fit(run, until=7)  # the workers have prefetched more batches by then
        fit(run, resume=True)
        assert not same_training(run, alone)
